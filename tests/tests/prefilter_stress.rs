//! Attach and detach, over and over, under threads that allocate, fork, make threads and get
//! signals. `cargo xtask stress` runs it; by itself it would take as long as it is told to.

use std::{
    env,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use memprof_tests::{
    Running, TempDir,
    code::{AllocatorCode, file_maps},
    memprof, target,
};
use nix::sys::signal::Signal;

/// Set by `cargo xtask stress`.
const SECONDS: &str = "MEMPROF_STRESS_SECONDS";

/// How a recording ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By itself.
    TimeOut,
    /// By SIGINT after so long, which may be before the prefilter is in.
    Interrupt(Duration),
    /// By SIGKILL after so long: the next takes out what is left.
    Kill(Duration),
}

impl End {
    /// Of the round with this number: one in eight is interrupted, one in sixteen killed, at
    /// moments that are spread over loading, attaching and recording.
    fn of(round: u32) -> Self {
        let moment = Duration::from_millis(u64::from(round * 37 % 400));
        match round % 16 {
            5 | 13 => Self::Interrupt(moment),
            11 => Self::Kill(moment),
            _ => Self::TimeOut,
        }
    }
}

/// The storm, at a lower priority than memprof, which would otherwise be one of ten that want
/// two processors, and have few rounds.
fn storm() -> Running {
    let storm = target("storm.c").command(&["8"]);
    let mut nice = Command::new("nice");
    nice.args(["-n", "10"]).arg(storm.get_program());
    let storm = Running::spawn(nice.args(storm.get_args()));
    storm.wait_stdout(|line| line == "ready");
    storm
}

fn record(pid: u32, round: u32, output: &str) {
    let interval = ["512KiB", "64KiB", "16KiB", "0"][round as usize % 4];
    let pid = pid.to_string();
    let end = End::of(round);
    let duration = if end == End::TimeOut { "0.05" } else { "60" };
    let mut command = memprof(&["record", "--probe", "prefilter", "-i", interval]);
    command.args(["-d", duration, "-f", "json", "-o", output, "-p", &pid]);
    let recorder = Running::spawn(&mut command);
    match end {
        End::TimeOut => {
            recorder.finish().expect_code(0);
        }
        End::Interrupt(moment) => {
            thread::sleep(moment);
            recorder.signal(Signal::SIGINT);
            // Before it has heard of signals, it dies of them.
            recorder.finish().expect_no_panic();
        }
        End::Kill(moment) => {
            thread::sleep(moment);
            recorder.signal(Signal::SIGKILL);
            let _ = recorder.finish();
        }
    }
}

/// Check that after each of as many recordings as there is time for, those that end early
/// among them, maps and text are as before, but after one that was killed, whose remains the
/// next takes out; and that at the end no block has been lost or changed.
#[test]
#[ignore = "takes as long as it is told to: cargo xtask stress"]
fn attach_and_detach() {
    let seconds = env::var(SECONDS).ok().and_then(|text| text.parse().ok());
    let seconds: u64 = seconds.expect("MEMPROF_STRESS_SECONDS, a number");
    let dir = TempDir::new("stress");
    let output = dir.file("stress.json");
    let mut storm = storm();
    let pid = storm.pid();
    let before = file_maps(pid);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut rounds, mut interrupted, mut killed) = (0_u32, 0, 0);
    loop {
        let how = End::of(rounds);
        record(pid, rounds, &output);
        assert!(storm.is_running(), "round {rounds}");
        match how {
            End::Kill(_) => killed += 1,
            End::Interrupt(_) | End::TimeOut => {
                interrupted += u32::from(how != End::TimeOut);
                assert_eq!(file_maps(pid), before, "round {rounds}, {how:?}");
                let (memory, file) = (AllocatorCode::in_memory(pid), AllocatorCode::in_file(pid));
                assert_eq!(memory, file, "round {rounds}, {how:?}");
            }
        }
        rounds += 1;
        // Not after a killed one: what is left of it would stay.
        if Instant::now() >= end && !matches!(how, End::Kill(_)) {
            break;
        }
    }
    storm.send_last("over");
    let finished = storm.finish();
    finished.expect_code(0);
    println!(
        "{rounds} rounds in {seconds} s (600 s are to have 1000), {interrupted} of them \
         interrupted and {killed} killed; {}",
        finished.stdout.lines().last().unwrap_or_default()
    );
    assert!(rounds > 0);
}
