//! A profile with names: what every format is written from.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use memprof_common::unwind::walk::StackEnd;
use serde::Serialize;

pub use crate::process::{info::ProcessMemory, origin::Origin};
use crate::{
    export::totals::ExactTotals, ledger::snapshot::StackCounters, symbolize::frame::Frame,
};

/// A heap profile of one or more processes.
#[derive(Clone, Debug)]
pub struct Profile {
    /// When the counters were read.
    pub captured_at: SystemTime,
    /// From the first attach, or from when counting began anew, to `captured_at`; or of the
    /// window.
    pub duration: Duration,
    /// Of a window only, for so long: all numbers are what has changed in it.
    pub window: Option<Duration>,
    /// Kernel release.
    pub kernel: String,
    /// Machine architecture as `uname -m` has it.
    pub arch: String,
    /// Mean sampling gap.
    pub sample_interval_bytes: u64,
    /// The largest that was ever in force: the interval can be changed.
    pub coarsest_interval_bytes: u64,
    /// Where the probes are.
    pub probe: ProbeInfo,
    /// One entry a process image.
    pub processes: Vec<ProcessProfile>,
}

impl Profile {
    /// The mean sampling gap of a process's allocations at present.
    #[must_use]
    pub fn interval_of(&self, process: &ProcessProfile) -> u64 {
        let go = process.go.as_ref();
        go.map_or(self.sample_interval_bytes, |go| go.interval_bytes)
    }

    /// The largest that was ever in force.
    #[must_use]
    pub fn coarsest_interval_of(&self, process: &ProcessProfile) -> u64 {
        let go = process.go.as_ref();
        go.map_or(self.coarsest_interval_bytes, |go| go.interval_bytes)
    }
}

/// The probes in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeInfo {
    /// How they are attached: `perf`.
    pub mode: String,
    /// Every site, without repetition.
    pub sites: Vec<ProbeSite>,
}

/// One probed address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProbeSite {
    /// Path of the ELF file, as the target sees it.
    pub module: String,
    /// The function.
    pub function: String,
    /// Place in the file.
    pub file_offset: u64,
    /// The same from the function's first byte.
    pub offset: u32,
    /// The instruction there.
    pub instruction: String,
    /// The kernel emulates it: a hit is one trap.
    pub emulated: bool,
}

/// How the calls of a process are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// Code in the process decides, and probes meet samples alone.
    Prefilter,
    /// They are not: the Go runtime samples allocations itself.
    GoRuntime,
    /// Probes meet every call, ...
    #[default]
    Uprobe,
    /// ... since the prefilter was wanted and could not be had, for this reason.
    UprobeSince(String),
}

impl Engine {
    /// As users write it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Prefilter => "prefilter",
            Self::Uprobe | Self::UprobeSince(_) => "uprobe",
            Self::GoRuntime => "go runtime",
        }
    }

    /// Why it is not the prefilter, if that was wanted.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::UprobeSince(reason) => Some(reason),
            Self::Prefilter | Self::Uprobe | Self::GoRuntime => None,
        }
    }
}

/// What a forked process has from its parent: an estimate, of the moment at which the child
/// made its first call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Inherited {
    /// The parent.
    pub parent_pid: u32,
    /// Blocks that it held.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Of a process that is traced since it is another's child.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ChildOf {
    /// The parent that made it.
    pub parent_pid: u32,
    /// How long it had lived by the time that its calls were looked at; none if it was made
    /// before its parent was traced, and of further programs that it has run.
    pub untraced_s: Option<f64>,
}

/// The profile of one process image.
#[derive(Clone, Debug)]
pub struct ProcessProfile {
    /// Process id.
    pub pid: u32,
    /// Name of its main thread.
    pub comm: String,
    /// Path of its program.
    pub exe: String,
    /// Its user, pid namespaces and cgroup.
    pub origin: Origin,
    /// When it was started.
    pub start_time: SystemTime,
    /// It has ended, or replaced its program.
    pub exited: bool,
    /// How its calls are looked at.
    pub engine: Engine,
    /// What the kernel says it holds; the last reading if it has exited, none
    /// if there was none.
    pub memory: Option<ProcessMemory>,
    /// What was lost, by cause; every cause is present, also with 0.
    pub losses: BTreeMap<&'static str, u64>,
    /// For how long it was traced.
    pub traced: Duration,
    /// What it has from its parent, which is in that one's profile and not in this; none if
    /// it is no copy of a process that is traced.
    pub inherited: Option<Inherited>,
    /// Whose child it is, if it is traced for that.
    pub child_of: Option<ChildOf>,
    /// All of its calls, counted exactly; none if they are not known.
    pub totals: Option<ExactTotals>,
    /// What is told of a Go program whose own profile this is.
    pub go: Option<GoFacts>,
    /// Why there is no such profile beside this one, of a Go program.
    pub go_refusal: Option<String>,
    /// Its stacks.
    pub stacks: Vec<StackProfile>,
}

impl ProcessProfile {
    /// Whether it is a Go program of which nothing can be read.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.go_refusal.is_some() && self.engine == Engine::GoRuntime
    }
}

/// What is told of a Go program's own profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GoFacts {
    /// The version of Go that built it.
    pub version: String,
    /// Its `runtime.MemProfileRate`: 0 if it has turned profiling off; none if it has not
    /// begun.
    pub rate_bytes: Option<u64>,
    /// That was another before, while memprof looked.
    pub rate_changed: bool,
    /// The mean sampling gap that the numbers are estimated with.
    pub interval_bytes: u64,
    /// How long the profile was read before the counters were, or before the end; none if it
    /// never was.
    pub age: Option<Duration>,
    /// A garbage collection has ended, so that what was freed by then is known.
    pub has_collected: bool,
    /// All of its history is in it, also from before memprof looked.
    pub is_since_start: bool,
    /// No count changed while it was read.
    pub is_settled: bool,
    /// Why the last try to read it has failed, if it has.
    pub failure: Option<String>,
}

/// One stack and its numbers.
#[derive(Clone, Debug)]
pub struct StackProfile {
    /// Estimates, not yet rounded.
    pub counters: StackCounters,
    /// Leaf first; never empty.
    pub frames: Vec<Arc<Frame>>,
    /// Why it has no more frames.
    pub end: StackEnd,
    /// Some of them were found by frame pointers.
    pub by_frame_pointer: bool,
}

impl StackProfile {
    /// Whether the stack went on beyond the last frame.
    #[must_use]
    pub const fn truncated(&self) -> bool {
        !matches!(self.end, StackEnd::Complete | StackEnd::Unverified)
    }
}
