//! What may be hard on a process that gets the prefilter, one test each: the table "Hazards" of
//! docs/prefilter.md says which.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use memprof_tests::{
    Daemon, End, Finished, Record, Running, TempDir, Totals,
    code::AllocatorCode,
    daemon::eventually,
    engine::cleanup,
    hold::{Hold, maps},
    memprof,
    profile::Frame,
    target,
    targets::{copy_program, target_with},
};
use nix::sys::signal::Signal;

const PREFILTER: &[&str] = &["--probe", "prefilter"];

fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the target's status");
    let value = text.lines().find_map(|line| line.strip_prefix(field));
    value.expect("a field").trim().to_owned()
}

fn assert_as_in_file(pid: u32) {
    assert_eq!(AllocatorCode::in_memory(pid), AllocatorCode::in_file(pid));
}

fn ready(command: &mut Command) -> Running {
    let running = Running::spawn(command);
    running.wait_stdout(|line| line == "ready");
    running
}

/// `memprof record` of a process for a moment, by `command`.
fn record(command: &mut Command, dir: &TempDir, pid: u32, probe: &str) -> Finished {
    command.args(["record", "--probe", probe, "-d", "0.1", "-f", "json"]);
    command.args(["-o", &dir.file("moment.json"), "-p", &pid.to_string()]);
    Running::spawn(command).finish()
}

