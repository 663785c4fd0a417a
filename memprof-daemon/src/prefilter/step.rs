//! The steps of stopping and of injected calls, at each of which the daemon may die.

/// What has just been done. docs/prefilter.md says for each what becomes of the target
/// should the daemon die there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
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
    CodeWritten,
    SetBack,
    LetGo,
}

/// Marks a step as done.
#[cfg(not(test))]
pub(super) fn done(_: Step) {}

#[cfg(test)]
pub(super) use super::testing::done;
