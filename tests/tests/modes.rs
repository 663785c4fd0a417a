//! Ways to attach, and processes that they could harm or lose.

use std::sync::{Mutex, MutexGuard, PoisonError};

use memprof_tests::{End, Record, Running, TempDir, memprof::memprof, target};

/// One at a time: when a test takes its uprobes off, the kernel takes away those of a process
/// whose first thread has ended, too (docs/probes.md).
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The modes that the running kernel has, as `memprof check` says.
fn modes() -> Vec<String> {
    let finished = Running::spawn(&mut memprof(&["check"])).finish();
    finished.expect_code(0);
    let line = finished
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("ok    probe modes"))
        .expect("a line about probe modes");
    let (there, _) = line.split_once(':').expect("modes and what is used");
    there
        .split(',')
        .map(|mode| mode.trim().to_owned())
        .collect()
}

/// Check that each mode of this kernel can be forced and is what the profile
/// says; that the best is used if none is; and that another word is refused.
#[test]
fn forced_modes() {
    let _alone = alone();
    let modes = modes();
    assert!(modes.contains(&"perf".to_owned()), "{modes:?}");
    let dir = TempDir::new("modes");
    for mode in &modes {
        let recorded = Record::every_allocation(&dir)
            .options(&["--probe", mode])
            .command(&target("leaks.c"), &[]);
        assert_eq!(&recorded.profile.probe.mode, mode);
        assert!(recorded.process().totals().alloc_objects > 0, "{mode}");
    }
    let recorded = Record::every_allocation(&dir)
        .options(&["--probe", "auto"])
        .command(&target("leaks.c"), &[]);
    assert_eq!(recorded.profile.probe.mode, modes[0]);
    Running::spawn(&mut memprof(&["record", "--probe", "kprobe", "-p", "1"]))
        .finish()
        .expect_code(2)
        .expect_stderr(&["kprobe", "auto, prefilter, uprobe, session, multi, perf"]);
}

/// Check that a process whose filter kills it for unknown system calls is traced
/// and lives, in its every call (this kernel lets return probes pass).
#[test]
fn confined_process_lives() {
    let _alone = alone();
    let dir = TempDir::new("modes");
    let mut confined = target("confined.c").command(&["1000", "777"]);
    let recorded = Record::every_allocation(&dir).attach(&mut confined, End::TargetExits);
    recorded.target.expect_code(0);
    let totals = recorded.process().leaf_totals("confined_alloc");
    assert_eq!((totals.alloc_objects, totals.inuse_objects), (1000, 1));
    assert_eq!(totals.alloc_bytes, 777_000);
}

/// Check that the filter means the process: its first thread ends, and what the
/// others do is recorded all the same. Perf events end with that thread, and the
/// recording with them (docs/probes.md): nothing is to be made up then, and
/// memprof says so.
#[test]
fn first_thread_ends() {
    let _alone = alone();
    let dir = TempDir::new("modes");
    let mut leader = target("leader.c").command(&["500", "64"]);
    let recorded = Record::every_allocation(&dir).attach(&mut leader, End::Interrupt);
    let totals = recorded.process().leaf_totals("survivor");
    let expected = match recorded.profile.probe.mode.as_str() {
        "perf" => (0, 0),
        _ => (500, 32_000),
    };
    assert_eq!((totals.alloc_objects, totals.inuse_bytes), expected);
    let is_told = recorded.memprof.stderr.contains("first thread has ended");
    assert_eq!(is_told, expected == (0, 0), "{}", recorded.memprof.stderr);
}
