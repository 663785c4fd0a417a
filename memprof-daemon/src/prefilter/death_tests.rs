//! Tracers that are killed, at each step of what they do.

use std::{os::unix::process::ExitStatusExt as _, process::Command, thread, time::Duration};

use super::{
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

/// Has a tracer of `pid` die at its `steps`-th step; which one that was, or none if it
/// came to its end before.
fn have_tracer_die(pid: u32, steps: u32) -> Option<String> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["prefilter::death_tests::tracer_that_dies", "--exact"])
        .args(["--ignored", "--nocapture"])
        .env("MEMPROF_TEST_TARGET", pid.to_string())
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
