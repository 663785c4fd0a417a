//! Invariant 8: detaching leaves nothing in the target.

use memprof_tests::{
    Daemon, End, Record, Running, TempDir,
    code::AllocatorCode,
    daemon::eventually,
    engine::{cleanup, is_prefilter},
    target,
};
use nix::sys::signal::Signal;

fn holder() -> Running {
    let hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    hold
}

/// Lets it allocate, and waits until it has.
fn go(hold: &mut Running, times: usize) {
    hold.send("go");
    eventually(|| (hold.stdout().matches("done\n").count() == times).then_some(()));
}

/// Check that the bytes of the allocator are those of its file before, and not
/// while it is probed: that the other tests here can fail.
#[test]
fn invariant_8_probes_are_visible() {
    let dir = TempDir::new("detach");
    let mut hold = holder();
    assert_eq!(
        AllocatorCode::in_memory(hold.pid()),
        AllocatorCode::in_file(hold.pid())
    );
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    go(&mut hold, 1);
    assert_ne!(
        AllocatorCode::in_memory(hold.pid()),
        AllocatorCode::in_file(hold.pid())
    );
    daemon.stop();
}

/// Check that no probe is left when the daemon has ended as it should, and the
/// target works on.
#[test]
fn invariant_8_after_sigterm() {
    let dir = TempDir::new("detach");
    let mut hold = holder();
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    go(&mut hold, 1);
    daemon.stop();
    assert_eq!(
        AllocatorCode::in_memory(hold.pid()),
        AllocatorCode::in_file(hold.pid())
    );
    go(&mut hold, 2);
    hold.close_stdin();
    hold.finish().expect_code(0);
}

/// Check that no probe is left when the daemon was killed, and the target works
/// on. The kernel takes the probes off when it closes the dead daemon's
/// descriptors, or at the next hit. The prefilter stays until it is cleaned up.
#[test]
fn invariant_8_after_sigkill() {
    let dir = TempDir::new("detach");
    let mut hold = holder();
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    go(&mut hold, 1);
    daemon.running.signal(Signal::SIGKILL);
    let status = daemon.running.finish().status;
    assert!(status.code().is_none(), "{status}");
    go(&mut hold, 2);
    if is_prefilter() {
        // Nobody is there to take it out; it does no harm, and goes when it is told to.
        assert!(cleanup(hold.pid()).contains("taken out"));
    }
    eventually(|| {
        let left = AllocatorCode::in_memory(hold.pid()) != AllocatorCode::in_file(hold.pid());
        (!left).then_some(())
    });
    go(&mut hold, 3);
    hold.close_stdin();
    hold.finish().expect_code(0);
}

/// Check that after a recording the process can be recorded again, and the
/// second profile knows nothing of the first.
#[test]
fn invariant_8_again() {
    let dir = TempDir::new("detach");
    let mut hold = holder();
    for times in 1..=2 {
        let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
        go(&mut hold, times);
        let profile = daemon.profile_when(hold.pid(), |profile| {
            profile.process().totals().alloc_objects >= 10
        });
        assert_eq!(profile.process().totals().alloc_objects, 10);
        daemon.stop();
        assert_eq!(
            AllocatorCode::in_memory(hold.pid()),
            AllocatorCode::in_file(hold.pid())
        );
    }
}

/// Check that another process of the same program is neither probed nor counted.
#[test]
fn other_processes_are_not_counted() {
    let dir = TempDir::new("detach");
    let mut other = holder();
    let mut hold = target("hold.c").command(&["10", "100"]);
    let before = AllocatorCode::in_file(other.pid());
    go(&mut other, 1);
    let recorded = Record::every_allocation(&dir).attach(&mut hold, End::TargetExits);
    assert_eq!(recorded.process().totals().alloc_objects, 10);
    assert_eq!(AllocatorCode::in_memory(other.pid()), before);
}