/// The only program that `pid` has started.
fn child_of(pid: u32) -> u32 {
    eventually(|| {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

/// Check that allocations of a vfork child, in its parent's memory, are counted in the
/// parent's totals, are in no profile, and that the parent's own are seen, exactly.
#[test]
fn vfork_child() {
    let dir = TempDir::new("hazards");
    let mut command = target("children.c").command(&["vfork"]);
    let recorded = Record::every_allocation(&dir)
        .options(PREFILTER)
        .attach(&mut command, End::Interrupt);
    let process = recorded.process();
    assert_eq!(process.engine, "prefilter");
    assert_eq!(process.leaf_totals("in_parent_here"), Totals::of(5, 5, 100));
    assert_eq!(process.leaf_totals("in_child_here").alloc_objects, 0);
    let seen = process.totals().alloc_objects;
    assert_eq!(process.exact().alloc_calls, seen + 5);
}

/// Check that a program started by posix_spawn runs, with the prefilter in its parent, and
/// that it has none.
#[test]
fn spawned_program() {
    let dir = TempDir::new("hazards");
    let mut command = target("children.c").command(&["spawn"]);
    let recorded = Record::every_allocation(&dir)
        .options(PREFILTER)
        .attach(&mut command, End::Interrupt);
    let process = recorded.process();
    assert_eq!(process.engine, "prefilter");
    assert_eq!(process.leaf_totals("in_parent_here"), Totals::of(5, 5, 100));
    assert_eq!(process.exact().alloc_calls, process.totals().alloc_objects);
}

/// Check that a forked child with addresses of the stubs on its stack gets its functions back
/// at once, keeps the memory, is said to, and loses it when those are gone.
#[test]
fn words_on_a_childs_stack() {
    let dir = TempDir::new("hazards");
    let mut parent = ready(&mut target("children.c").command(&["words"]));
    let daemon = Daemon::start(&dir, &[parent.pid()], PREFILTER);
    parent.send("fork");
    let line = parent.wait_stdout(|line| line.starts_with("child "));
    let child: u32 = line["child ".len()..].parse().expect("a pid");
    eventually(|| (status(child, "State:").starts_with('S')).then_some(()));
    thread::sleep(Duration::from_millis(100));
    Running::spawn(&mut memprof::memprof(&[
        "cleanup",
        "--attach-timeout",
        "0.5",
        "-p",
        &child.to_string(),
    ]))
    .finish()
    .expect_code(1)
    .expect_stderr(&["it is switched off, and its memory stays mapped"]);
    assert_as_in_file(child);
    assert!(maps(child).contains("memprof-prefilter"));
    parent.send("on");
    let said = eventually(|| {
        let pid = child.to_string();
        let finished = Running::spawn(&mut memprof::memprof(&["cleanup", "-p", &pid])).finish();
        (finished.code() == 0).then_some(finished.stdout)
    });
    assert!(said.contains("taken out"), "{said}");
    assert!(!maps(child).contains("memprof-prefilter"));
    parent.send("on");
    daemon.stop();
    assert_as_in_file(parent.pid());
    parent.close_stdin();
    parent.finish().expect_code(0);
}

/// Check that a process which a signal has stopped stays stopped while it is hooked, and
/// after it is let go, and is seen, exactly, once it goes on.
#[test]
fn stopped_process() {
    let dir = TempDir::new("hazards");
    let mut hold = Hold::start();
    let pid = hold.pid();
    let is_stopped = || status(pid, "State:").starts_with('T');
    hold.running.signal(Signal::SIGSTOP);
    eventually(|| is_stopped().then_some(()));
    let daemon = Daemon::start(&dir, &[pid], PREFILTER);
    thread::sleep(Duration::from_millis(100));
    assert!(is_stopped(), "{}", status(pid, "State:"));
    hold.running.signal(Signal::SIGCONT);
    hold.go();
    let profile = daemon.profile_when(pid, |profile| {
        profile.process().leaf_totals("hold_here").alloc_objects >= 10
    });
    assert_eq!(profile.process().engine, "prefilter");
    assert_eq!(
        profile.process().leaf_totals("hold_here"),
        Totals::of(10, 10, 100)
    );
    hold.running.signal(Signal::SIGSTOP);
    eventually(|| is_stopped().then_some(()));
    daemon.stop();
    assert!(is_stopped(), "{}", status(pid, "State:"));
    assert_as_in_file(pid);
    assert!(!maps(pid).contains("memprof-prefilter"));
    hold.running.signal(Signal::SIGCONT);
    hold.go();
    hold.finish();
}

/// Check that a debugger that comes while the prefilter is in keeps it from being taken out,
/// that memprof says so with its name, and that `memprof cleanup` does it when the debugger
/// has gone.
#[test]
fn debugger_meanwhile() {
    let dir = TempDir::new("hazards");
    let mut hold = Hold::start();
    let pid = hold.pid();
    let daemon = Daemon::start(
        &dir,
        &[pid],
        &["--probe", "prefilter", "--attach-timeout", "10"],
    );
    let mut gdb = Running::spawn(Command::new("gdb").args(["-q", "-nx", "-p", &pid.to_string()]));
    eventually(|| (status(pid, "TracerPid:") == gdb.pid().to_string()).then_some(()));
    daemon.running.signal(Signal::SIGTERM);
    let finished = daemon.running.finish();
    finished.expect_stderr(&["cannot take the prefilter out"]);
    assert!(finished.stderr.contains("gdb"), "{}", finished.stderr);
    assert!(maps(pid).contains("memprof-prefilter"));
    gdb.send("detach");
    gdb.send_last("quit");
    let _ = gdb.finish();
    eventually(|| (status(pid, "TracerPid:") == "0").then_some(()));
    // What is left works.
    hold.go();
    assert!(cleanup(pid).contains("taken out of 9 functions"));
    assert_as_in_file(pid);
    assert!(!maps(pid).contains("memprof-prefilter"));
    hold.go();
    hold.finish();
}

/// Check that a set-user-id program that another user has started is seen, exactly.
#[test]
fn set_user_id() {
    const NOBODY: u32 = 65534;
    const DAEMON: &str = "1";
    let dir = TempDir::new("hazards");
    let program = dir.file("hold");
    copy_program(target("hold.c").path(), program.as_ref());
    chown(&program, Some(NOBODY), Some(NOBODY)).expect("its owner");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).expect("its mode");
    let mut command = Command::new("setpriv");
    command.args(["--reuid", DAEMON, "--regid", DAEMON, "--clear-groups"]);
    command.args([&program, "10", "100"]);
    let mut hold = Hold::started_by(&mut command);
    let uids = status(hold.pid(), "Uid:");
    let uids: Vec<&str> = uids.split_whitespace().collect();
    assert_eq!(
        uids[..2],
        [DAEMON, &NOBODY.to_string()],
        "set-user-id works here"
    );
    let daemon = Daemon::start(&dir, &[hold.pid()], PREFILTER);
    hold.go();
    let profile = daemon.profile_when(hold.pid(), |profile| {
        profile.process().leaf_totals("hold_here").alloc_objects >= 10
    });
    assert_eq!(profile.process().engine, "prefilter");
    assert_eq!(
        profile.process().leaf_totals("hold_here"),
        Totals::of(10, 10, 100)
    );
    daemon.stop();
    assert_as_in_file(hold.pid());
    hold.finish();
}

/// Check that a process is refused whose pid namespace forbids executable memory files, with
/// the kernel's answer, that nothing of it stays, and that it gets uprobes by default.
#[test]
fn no_executable_memory_files() {
    let setting = Path::new("/proc/sys/vm/memfd_noexec");
    assert!(setting.exists(), "the test needs Linux 6.3");
    let dir = TempDir::new("hazards");
    let script = format!("echo 2 > {} && exec \"$0\" 10 100", setting.display());
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "sh", "-c", &script]);
    command.arg(target("hold.c").path());
    let mut outer = ready(&mut command);
    let pid = child_of(outer.pid());
    let before = maps(pid);
    record(&mut memprof::memprof::<&str>(&[]), &dir, pid, "prefilter")
        .expect_code(1)
        .expect_stderr(&["EACCES"]);
    assert_eq!(maps(pid), before);
    let daemon = Daemon::start(&dir, &[pid], &["--probe", "auto"]);
    let profile = daemon.profile_when(pid, |_| true);
    assert_eq!(profile.process().engine, "uprobe");
    let reason = profile.process().engine_reason.clone().unwrap_or_default();
    assert!(reason.contains("EACCES"), "{reason}");
    daemon.stop();
    assert_eq!(
        fs::read_to_string(setting).expect("the setting").trim(),
        "0"
    );
    outer.close_stdin();
    outer.finish().expect_code(0);
}

