//! Tracers that are killed, at each step of what they do.

use std::{os::unix::process::ExitStatusExt as _, process::Command, thread, time::Duration};

use super::{
    remote,
    stop::Stopped,
    stop_error::tracer_of,
    testing::{Target, die_after, soon, trace},
};

const PAGE: u64 = 4096;

/// The tracer that [`dead_tracer`] has die: at the step that is given, of the process
/// that is given.
#[test]
#[ignore = "started by another test, to be killed"]
fn tracer_that_dies() {
    let given = |name: &str| std::env::var(name).unwrap().parse::<u32>().unwrap();
    let pid = given("MEMPROF_TEST_TARGET");
    let steps = given("MEMPROF_TEST_STEPS");
    trace(|tracer| {
        die_after(steps);
        let mut stopped = Stopped::all(tracer, pid, soon()).unwrap();
        let maps = stopped.maps().unwrap();
        let code = maps.iter().find(|entry| entry.executable).unwrap().start.0;
        stopped
            .inject(|calls| {
                calls.call(libc::SYS_getpid, [0; 6])?;
                let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
                let page = calls.call(libc::SYS_mmap, [0, PAGE, 3, flags, u64::MAX, 0])?;
                calls.call(libc::SYS_munmap, [page, PAGE, 0, 0, 0, 0])
            })
            .unwrap();
        let mut bytes = [0; 5];
        stopped.read(code, &mut bytes).unwrap();
        stopped.write_code(code, &bytes, &bytes).unwrap();
        stopped.release().unwrap();
    });
    die_after(0);
    println!("lives");
}

/// The tracer that [`dead_tracer_that_moves`] has die: it leads the thread out of one loop, into
/// the other.
#[test]
#[ignore = "started by another test, to be killed"]
fn tracer_that_moves() {
    let given = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let pid = given("MEMPROF_TEST_TARGET") as u32;
    let counter_at = given("MEMPROF_TEST_COUNTER");
    let twins = remote::read_word(pid, counter_at).unwrap();
    let word = |number: u64| remote::read_word(pid, twins + 8 * number).unwrap();
    let (first, second) = (word(2), word(3));
    trace(|tracer| {
        die_after(given("MEMPROF_TEST_STEPS") as u32);
        let mut stopped = Stopped::all(tracer, pid, soon()).unwrap();
        let is_in = |place: u64| (first..second).contains(&place);
        let goal = |place: u64| is_in(place).then(|| place + (second - first));
        stopped.move_threads(goal).unwrap();
        stopped.release().unwrap();
    });
    die_after(0);
    println!("lives");
}

/// Has a tracer of `pid` die at its `steps`-th step; which one that was, or none if it
/// came to its end before.
fn have_tracer_die(pid: u32, steps: u32) -> Option<String> {
    have_it_die("tracer_that_dies", pid, 0, steps)
}

fn have_it_die(which: &str, pid: u32, counter_at: u64, steps: u32) -> Option<String> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([&format!("prefilter::death_tests::{which}"), "--exact"])
        .args(["--ignored", "--nocapture"])
        .env("MEMPROF_TEST_TARGET", pid.to_string())
        .env("MEMPROF_TEST_COUNTER", counter_at.to_string())
        .env("MEMPROF_TEST_STEPS", steps.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.signal() {
        Some(libc::SIGKILL) => {
            let step = said.lines().find_map(|line| line.strip_prefix("dies at "));
            Some(step.unwrap().to_owned())
        }
        _ => {
            assert!(output.status.success(), "{said}");
            assert!(String::from_utf8_lossy(&output.stdout).contains("lives"));
            None
        }
    }
}

/// Check that a process whose tracer is killed at any step goes on as before: one that
/// computes, with all its registers, its mask and its alternate stack.
#[test]
fn dead_tracer() {
    let target = Target::hazard(&["compute"]);
    let mut steps = Vec::new();
    while let Some(step) = have_tracer_die(target.pid(), steps.len() as u32 + 1) {
        target.until("is let go", |target| tracer_of(target.pid()).is_none());
        target.until_it_works();
        target.until_it_works();
        steps.push(step);
    }
    println!("died at {}", steps.join(", "));
    for step in [
        "Seized",
        "Interrupted",
        "Stopped",
        "FrameWritten",
        "Parked",
        "SignalsBlocked",
        "AtEntry",
        "CallChosen",
        "CallMade",
        "AtExit",
        "Interrupting",
        "AtLastStop",
        "SignalsRestored",
        "RegistersRestored",
        "CodeWritten",
        "LetGo",
    ] {
        assert!(steps.iter().any(|seen| seen == step), "{step}");
    }
    target.finish_well();
}

/// Check that a thread whose tracer is killed once it was led to another place goes on there, or
/// where it was.
#[test]
fn dead_tracer_that_moves() {
    let mut steps = Vec::new();
    loop {
        let target = Target::hazard(&["twins"]);
        let number = steps.len() as u32 + 1;
        let died = have_it_die("tracer_that_moves", target.pid(), target.counter_at, number);
        target.until("is let go", |target| tracer_of(target.pid()).is_none());
        let has_moved = died.is_none() || steps.contains(&"Moved".to_owned());
        let is_moving = died.as_deref() == Some("Moved");
        let turns = target.counter() + if has_moved || is_moving { 8 } else { 0 };
        let turns = || remote::read_word(target.pid(), turns).unwrap();
        let before = turns();
        target.until("turns", |_| turns() != before);
        target.finish_well();
        match died {
            Some(step) => steps.push(step),
            None => break,
        }
    }
    println!("died at {}", steps.join(", "));
    assert!(steps.contains(&"Moved".to_owned()));
}

/// Check the same of processes in calls: one that the kernel makes again goes on, one
/// that has a rest of its time to wait, or that ends with every stop, goes on or ends
/// with EINTR.
#[test]
fn dead_tracer_of_waiting_calls() {
    for (kind, may_end) in [
        ("read", false),
        ("futex", false),
        ("nanosleep", true),
        ("epoll_wait", true),
    ] {
        for steps in 1.. {
            let target = Target::interrupted(kind);
            let Some(step) = have_tracer_die(target.pid(), steps) else {
                break;
            };
            // Made again before what it waits for happens.
            target.until("is let go", |target| tracer_of(target.pid()).is_none());
            target.until("waits or ends", |target| {
                matches!(target.state(), 'S' | 'Z')
            });
            thread::sleep(Duration::from_millis(5));
            let (status, said) = target.finish();
            assert!(
                status.success() || may_end && said.contains("Interrupted system call"),
                "{kind}: died at {step}: {status} {said}"
            );
        }
    }
}

/// Check that a seccomp filter kills no process whose tracer dies, but in the moment
/// between the choice of a call and its being made: where that is, docs/prefilter.md says.
#[test]
fn dead_tracer_under_seccomp() {
    for steps in 1.. {
        let target = Target::hazard(&["confined"]);
        target.until_it_works();
        let Some(step) = have_tracer_die(target.pid(), steps) else {
            break;
        };
        if step == "CallChosen" || step == "CallMade" {
            continue;
        }
        target.until("is let go", |target| tracer_of(target.pid()).is_none());
        target.until_it_works();
        target.finish_well();
    }
}
