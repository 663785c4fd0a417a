//! `memprof record`: what ends it, what passes through, what it writes.

use std::{fs, process::Command, time::Instant};

use memprof_tests::{
    End, LIMIT, Profile, Record, Running, TempDir, Totals, engine::is_prefilter, memprof, pprof,
    target, targets::copy_program,
};
use nix::sys::signal::Signal;

/// Runs `memprof record -i 1 -o FILE -- sh -c SCRIPT`.
fn record_shell(dir: &TempDir, script: &str) -> memprof_tests::Finished {
    let file = dir.file("profile.json");
    let mut command = memprof(&[
        "record", "-i", "1", "-o", &file, "--", "/bin/sh", "-c", script,
    ]);
    Running::spawn(&mut command).finish()
}

/// Check that the exit status is the command's own, or 128 and the signal that
/// killed it, and that there is a profile whatever it is.
#[test]
fn exit_status() {
    for (script, code) in [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
        ("kill -SEGV $$", 128 + 11),
    ] {
        let dir = TempDir::new("record");
        record_shell(&dir, script).expect_code(code);
        let profile = Profile::read(dir.file("profile.json"));
        assert!(profile.process().exited, "{script}");
    }
}

/// Check that the command has the terminal's streams to itself.
#[test]
fn stdio_passes_through() {
    let dir = TempDir::new("record");
    let file = dir.file("profile.json");
    let mut cat = Running::spawn(&mut memprof(&["record", "-o", &file, "--", "cat"]));
    cat.send("through stdin");
    cat.wait_stdout(|line| line == "through stdin");
    cat.send_last("to the end");
    let cat = cat.finish();
    cat.expect_code(0);
    assert_eq!(cat.stdout, "through stdin\nto the end\n");

    let both = record_shell(&dir, "echo to stdout; echo to stderr >&2");
    both.expect_code(0).expect_stderr(&["to stderr\n"]);
    assert_eq!(both.stdout, "to stdout\n");
}

/// Check that without `-o` a command's profile goes to stderr, since stdout is
/// the command's.
#[test]
fn text_of_a_command_on_stderr() {
    let leaks = target("leaks.c");
    let mut memprof = Running::spawn(&mut memprof(&["record", "-i", "1", "--", leaks.text()]));
    memprof.send_last("go");
    let memprof = memprof.finish();
    memprof
        .expect_code(0)
        .expect_stderr(&["leak_large"])
        .expect_stderr(&["leak_small"]);
    assert!(!memprof.stdout.contains("leak_large"), "{memprof}");
    assert!(memprof.stdout.starts_with("ready\n"), "{memprof}");
}

/// Check that without `-o` a running process's profile is text on stdout.
#[test]
fn text_of_a_process_on_stdout() {
    let mut leaks = Running::spawn(&mut target("leaks.c").command(&[]));
    leaks.wait_stdout(|line| line == "ready");
    let pid = leaks.pid().to_string();
    let memprof = Running::spawn(&mut memprof(&["record", "-i", "1", "-p", &pid]));
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    leaks.send("go");
    leaks.wait_stdout(|line| line == "done");
    memprof.signal(Signal::SIGINT);
    let memprof = memprof.finish();
    memprof.expect_code(0);
    for name in ["leak_large", "leak_small", "middle", "main"] {
        assert!(memprof.stdout.contains(name), "{name}: {memprof}");
    }
}

/// Check that `-d` ends a recording of a process that lives on.
#[test]
fn duration() {
    let dir = TempDir::new("record");
    let file = dir.file("profile.json");
    let mut leaks = Running::spawn(&mut target("leaks.c").command(&[]));
    leaks.wait_stdout(|line| line == "ready");
    let pid = leaks.pid().to_string();
    let begin = Instant::now();
    let memprof = Running::spawn(&mut memprof(&[
        "record", "-i", "1", "-d", "2", "-o", &file, "-p", &pid,
    ]));
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    leaks.send("go");
    memprof.finish().expect_code(0);
    assert!(begin.elapsed().as_secs_f64() >= 2.0);
    assert!(leaks.is_running());
    let profile = Profile::read(&file);
    assert!(
        (1.9..30.0).contains(&profile.duration_s),
        "{}",
        profile.duration_s
    );
    assert_eq!(
        profile.process().leaf_totals("leak_small"),
        Totals::of(100, 100, 24)
    );
}

