//! Who is traced, where every process could be.

use super::Tracer;
use crate::{pipeline::tracer::ModeChoice, process::info::ProcessInfo};

/// What is known of a process when it is to be decided.
#[derive(Clone, Copy, Debug)]
#[expect(dead_code, reason = "until there are rules")]
pub(super) struct Facts<'a> {
    /// Process id.
    pub(super) pid: u32,
    /// Name of its main thread.
    pub(super) comm: &'a str,
    /// Path of its program; empty if it was gone before anyone could ask.
    pub(super) exe: &'a str,
    /// Effective user id.
    pub(super) uid: u32,
    /// Path of its cgroup; empty if it is not known.
    pub(super) cgroup: &'a str,
}

impl<'a> Facts<'a> {
    pub(super) fn of(info: &'a ProcessInfo) -> Self {
        Self {
            pid: info.pid,
            comm: &info.comm,
            exe: &info.exe,
            uid: info.origin.uid,
            cgroup: &info.origin.cgroup.path,
        }
    }
}

/// What is to be done with a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is traced, in this way.
    Trace(ModeChoice),
    /// It is left alone.
    Leave,
}

impl Tracer {
    /// Decides about a process before it is taken on, and again for each program that it
    /// runs.
    #[expect(clippy::unused_self, reason = "until there are rules")]
    pub(super) fn admit(&self, facts: Facts<'_>) -> Decision {
        tracing::trace!(?facts, "a process has turned up");
        Decision::Trace(ModeChoice::Uprobe)
    }
}
