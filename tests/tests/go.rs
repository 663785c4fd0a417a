//! Go programs: their own heap profile, read from outside, compared with the one that they
//! write themselves.

use std::{fs, path::Path, process::Command};

use memprof_tests::{
    Finished, Process, Profile, Running, Target, TempDir,
    golang::{expect_same, go_version, start, step},
    memprof::memprof,
    targets::target_with,
};
use nix::sys::signal::Signal;

const STRIPPED: &[&str] = &["-ldflags=-s -w"];

/// How a program is linked.
const BUILDS: [(&str, &[&str]); 4] = [
    ("plain", &[]),
    ("stripped", STRIPPED),
    ("pie", &["-buildmode=pie"]),
    ("pie, stripped", &["-buildmode=pie", "-ldflags=-s -w"]),
];

/// Records a running process until this tells it to stop, which is at once.
fn record(pid: u32, options: &[&str]) -> Finished {
    let mut command = memprof(&["record", "-p", &pid.to_string()]);
    let memprof = Running::spawn(command.args(options));
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    memprof.signal(Signal::SIGINT);
    let finished = memprof.finish();
    finished.expect_code(0);
    finished
}

fn record_json(dir: &TempDir, pid: u32) -> Profile {
    let file = dir.file("profile.json");
    let _ = record(pid, &["-f", "json", "-o", &file]);
    Profile::read(&file)
}

/// Has a process allocate twice, and compares both profiles each time.
fn compare(program: &Target, rate: &str, tolerance: u64) {
    let dir = TempDir::new("go");
    let own = dir.file("own");
    let mut running = start(&mut program.command(&[&own, rate]));
    for round in 0..2 {
        step(&mut running);
        let file = dir.file("memprof.pb.gz");
        let _ = record(running.pid(), &["-f", "pprof", "-o", &file]);
        expect_same(&dir, &file, &format!("{own}.{round}"), tolerance);
    }
    assert!(running.is_running());
    running.close_stdin();
    running.finish().expect_code(0);
}

/// Check that memprof's profile is the program's own, line by line, however it is linked, also
/// without symbols: exactly, where every allocation is sampled.
#[test]
fn every_allocation() {
    for (name, flags) in BUILDS {
        println!("{name}");
        compare(&target_with("heap.go", flags), "1", 0);
    }
}

/// Check the same with sampling as usual, where both estimate.
#[test]
fn sampled() {
    for rate in ["524288", "4096"] {
        compare(&target_with("heap.go", STRIPPED), rate, 100);
    }
}

/// Check what is told of a program: engine, version, rate, inlined functions, stacks that are
/// longer than Go keeps them; and that text and folded stacks have it, too.
#[test]
fn told() {
    let dir = TempDir::new("go");
    let program = target_with("heap.go", &[]);
    let mut running = start(&mut program.command(&[&dir.file("own"), "1"]));
    step(&mut running);
    let profile = record_json(&dir, running.pid());
    assert!(profile.probe.sites.is_empty(), "{:?}", profile.probe);
    let process = profile.process();
    let go = process.go.as_ref().expect("what is told of Go");
    assert_eq!(process.engine, "go runtime");
    assert_eq!(go.version, go_version());
    assert_eq!(
        (go.mem_profile_rate, go.sample_interval_bytes),
        (Some(1), 1)
    );
    assert!(go.collected && go.settled && go.since_start && !go.rate_changed);
    assert!(go.age_s.is_some_and(|age| age < 2.0) && go.failure.is_none());
    assert!(process.totals.is_none() && process.losses.is_empty());

    let here = |caller: &str| {
        let stacks = process.with_leaf("main.wrappedHere");
        let mut stacks = stacks
            .into_iter()
            .filter(|stack| stack.frames[3].is(caller));
        let stack = stacks.next().expect("a stack");
        assert!(stacks.next().is_none(), "it is one stack");
        stack
    };
    let kept = here("main.round");
    assert_eq!(
        kept.names(),
        [
            "main.wrappedHere",
            "main.inlinedHere",
            "main.keepHere",
            "main.round",
            "main.main",
            "runtime.main",
        ]
    );
    let inlined: Vec<bool> = kept.frames.iter().map(|frame| frame.inlined).collect();
    assert_eq!(inlined, [true, true, false, false, false, false]);
    assert!(kept.frames.iter().all(|frame| frame.line.is_some()));
    assert_eq!((kept.alloc_objects, kept.truncated), (200, false));
    let deep = here("main.deepHere");
    // 128 frames are kept since Go 1.23.
    let keeps_few = go.version.as_str() < "go1.23";
    assert_eq!((deep.alloc_objects, deep.truncated), (10, keeps_few));

    let text = record(running.pid(), &["-f", "text", "-o", "-"]).stdout;
    for expected in [
        "  engine      go runtime\n",
        "as of its last garbage collection\n",
        "since its start\n",
        "       main.wrappedHere (inlined) ",
    ] {
        assert!(text.contains(expected), "{expected:?}: {text}");
    }
    let folded = record(running.pid(), &["-f", "folded", "-o", "-"]).stdout;
    let line = "runtime.main;main.main;main.round;main.keepHere;";
    assert!(folded.contains(line), "{folded}");
}