/// Check that SIGINT twice in a row still leaves one whole profile.
#[test]
fn interrupted_twice() {
    let dir = TempDir::new("record");
    let file = dir.file("profile.json");
    let mut leaks = Running::spawn(&mut target("leaks.c").command(&[]));
    leaks.wait_stdout(|line| line == "ready");
    let pid = leaks.pid().to_string();
    let memprof = Running::spawn(&mut memprof(&[
        "record", "-i", "1", "-o", &file, "-p", &pid,
    ]));
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    leaks.send("go");
    leaks.wait_stdout(|line| line == "done");
    memprof.signal(Signal::SIGINT);
    memprof.signal(Signal::SIGINT);
    memprof.finish().expect_code(0);
    let profile = Profile::read(&file);
    assert_eq!(
        profile.process().leaf_totals("leak_small"),
        Totals::of(100, 100, 24)
    );
    assert!(leaks.is_running());
    leaks.close_stdin();
    leaks.finish().expect_code(0);
}

/// Check that one recording takes several processes, and ends when the last one
/// does.
#[test]
fn several_processes() {
    let dir = TempDir::new("record");
    let file = dir.file("profile.json");
    let mut targets = [("10", "100"), ("20", "200")].map(|(count, size)| {
        let target = Running::spawn(&mut target("hold.c").command(&[count, size]));
        target.wait_stdout(|line| line == "ready");
        target
    });
    let pids = [targets[0].pid(), targets[1].pid()];
    let mut command = memprof(&["record", "-i", "1", "-o", &file]);
    command.args(["-p", &pids[0].to_string(), "-p", &pids[1].to_string()]);
    let memprof = Running::spawn(&mut command);
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    for target in &mut targets {
        target.send("go");
        target.wait_stdout(|line| line == "done");
        target.close_stdin();
    }
    memprof.finish().expect_code(0);
    let profile = Profile::read(&file);
    for (pid, totals) in pids
        .into_iter()
        .zip([Totals::of(10, 10, 100), Totals::of(20, 20, 200)])
    {
        let mut processes = profile.processes.iter();
        let process = processes
            .find(|process| process.pid == pid)
            .expect("both processes");
        assert_eq!(process.totals(), totals);
    }
}

/// Check that a profile on stdout is whole, in each format.
#[test]
fn formats_to_stdout() {
    for (format, begin) in [
        ("json", &b"{"[..]),
        ("pprof", b"\x1f\x8b"),
        ("folded", b""),
        ("text", b""),
    ] {
        let mut hold = Running::spawn(&mut target("hold.c").command(&["5", "50"]));
        hold.wait_stdout(|line| line == "ready");
        let pid = hold.pid().to_string();
        let memprof = Running::spawn(&mut memprof(&[
            "record", "-i", "1", "-f", format, "-o", "-", "-p", &pid,
        ]));
        memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
        hold.send("go");
        hold.wait_stdout(|line| line == "done");
        hold.close_stdin();
        let memprof = memprof.finish();
        memprof.expect_code(0);
        assert!(
            memprof.stdout_bytes.starts_with(begin),
            "{format}: {memprof}"
        );
        if format == "json" {
            let profile = Profile::parse(&memprof.stdout_bytes);
            assert_eq!(profile.process().totals(), Totals::of(5, 5, 50));
        }
        if format == "folded" || format == "text" {
            assert!(memprof.stdout.contains("hold_here"), "{format}: {memprof}");
        }
    }
}

