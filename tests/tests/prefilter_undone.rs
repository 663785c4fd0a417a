//! The prefilter goes as it has come: nothing of it stays in a process, whoever dies.

use std::{thread, time::Duration};

use memprof_tests::{
    Daemon, Record, Running, TempDir,
    code::{AllocatorCode, file_maps},
    engine::cleanup,
    hold::{Hold, maps},
    memprof, target,
};
use nix::sys::signal::Signal;

const PREFILTER: &[&str] = &["--probe", "prefilter"];

/// A process of 8 threads that allocate, fork, make threads and get signals, and that
/// fails if a block is not as it was.
fn storm() -> Running {
    let storm = Running::spawn(&mut target("storm.c").command(&["8"]));
    storm.wait_stdout(|line| line == "ready");
    storm
}

fn finish_storm(mut storm: Running) {
    storm.send_last("over");
    let finished = storm.finish();
    finished.expect_code(0);
    assert!(finished.stdout.contains("calls"), "{}", finished.stdout);
}

fn assert_untouched(pid: u32, before: &[String]) {
    assert_eq!(file_maps(pid), before);
    assert_eq!(AllocatorCode::in_memory(pid), AllocatorCode::in_file(pid));
}

/// Check that maps and text of a sleeping process are what they were, to the last
/// byte of `/proc/PID/maps`, after each of three recordings.
#[test]
fn maps_and_text_are_as_before() {
    let dir = TempDir::new("undone");
    let mut hold = Hold::start();
    // The heap grows at the first.
    hold.go();
    let before = maps(hold.pid());
    for _ in 0..3 {
        let daemon = Daemon::start(&dir, &[hold.pid()], PREFILTER);
        assert!(maps(hold.pid()).contains("memprof-prefilter"));
        daemon.stop();
        assert_eq!(maps(hold.pid()), before);
        assert_eq!(
            AllocatorCode::in_memory(hold.pid()),
            AllocatorCode::in_file(hold.pid())
        );
    }
    hold.go();
    hold.finish();
}

/// Check that a daemon which is killed at any moment, while it attaches or later, leaves
/// a process that goes on and loses no block, and that the next daemon takes the image
/// out first.
#[test]
fn daemon_is_killed() {
    let dir = TempDir::new("undone");
    let mut storm = storm();
    let pid = storm.pid();
    let before = file_maps(pid);
    // From the load of BPF programs to after the attach.
    for round in 0..24_u64 {
        let socket = dir.file("killed.sock");
        let pid = pid.to_string();
        let options = [
            "daemon",
            "--socket",
            &socket,
            "--probe",
            "prefilter",
            "-p",
            &pid,
        ];
        let daemon = Running::spawn(&mut memprof::memprof(&options));
        // Attaching begins when the programs are loaded: spread over what comes next.
        thread::sleep(Duration::from_millis(100 + round * 40));
        daemon.signal(Signal::SIGKILL);
        let _ = daemon.finish();
        assert!(storm.is_running(), "round {round}");
    }
    let daemon = Daemon::start(&dir, &[pid], &["--probe", "prefilter", "-i", "64KiB"]);
    daemon.stop();
    assert_untouched(pid, &before);
    finish_storm(storm);
}

/// Check that `memprof cleanup` takes out what a killed daemon has left, and says that
/// there is nothing where there is nothing.
#[test]
fn cleaned_up_by_hand() {
    let dir = TempDir::new("undone");
    let storm = storm();
    let pid = storm.pid();
    let before = file_maps(pid);
    assert!(cleanup(pid).contains("no prefilter is in it"));
    let daemon = Daemon::start(&dir, &[pid], PREFILTER);
    // Not from under a daemon.
    Running::spawn(&mut memprof::memprof(&["cleanup", "-p", &pid.to_string()]))
        .finish()
        .expect_code(1)
        .expect_stderr(&["another memprof uses it"]);
    daemon.running.signal(Signal::SIGKILL);
    let _ = daemon.running.finish();
    // Uprobes do not go beside it, and this engine never writes.
    Running::spawn(&mut memprof::memprof(&[
        "record",
        "--probe",
        "uprobe",
        "-d",
        "1",
        "-p",
        &pid.to_string(),
    ]))
    .finish()
    .expect_code(1)
    .expect_stderr(&["memprof cleanup -p"]);
    let said = cleanup(pid);
    assert!(said.contains("taken out of 9 functions"), "{said}");
    assert_untouched(pid, &before);
    finish_storm(storm);
}