/// Check that all that the program has told before its first collection is there, and said to
/// be early; and that a rate of 0 is told, with numbers as before.
#[test]
fn rates() {
    let dir = TempDir::new("go");
    let program = target_with("heap.go", &[]);
    let mut running = start(&mut program.command(&[&dir.file("own"), "1", "0"]));
    let profile = record_json(&dir, running.pid());
    let go = profile.process().go.clone().expect("Go");
    assert!(!go.collected, "{go:?}");
    assert!(profile.process().totals().alloc_objects > 0);

    let mut memprof = memprof(&["record", "-f", "json", "-o"]);
    memprof.arg(dir.file("long.json"));
    memprof.args(["-p", &running.pid().to_string()]);
    let memprof = Running::spawn(&mut memprof);
    memprof.wait_stderr(|line| line.starts_with("memprof: recording"));
    step(&mut running);
    memprof.signal(Signal::SIGINT);
    memprof.finish().expect_code(0);
    let profile = Profile::read(dir.file("long.json"));
    let go = profile.process().go.clone().expect("Go");
    assert_eq!(
        (go.mem_profile_rate, go.sample_interval_bytes),
        (Some(0), 1)
    );
    assert!(go.rate_changed && go.collected);
    let text = record(running.pid(), &["-f", "text", "-o", "-"]).stdout;
    assert!(text.contains("(MemProfileRate is 0)"), "{text}");
}

/// Check that a program whose profiling the linker has removed is refused with that reason,
/// also without symbols, and that `memprof check` says so.
#[test]
fn removed_by_the_linker() {
    for flags in [&[][..], STRIPPED] {
        let running = start(&mut target_with("heap_unprofiled.go", flags).command(&[]));
        let pid = running.pid().to_string();
        let finished = Running::spawn(&mut memprof(&["record", "-p", &pid])).finish();
        finished.expect_code(1);
        let why = "the Go linker has taken memory profiling out of it";
        assert!(finished.stderr.contains(why), "{finished}");
        let finished = Running::spawn(&mut memprof(&["check", "-p", &pid])).finish();
        assert!(finished.stdout.contains(why), "{finished}");
    }
}

/// Check that a program of a Go that is not known is refused, and named.
#[test]
fn unknown_version() {
    let dir = TempDir::new("go");
    let program = target_with("heap.go", &[]);
    let version = go_version();
    let mut bytes = fs::read(program.path()).unwrap();
    let magic = b"\xff Go buildinf:";
    let section = bytes.windows(magic.len()).position(|part| part == magic);
    // The version is the first string in it, behind its length.
    let at = section.expect("the section") + 33;
    assert!(bytes[at..].starts_with(version.as_bytes()));
    bytes[at..][..6].copy_from_slice(b"go1.99");
    let path = dir.path().join("unknown");
    fs::write(dir.path().join("bytes"), bytes).unwrap();
    make_program(&dir.path().join("bytes"), &path);
    let running = start(Command::new(&path).arg(dir.file("own")));
    let pid = running.pid().to_string();
    let finished = Running::spawn(&mut memprof(&["record", "-p", &pid])).finish();
    finished.expect_code(1);
    assert!(
        finished.stderr.contains("it is built by go1.99"),
        "{finished}"
    );
}