/// Check that a file's name tells its format, and that folded stacks run from the
/// root to the leaf with the bytes in use.
#[test]
fn format_by_file_name() {
    let dir = TempDir::new("record");
    let leaks = target("leaks.c");
    let record = |name: &str| {
        let file = dir.file(name);
        let mut memprof = Running::spawn(&mut memprof(&[
            "record",
            "-i",
            "1",
            "-o",
            &file,
            "--",
            leaks.text(),
        ]));
        memprof.send_last("go");
        memprof.finish().expect_code(0);
        fs::read(&file).unwrap_or_else(|error| panic!("{file}: {error}"))
    };
    assert!(record("profile.pb.gz").starts_with(&[0x1f, 0x8b]));
    for name in ["profile.json", "profile.whatever"] {
        let profile = Profile::parse(&record(name));
        assert_eq!(
            profile.process().leaf_totals("leak_small"),
            Totals::of(100, 100, 24)
        );
    }
    let text = String::from_utf8(record("profile.txt")).expect("text");
    assert!(
        text.contains("leak_large") && text.contains("leak_small"),
        "{text}"
    );
    let folded = String::from_utf8(record("profile.folded")).expect("text");
    let line = folded
        .lines()
        .find(|line| line.contains("leak_small"))
        .expect("the leak");
    assert!(line.contains("main;outer;middle;leak_small"), "{line}");
    assert!(line.ends_with(" 2400"), "{line}");
}

/// Check that Go's pprof names the leaking functions with their exact bytes, both
/// in use and allocated.
#[test]
fn pprof_of_known_leaks() {
    let dir = TempDir::new("record");
    let file = dir.file("profile.pb.gz");
    let leaks = target("leaks.c");
    let mut memprof = Running::spawn(&mut memprof(&[
        "record",
        "-i",
        "1",
        "-f",
        "pprof",
        "-o",
        &file,
        "--",
        leaks.text(),
    ]));
    memprof.send_last("go");
    memprof.finish().expect_code(0);

    let flat = |sample_index: &str, function: &str| {
        let lines = pprof::top(&dir, &file, sample_index);
        let line = lines.iter().find(|line| line.function == function);
        line.map(|line| line.flat)
    };
    for index in ["inuse_space", "alloc_space"] {
        assert_eq!(flat(index, "leak_small"), Some(2400), "{index}");
        assert_eq!(flat(index, "leak_large"), Some(3 * 1_048_581), "{index}");
    }
    assert_eq!(flat("alloc_space", "churn"), Some(64_000));
    assert_eq!(flat("inuse_space", "churn").unwrap_or(0), 0);
    assert_eq!(flat("alloc_objects", "churn"), Some(1000));
    assert_eq!(flat("inuse_objects", "leak_large"), Some(3));
    let lines = pprof::top(&dir, &file, "inuse_space");
    let main = lines
        .iter()
        .find(|line| line.function == "main")
        .expect("main");
    assert_eq!(main.cumulative, 2400 + 3 * 1_048_581);
}

/// Check that stacks have names though the program has exited and its file was
/// deleted while it ran.
#[test]
fn names_after_exit_and_deletion() {
    let dir = TempDir::new("record");
    let copy = dir.file("deleted");
    copy_program(target("leaks.c").path(), copy.as_ref());
    let mut command = Command::new(&copy);
    let mut leaks = Running::spawn(&mut command);
    leaks.wait_stdout(|line| line == "ready");
    fs::remove_file(&copy).expect("deleting it");
    let file = dir.file("profile.json");
    let pid = leaks.pid().to_string();
    let memprof = Running::spawn(&mut memprof(&[
        "record", "-i", "1", "-o", &file, "-p", &pid,
    ]));
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    leaks.send("go");
    leaks.send_last("end");
    leaks.finish().expect_code(0);
    memprof.finish().expect_code(0);
    let profile = Profile::read(&file);
    let process = profile.process();
    assert!(process.exited);
    let stack = process.only_stack("leak_small");
    assert_eq!(stack.totals(), Totals::of(100, 100, 24));
    assert_eq!(stack.names()[1..4], ["middle", "outer", "main"]);
}

