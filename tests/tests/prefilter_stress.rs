//! Attach and detach, over and over, under threads that allocate, fork, make threads and get
//! signals. `cargo xtask stress` runs it; by itself it would take as long as it is told to.

use std::{
    env, fs,
    time::{Duration, Instant},
};

use memprof_tests::{Running, TempDir, code::AllocatorCode, memprof, target};

/// Set by `cargo xtask stress`.
const SECONDS: &str = "MEMPROF_STRESS_SECONDS";

/// What no allocation changes.
fn file_maps(pid: u32) -> Vec<String> {
    fs::read_to_string(format!("/proc/{pid}/maps"))
        .expect("maps")
        .lines()
        .filter(|line| line.contains('/') || line.contains("[v"))
        .map(str::to_owned)
        .collect()
}

/// Check that after each of as many recordings as there is time for, maps and text are as
/// before, and that at the end no block has been lost or changed.
#[test]
#[ignore = "takes as long as it is told to: cargo xtask stress"]
fn attach_and_detach() {
    let seconds = env::var(SECONDS).ok().and_then(|text| text.parse().ok());
    let seconds: u64 = seconds.expect("MEMPROF_STRESS_SECONDS, a number");
    let dir = TempDir::new("stress");
    let mut storm = Running::spawn(&mut target("storm.c").command(&["8"]));
    storm.wait_stdout(|line| line == "ready");
    let pid = storm.pid();
    let before = file_maps(pid);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0_u32;
    while Instant::now() < end {
        let interval = ["512KiB", "64KiB", "16KiB", "0"][rounds as usize % 4];
        let finished = Running::spawn(&mut memprof(&[
            "record",
            "--probe",
            "prefilter",
            "-i",
            interval,
            "-d",
            "0.05",
            "-f",
            "json",
            "-o",
            &dir.file("stress.json"),
            "-p",
            &pid.to_string(),
        ]))
        .finish();
        finished.expect_code(0);
        assert!(storm.is_running(), "round {rounds}");
        assert_eq!(file_maps(pid), before, "round {rounds}");
        assert_eq!(
            AllocatorCode::in_memory(pid),
            AllocatorCode::in_file(pid),
            "round {rounds}"
        );
        rounds += 1;
    }
    storm.send_last("over");
    let finished = storm.finish();
    finished.expect_code(0);
    println!("{rounds} times in {seconds} s; {}", finished.stdout.trim());
    assert!(rounds > 0);
}