/// Check that recording again and again under threads that allocate, fork and get signals
/// loses no block and leaves nothing.
#[test]
fn again_and_again() {
    let dir = TempDir::new("undone");
    let storm = storm();
    let pid = storm.pid();
    let before = file_maps(pid);
    for interval in ["64KiB", "512KiB", "0"] {
        let daemon = Daemon::start(&dir, &[pid], &["--probe", "prefilter", "-i", interval]);
        thread::sleep(Duration::from_millis(200));
        let stats = daemon.stats();
        let process = &stats["processes"][0];
        assert_eq!(process["engine"], "prefilter");
        assert!(process["image_bytes"].as_u64() > Some(1 << 20));
        assert!(process["longest_stopped_ms"].as_f64() > Some(0.0));
        daemon.stop();
        assert_untouched(pid, &before);
    }
    finish_storm(storm);
}

/// Check that a process is attached to and let go though more of its threads than there are
/// processors allocate all the time, so that some are always within the first instructions
/// and in the stubs; that it loses no block, and that nothing stays.
#[test]
fn busy_threads() {
    let dir = TempDir::new("undone");
    let mut crowd = Running::spawn(&mut target("crowd.c").command(&["5"]));
    crowd.wait_stdout(|line| line == "ready");
    let pid = crowd.pid();
    let before = file_maps(pid);
    for _ in 0..2 {
        // The machine may have other things to do.
        let options = ["--probe", "prefilter", "--attach-timeout", "20"];
        let daemon = Daemon::start(&dir, &[pid], &options);
        assert!(maps(pid).contains("memprof-prefilter"));
        let said = daemon.stop().stderr;
        assert!(!maps(pid).contains("memprof-prefilter"), "{said}");
        assert_untouched(pid, &before);
    }
    crowd.send_last("over");
    crowd.finish().expect_code(0);
}

/// Check that a process under a debugger gets no prefilter, and that its name is said; and
/// that by default it is probed then, for that reason.
#[test]
fn under_a_debugger() {
    let dir = TempDir::new("undone");
    let mut hold = Hold::start();
    let pid = hold.pid().to_string();
    let strace = Running::spawn(std::process::Command::new("strace").args([
        "-f",
        "-e",
        "trace=none",
        "-p",
        &pid,
    ]));
    strace.wait_stderr(|line| line.contains("attached"));
    Running::spawn(&mut memprof::memprof(&[
        "record",
        "--probe",
        "prefilter",
        "-d",
        "1",
        "-p",
        &pid,
    ]))
    .finish()
    .expect_code(1)
    .expect_stderr(&["traced by strace"]);
    let daemon = Daemon::start(&dir, &[hold.pid()], &["--probe", "auto"]);
    hold.go();
    let profile = daemon.profile_when(hold.pid(), |profile| {
        profile.process().totals().alloc_objects >= 10
    });
    assert_eq!(profile.process().engine, "uprobe");
    let reason = profile.process().engine_reason.clone().unwrap_or_default();
    assert!(reason.contains("strace"), "{reason}");
    daemon.stop();
    strace.signal(Signal::SIGINT);
    let _ = strace.finish();
    hold.finish();
}

/// Check that nothing is ever written into a process by `--probe uprobe`, and that the
/// profile says which engine it was and no reason, since nobody wanted another.
#[test]
fn uprobes_write_nothing() {
    let dir = TempDir::new("undone");
    let mut command = target("hold.c").command(&["10", "100"]);
    let recorded = Record::every_allocation(&dir)
        .options(&["--probe", "uprobe"])
        .attach(&mut command, memprof_tests::End::Interrupt);
    assert_eq!(recorded.process().engine, "uprobe");
    assert_eq!(recorded.process().engine_reason, None);
}