/// Records a program that becomes `hold`, which goes on once memprof has `told`;
/// its pid, and the profile.
#[track_caller]
fn record_exec(source: &str, told: &str) -> (u32, Profile) {
    let dir = TempDir::new("record");
    let file = dir.file("profile.json");
    let hold = target("hold.c");
    let mut becoming = Running::spawn(&mut target(source).command(&[hold.text(), "17", "170"]));
    becoming.wait_stdout(|line| line == "ready");
    let pid = becoming.pid();
    let mut command = memprof(&["record", "-i", "1", "-o", &file, "-p", &pid.to_string()]);
    let memprof = Running::spawn(command.env("MEMPROF_LOG", "info"));
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    becoming.send("go");
    // The path of a program that has ended by the time memprof hears of it is not
    // known; so it lives until then. The prefilter does not see its calls before.
    let told = if is_prefilter() {
        "the new program is hooked"
    } else {
        told
    };
    memprof.wait_stderr(|line| line.contains(told));
    becoming.send_last("go");
    becoming.wait_stdout_for(LIMIT, |line| line == "done");
    becoming.finish().expect_code(0);
    memprof.finish().expect_code(0);

    let profile = Profile::read(&file);
    let processes = &profile.processes;
    assert_eq!(processes.len(), 2, "{processes:#?}");
    assert_eq!(
        processes[0].leaf_totals("before_exec"),
        Totals::of(5, 5, 111)
    );
    assert_eq!(
        processes[1].leaf_totals("hold_here"),
        Totals::of(17, 17, 170)
    );
    (pid, profile)
}

/// Check that a program and the one it becomes by exec are two entries with one
/// pid, and each has its own stacks.
#[test]
fn exec_is_a_new_image() {
    let (pid, profile) = record_exec("exec.c", "has replaced its program");
    let processes = &profile.processes;
    assert!(
        processes
            .iter()
            .all(|process| process.pid == pid && process.exited)
    );
    assert!(processes[0].exe.contains("/exec-"), "{}", processes[0].exe);
    assert!(processes[1].exe.contains("/hold-"), "{}", processes[1].exe);
    assert!(processes[0].through("hold_here").is_empty());
    assert!(processes[1].through("before_exec").is_empty());
}

/// Check that a process goes on being traced when a thread that is not its first
/// one replaces the program, although the kernel drops the probes of it then.
#[test]
fn exec_by_another_thread() {
    let (_, profile) = record_exec("exec_thread.c", "probed anew");
    let sites = &profile.probe.sites;
    let mallocs = sites.iter().filter(|site| site.function == "malloc");
    assert_eq!(mallocs.count(), 1, "{sites:#?}");
}

/// Check that a command is traced from its first allocation, before `main`.
#[test]
fn first_allocation() {
    let dir = TempDir::new("record");
    let recorded = Record::every_allocation(&dir).command(&target("constructor.c"), &[]);
    assert_eq!(
        recorded.process().leaf_totals("before_main"),
        Totals::of(3, 3, 4242)
    );
}

/// Check that a process that allocates nothing gives an empty profile.
#[test]
fn nothing_allocated() {
    let dir = TempDir::new("record");
    let mut quiet = target("constructor.c").command(&[]);
    let recorded = Record::every_allocation(&dir).attach(&mut quiet, End::TargetExits);
    assert_eq!(recorded.process().totals(), Totals::default());
}

/// Check that `--bpf-log` shows what the BPF side has to say, and that it is
/// silent without.
#[test]
fn bpf_log() {
    let says = "has replaced its program";
    let command = ["-i", "0", "--", "/bin/sh", "-c", "exec /bin/true"];
    let with: Vec<&str> = ["record", "--bpf-log"]
        .iter()
        .chain(&command)
        .copied()
        .collect();
    Running::spawn(&mut memprof(&with))
        .finish()
        .expect_code(0)
        .expect_stderr(&[says]);
    let without: Vec<&str> = ["record"].iter().chain(&command).copied().collect();
    let quiet = Running::spawn(&mut memprof(&without)).finish();
    assert!(!quiet.stderr.contains(says), "{}", quiet.stderr);
}
