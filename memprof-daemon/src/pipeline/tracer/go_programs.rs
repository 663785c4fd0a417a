//! Go programs where every process is traced and probes are shared: one without a `malloc` makes
//! no call that would have it turn up. So they are found by their files, and taken on one by one,
//! as by `POST /v1/targets`.
//!
//! Each new mapping is told by the kernel, and whether its file is a Go program is asked once of
//! each ([`super::looked_at`]); what was mapped before or was not told is found by the looks
//! through `/proc`. A process that calls `malloc`, too, may have taken a slot by itself by then;
//! its Go heap is found when its mappings are read.

use std::collections::{BTreeSet, HashMap, HashSet};

use tokio::sync::oneshot;
use tracing::debug;

use super::{Command, Tracer, rules::LetGo};
use crate::{
    causes::with_causes,
    pipeline::{
        install::Holder,
        scan::{Scanner, Wish},
        sweep::Swept,
        target::{Attached, Target, TargetError},
    },
    probe::{find::FindError, mode::ModeChoice},
    process::info::{ProcessError, ProcessInfo},
};

/// What is known of them.
#[derive(Debug, Default)]
pub(super) struct GoPrograms {
    /// How many are being taken on.
    under_way: usize,
    /// Those that could not be, and what they ran: it would be the same again.
    refused: HashMap<u32, LetGo>,
    /// Those that no slot was free for.
    no_room: HashSet<u32>,
    /// How many could not be since they had ended, or no slot was free.
    missed: u64,
}

impl GoPrograms {
    /// Whether none is being taken on.
    pub(super) const fn is_settled(&self) -> bool {
        self.under_way == 0
    }

    /// How many were missed.
    pub(super) const fn missed(&self) -> u64 {
        self.missed
    }
}

impl Tracer {
    /// Processes have mapped files that Go has built.
    pub(super) fn go_mapped(&mut self, pids: &BTreeSet<u32>) {
        for &pid in pids {
            // At once, not in a job: a program can be short.
            match Scanner::info(pid) {
                Some(info) => self.consider_go(&info),
                None => self.miss_go(pid),
            }
        }
    }

    /// All processes were looked through.
    pub(super) fn go_swept(&mut self, swept: &Swept) {
        if let Some(system) = &mut self.system {
            let refused = &mut system.go.refused;
            refused.retain(|pid, _| swept.pids.contains(pid));
            system.go.no_room.retain(|pid| swept.pids.contains(pid));
        }
        for info in &swept.go {
            self.consider_go(info);
        }
    }

    /// Takes on a process that maps a file which Go has built, if it is to be traced.
    fn consider_go(&mut self, info: &ProcessInfo) {
        let pid = info.pid;
        if pid == std::process::id() || !self.is_sharing() {
            return;
        }
        if self
            .targets
            .get(&pid)
            .is_some_and(|target| target.is_live())
        {
            self.look_for_go(info);
            return;
        }
        let was_refused = self.system.as_ref().is_some_and(|system| {
            let refused = system.go.refused.get(&pid);
            refused.is_some_and(|refused| refused.is(info))
        });
        // A child between its fork and its program has its parent's heap.
        if was_refused || self.is_copy(pid) {
            return;
        }
        if let Some(mode) = self.admit(info) {
            self.take_on_go(info, mode);
        }
    }

    /// Looks for the Go heap of a process that is traced, and has mapped what Go has built after
    /// it was read.
    fn look_for_go(&mut self, info: &ProcessInfo) {
        let Some(target) = self.targets.get_mut(&info.pid) else {
            return;
        };
        let jobs = target.jobs;
        let Some(image) = target.current() else {
            return;
        };
        image.maps_go |= image.info.start_ticks == info.start_ticks;
        // What is under way finds it.
        if jobs > 0 || !image.lacks_go(info) {
            return;
        }
        let image = image.id;
        target.jobs += 1;
        self.spawn_rescan(image);
    }

    fn take_on_go(&mut self, info: &ProcessInfo, mode: ModeChoice) {
        let Some(system) = &mut self.system else {
            return;
        };
        system.go.under_way += 1;
        let (reply, answer) = oneshot::channel();
        self.take_on(info.pid, mode, Holder::Nobody, Wish::Rule, reply);
        let (pid, runs) = (info.pid, LetGo::of(info));
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let result = answer.await.unwrap_or(Err(TargetError::Stopped));
            if let Some(sender) = myself.upgrade() {
                let command = Command::GoAttach { pid, runs, result };
                let _ = sender.send(command).await;
            }
        });
    }

    /// A Go program was taken on, or could not be.
    pub(super) fn go_taken_on(
        &mut self,
        pid: u32,
        runs: LetGo,
        result: Result<Attached, TargetError>,
    ) {
        let Some(system) = &mut self.system else {
            return;
        };
        system.go.under_way = system.go.under_way.saturating_sub(1);
        match result {
            // What rules say may be another thing since.
            Ok(_) => self.leave_if_left_out(pid),
            // It is tried again at the next look through all, and counts once.
            Err(TargetError::TooMany(_)) if !system.go.no_room.insert(pid) => {}
            // It has turned up by itself meanwhile, and is read as such, if there is time.
            Err(TargetError::Already(_)) => {
                let target = self.targets.get_mut(&pid);
                match target.filter(|it| it.is_live()).and_then(Target::current) {
                    Some(image) => image.maps_go = true,
                    None => self.miss_go(pid),
                }
            }
            // What cannot be read of one that is gone may be told in many ways.
            Err(error) if is_missed(&error) || Scanner::info(pid).is_none() => self.miss_go(pid),
            Err(error) => {
                debug!(
                    pid,
                    error = with_causes(&error),
                    "a Go program is not traced"
                );
                system.go.refused.insert(pid, runs);
            }
        }
        self.tell_started();
    }

    /// A Go program was not read, and will not be, or not now.
    pub(super) fn miss_go(&mut self, pid: u32) {
        debug!(
            pid,
            "a Go program had ended before it could be read, or no slot was free"
        );
        if let Some(system) = &mut self.system {
            system.go.missed += 1;
        }
    }
}

/// A process that is ending maps nothing any more.
const fn has_no_files(error: &TargetError) -> bool {
    match error {
        TargetError::Find(FindError::NoAllocator { searched, .. }) => searched.is_empty(),
        _ => false,
    }
}

/// Whether it is too late, or there is no room: nothing about the program itself.
const fn is_missed(error: &TargetError) -> bool {
    matches!(
        error,
        TargetError::Exited(_)
            | TargetError::TooMany(_)
            | TargetError::Process(
                ProcessError::NotFound { .. }
                    | ProcessError::Zombie { .. }
                    | ProcessError::Io { .. }
            )
    ) || has_no_files(error)
}
