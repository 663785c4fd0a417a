//! The steps of an attach, a detach, of stopping and of injected calls, at each of which the
//! daemon may die.

/// What has just been done. docs/prefilter.md says for each what becomes of the target
/// should the daemon die there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    // Of an attach and a detach.
    Checked,
    Mapped,
    Probed,
    Enabled,
    ShardsGivenBack,
    Restored,
    Unmapped,
    // Of a stop.
    Seized,
    Interrupted,
    Stopped,
    FrameWritten,
    Parked,
    SignalsBlocked,
    AtEntry,
    CallChosen,
    CallMade,
    AtExit,
    Interrupting,
    AtLastStop,
    SignalsRestored,
    RegistersRestored,
    Moved,
    CodeWritten,
    SetBack,
    LetGo,
}

/// Marks a step as done.
#[cfg(not(any(test, debug_assertions)))]
pub(super) fn done(_: Step) {}

/// Marks a step as done. In a build for tests, the process kills itself at the step that
/// `MEMPROF_DIE_AT` names, the so-and-so-many-th of its name: `CodeWritten:3`.
#[cfg(all(not(test), debug_assertions))]
pub(super) fn done(step: Step) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    };
    static END: LazyLock<Option<(String, AtomicU32)>> = LazyLock::new(|| {
        let end = std::env::var("MEMPROF_DIE_AT").ok()?;
        let (name, count) = end.split_once(':')?;
        Some((name.to_owned(), AtomicU32::new(count.parse().ok()?)))
    });
    if let Some((name, left)) = &*END
        && *name == format!("{step:?}")
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        // Nothing can be cleaned up then, and nothing is done any more.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL);
        loop {
            std::thread::park();
        }
    }
}

#[cfg(test)]
pub(super) use super::testing::done;
