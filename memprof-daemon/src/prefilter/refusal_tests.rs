use super::*;
use crate::{
    prefilter::{
        inject::InjectError,
        testing::{Target, soon, trace},
    },
    process::info::ProcessError,
};
use std::{
    process::{Command, Stdio},
    thread,
};

/// Check that a process that another traces is refused with that one's name, and that
/// one that is no more is said to be none.
#[test]
fn traced_or_gone() {
    let target = Target::hazard(&["compute"]);
    let mut gdb = Command::new("gdb")
        .args([
            "-q",
            "-nx",
            "-p",
            &target.pid().to_string(),
            "-ex",
            "shell sleep 60",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    target.until("is traced", |target| tracer_of(target.pid()).is_some());
    let refused = trace(|tracer| Stopped::all(tracer, target.pid(), soon()).map(drop));
    assert!(
        matches!(&refused, Err(StopError::Traced { tracer, .. }) if tracer == "gdb"),
        "{refused:?}"
    );
    gdb.kill().unwrap();
    gdb.wait().unwrap();
    let gone = trace(|tracer| Stopped::all(tracer, u32::MAX >> 1, soon()).map(drop));
    assert!(
        matches!(gone, Err(StopError::Process(ProcessError::NotFound { .. }))),
        "{gone:?}"
    );
}

/// Check that a thread that waits for its vfork child is named, with its state, and that
/// nothing is traced nor stopped afterwards, then or later.
#[test]
fn vfork_parent() {
    let target = Target::hazard(&["vfork"]);
    target.until("waits", |target| target.state() == 'D');
    let deadline = Instant::now() + Duration::from_millis(50);
    let refused = trace(|tracer| Stopped::all(tracer, target.pid(), deadline).map(drop));
    assert!(
        matches!(&refused, Err(StopError::DoesNotStop { state: 'D', tid, comm, .. })
            if *tid == target.pid() && comm.starts_with("memprof-hazard")),
        "{refused:?}"
    );
    target.until("is let go", |target| tracer_of(target.pid()).is_none());
    target.finish_well();
}

/// Check that what must not or cannot be used is refused, and goes on.
#[test]
fn refusals() {
    let refuse = |kind: &str| {
        let target = Target::hazard(&[kind]);
        let refused = trace(|tracer| Stopped::all(tracer, target.pid(), soon()).map(drop));
        assert!(tracer_of(target.pid()).is_none());
        target.finish_well();
        refused.unwrap_err()
    };
    let error = refuse("clone-vm");
    assert!(matches!(error, StopError::SharesMemory { .. }), "{error}");
    let error = refuse("no-thread-pointer");
    assert!(
        matches!(error, StopError::NoThreadPointer { .. }),
        "{error}"
    );
    // Stops, but no frame is written to a stack that may be next to another's.
    let target = Target::hazard(&["coroutine"]);
    thread::sleep(Duration::from_millis(20));
    trace(|tracer| {
        let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
        let error = stopped.inject(|_| Ok(())).unwrap_err();
        assert!(matches!(error, InjectError::NoVictim { .. }), "{error}");
    });
}

/// Check that threads of the kernel's and a first thread that has ended do not keep a
/// process from being stopped.
#[test]
fn threads_without_code() {
    for kind in ["uring", "leader-gone"] {
        let target = Target::hazard(&[kind]);
        thread::sleep(Duration::from_millis(20));
        let stood = trace(|tracer| {
            let mut stopped = Stopped::all(tracer, target.pid(), soon()).unwrap();
            // The kernel's thread stops too, on this kernel and others.
            let with_code = stopped.threads().filter(|thread| !thread.is_kernels);
            assert_eq!(with_code.count(), 1, "{kind}");
            assert!(
                !stopped
                    .is_anyone_within(std::slice::from_ref(&(1..2)))
                    .unwrap(),
                "{kind}"
            );
            stopped
                .inject(|calls| calls.call(libc::SYS_getpid, [0; 6]))
                .unwrap();
            stopped.release().unwrap()
        });
        assert!(stood < Duration::from_secs(1), "{kind}: {stood:?}");
    }
}