/// Not by this process: what another test starts would hold it open for writing.
fn make_program(from: &Path, to: &Path) {
    memprof_tests::targets::copy_program(from, to);
    let status = Command::new("chmod").arg("+x").arg(to).status();
    assert!(status.expect("chmod").success());
}

/// Check that of a program that has ended the last reading is left, with its age, also of one
/// that memprof has started.
#[test]
fn exits() {
    let dir = TempDir::new("go");
    for (round, flags) in [&[][..], &["-buildmode=pie", "-ldflags=-s -w"]]
        .iter()
        .enumerate()
    {
        let file = dir.file(&format!("profile.{round}.json"));
        let program = target_with("heap.go", flags);
        let mut command = memprof(&["record", "-f", "json", "-o", &file, "--"]);
        command.arg(program.path()).args([&dir.file("own"), "1"]);
        let mut memprof = start(&mut command);
        step(&mut memprof);
        // Until it must have been read.
        std::thread::sleep(std::time::Duration::from_millis(2500));
        memprof.close_stdin();
        memprof.finish().expect_code(0);
        let profile = Profile::read(&file);
        let process: &Process = profile.process();
        let go = process.go.as_ref().expect("Go");
        assert!(process.exited && process.engine == "go runtime", "{go:?}");
        assert!(
            go.age_s.is_some_and(|age| age < 2.5) && go.collected,
            "{go:?}"
        );
        assert_eq!(
            process.only_stack("main.churnHere").totals().alloc_objects,
            20_000
        );
        assert_eq!(process.only_stack("main.churnHere").totals().inuse_bytes, 0);
    }
}

/// Check that of a program with C code there are both profiles: of its calls of malloc, and of
/// its Go heap.
#[test]
fn cgo() {
    let dir = TempDir::new("go");
    let file = dir.file("profile.json");
    let program = target_with("heap_cgo.go", &[]);
    let mut running = start(&mut program.command(&[]));
    let mut command = memprof(&["record", "-i", "1", "-f", "json", "-o", &file]);
    command.args(["-p", &running.pid().to_string()]);
    let memprof = Running::spawn(&mut command);
    memprof.wait_stderr(|line| line.contains("probe sites in"));
    assert!(
        memprof
            .stderr()
            .contains("the heap profile of its Go runtime")
    );
    step(&mut running);
    memprof.signal(Signal::SIGINT);
    memprof.finish().expect_code(0);
    let profile = Profile::read(&file);
    let [go, malloc] = &profile.processes[..] else {
        panic!("two profiles: {profile:#?}");
    };
    assert_eq!((go.pid, malloc.pid), (running.pid(), running.pid()));
    assert_eq!(go.engine, "go runtime");
    assert!(malloc.engine == "prefilter" || malloc.engine == "uprobe");
    assert!(malloc.go.is_none() && malloc.go_refusal.is_none());
    // Of 100,000 bytes each, for which Go takes 106,496. The slice that holds them is allocated
    // there, too, and what the runtime itself needs for large blocks.
    let stacks = go.with_leaf("main.goHere");
    let kept = stacks.iter().map(|stack| stack.totals());
    let kept = kept.max_by_key(|kept| kept.inuse_bytes).expect("a stack");
    assert!((100..110).contains(&kept.inuse_objects), "{kept:?}");
    assert!(
        (10_649_600..10_660_000).contains(&kept.inuse_bytes),
        "{kept:?}"
    );
    let calls = malloc.totals.expect("exact totals");
    // Another thread of the runtime's takes some, if one starts meanwhile.
    assert!((100..120).contains(&calls.alloc_calls), "{calls:?}");
    let kept = malloc.stacks.iter().map(|stack| stack.totals());
    let kept = kept.max_by_key(|kept| kept.inuse_bytes).expect("a stack");
    assert_eq!((kept.inuse_objects, kept.inuse_bytes), (100, 100_000));
}