/// Check that memprof without the right to trace says so, and that the process is as before.
#[test]
fn without_the_capability() {
    let dir = TempDir::new("hazards");
    let mut hold = Hold::start();
    let pid = hold.pid();
    let before = maps(pid);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"]);
    command.arg(memprof::binary());
    let finished = record(&mut command, &dir, pid, "prefilter");
    finished.expect_code(1);
    finished.expect_stderr(&["CAP_SYS_PTRACE"]);
    assert_eq!(maps(pid), before);
    assert_as_in_file(pid);
    hold.go();
    hold.finish();
}

/// Check that a process with ever new threads, many more than shards, has all its calls counted or
/// told as not counted, and counted again once the shards of ended threads are given back.
#[test]
fn threads_that_come_and_go() {
    const PAIRS: u64 = 5;
    const MANY: u64 = 3000;
    const FEW: u64 = 40;
    let dir = TempDir::new("hazards");
    let mut target = ready(&mut target("successors.c").command(&[]));
    let pid = target.pid();
    let options = ["--probe", "prefilter", "-i", "1", "--ring-size", "64MiB"];
    let daemon = Daemon::start(&dir, &[pid], &options);
    let (mut batches, mut threads) = (0_usize, 0);
    let mut come_and_go = |count: u64| {
        target.send(&count.to_string());
        batches += 1;
        threads += count;
        eventually(|| (target.stdout().matches("done\n").count() == batches).then_some(()));
        // What BPF has in its ring is booked a tick later.
        thread::sleep(Duration::from_millis(300));
        let profile = daemon.profile(pid);
        let process = profile.process();
        let seen = process.leaf_totals("in_successor").alloc_objects;
        assert_eq!(process.exact().alloc_calls, process.totals().alloc_objects);
        let resident = process.leaf_totals("in_resident").alloc_objects;
        let unsharded = process.loss("unsharded_calls");
        assert!(seen + resident + unsharded >= PAIRS * (threads + batches as u64));
        (seen, resident, unsharded)
    };
    let (_, _, unsharded) = come_and_go(MANY);
    assert!(unsharded > 0, "there was room for all");
    let begun = std::time::Instant::now();
    let (seen, resident, unsharded) = loop {
        let before = come_and_go(FEW);
        let after = come_and_go(FEW);
        if before.2 == after.2 {
            assert_eq!(after.0, before.0 + PAIRS * FEW);
            break after;
        }
        // Ten seconds lie between the first two stops.
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{before:?} {after:?}"
        );
    };
    let stats = daemon.stats();
    let process = &stats["processes"][0];
    let given_back = process["shards_given_back"].as_u64();
    assert!(given_back >= Some(200), "{stats}");
    assert!(process["stopped_ms"].as_f64() > Some(0.0));
    let after = come_and_go(FEW / 2);
    assert_eq!(after, (seen + PAIRS * FEW / 2, resident + PAIRS, unsharded));
    daemon.stop();
    assert_as_in_file(pid);
    target.close_stdin();
    target.finish().expect_code(0);
}

/// Check that the stacks of a signal handler that allocates, wherever in a stub or in the function
/// behind it the program was interrupted, lead through that to `main`, and that no call of either
/// is missed.
#[test]
fn handler_that_allocates() {
    const TURNS: u64 = 40_000;
    for flags in [&["-fno-builtin"][..], &["-fno-builtin", "-static"]] {
        let dir = TempDir::new("hazards");
        let mut command = target_with("alarmed.c", flags).command(&[&TURNS.to_string()]);
        let recorded = Record::every_allocation(&dir)
            .options(PREFILTER)
            .options(&["--ring-size", "64MiB"])
            .attach(&mut command, End::Interrupt);
        let process = recorded.process();
        assert_eq!(process.engine, "prefilter");
        let alarms = recorded.target.value("alarms");
        let made = |function: &str| process.leaf_totals(function).alloc_objects;
        assert_eq!(made("in_main"), TURNS / 2);
        assert_eq!(made("zeroed_in_main"), TURNS / 2);
        // One that interrupts a followed call is within it, and not counted.
        let told = made("in_handler");
        assert!(told <= alarms && told > 20, "{told} of {alarms}");
        assert_eq!(process.exact().alloc_calls, process.totals().alloc_objects);
        let is_stub = |frame: &Frame| {
            let module = frame.module.as_deref();
            module.is_some_and(|module| module.contains("memprof-prefilter"))
        };
        let mut through_stubs = 0;
        for stack in process.with_leaf("in_handler") {
            assert_eq!(stack.end, "complete", "{stack:#?}");
            assert!(stack.names().contains(&"main"), "{stack:#?}");
            if stack.frames.iter().any(is_stub) {
                through_stubs += stack.alloc_objects;
            }
        }
        assert!(through_stubs > 10, "{through_stubs} of {told}");
    }
}
