//! Who is traced, where every process could be.

use super::Tracer;
use crate::{
    filter::{Filters, Subject, Verdict},
    probe::mode::ModeChoice,
    process::info::ProcessInfo,
};

/// How a process is traced that rules say nothing more about: it is not written to.
const UNSAID: ModeChoice = ModeChoice::Uprobe;

impl Tracer {
    /// How a process is to be traced, if it is: asked before it is taken on, and again for
    /// each program that it runs.
    pub(super) fn admit(&self, info: &ProcessInfo) -> Option<ModeChoice> {
        let was_let_go = self.system.as_ref().is_some_and(|system| {
            let let_go = system.let_go.get(&info.pid);
            let_go.is_some_and(|let_go| let_go.is(info))
        });
        if was_let_go {
            return None;
        }
        admit(&self.options.filters, info)
    }
}

/// What rules say of a process: how it is to be traced, if it is.
fn admit(filters: &Filters, info: &ProcessInfo) -> Option<ModeChoice> {
    let subject = Subject {
        pid: info.pid,
        comm: &info.comm,
        exe: &info.exe,
        uid: info.origin.uid,
        cgroup: &info.origin.cgroup.path,
    };
    match filters.verdict(&subject) {
        Verdict::Include { probe } => Some(probe.unwrap_or(UNSAID)),
        Verdict::Exclude => None,
    }
}
