//! Rules in force: who is taken on one by one, and who is decided about anew.
//!
//! If all rules that include name some processes ([`names_few`](crate::filter::Filters::names_few)), a probe in a library
//! of every process would be paid by all for the sake of few. So such processes are found, and
//! probed, one by one, and may have the prefilter; others are not touched. Who has turned up is
//! learnt from the kernel's records about new mappings, which a new program makes, and by looks
//! through `/proc`, since a forked child makes none.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    mem,
    time::Instant,
};

use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::{Command, Tracer, system::System};
use crate::{
    causes::with_causes,
    pipeline::{
        install::Holder,
        scan::{Scanner, Wish, monotonic_ns},
        sweep::all_pids,
        target::{Attached, Target, TargetError},
    },
    probe::{find::FindError, mode::ModeChoice},
    process::info::ProcessInfo,
};

/// A process that could not be taken on is tried again, after this, so many times: a new
/// program maps its allocator after what makes it known.
const TRIES: u32 = 10;

/// Processes that were looked at, for [`Tracer::considered`].
#[derive(Debug)]
pub(in crate::pipeline) struct Considered {
    /// Who they are: rules may have changed since, and are asked when this arrives.
    infos: Vec<ProcessInfo>,
    /// All that there are, if all were looked through ...
    all: Option<HashSet<u32>>,
    /// ... from then on.
    begun_ns: u64,
}

/// A process that somebody had let go, or that could not be taken on, and its program.
#[derive(Debug)]
pub(in crate::pipeline) struct LetGo {
    start_ticks: u64,
    exe: String,
}

impl LetGo {
    pub(super) fn of(info: &ProcessInfo) -> Self {
        Self {
            start_ticks: info.start_ticks,
            exe: info.exe.clone(),
        }
    }

    /// Whether it is still that process, and runs that program.
    pub(super) fn is(&self, info: &ProcessInfo) -> bool {
        self.start_ticks == info.start_ticks && self.exe == info.exe
    }
}

/// What is known of processes that are taken on one by one.
#[derive(Debug, Default)]
pub(super) struct OneByOne {
    /// Those that were looked at.
    known: HashSet<u32>,
    /// Those that were looked at since the last tick.
    looked_at: HashSet<u32>,
    /// Those to be looked at at the next tick, whatever is known.
    again: BTreeSet<u32>,
    /// How often a process was tried in vain.
    tried: HashMap<u32, u32>,
    /// Why a process is not traced was said.
    told: HashSet<u32>,
    /// How many are being taken on.
    under_way: usize,
    /// Looks at processes are under way.
    looks: usize,
}

impl OneByOne {
    /// Whether nothing is on its way.
    pub(super) const fn is_settled(&self) -> bool {
        self.under_way == 0 && self.looks == 0
    }
}

impl Tracer {
    /// Whether all processes share probes.
    pub(super) fn is_shared(&self) -> bool {
        self.system
            .as_ref()
            .is_some_and(|system| system.one_by_one.is_none())
    }

    /// Whether they do, or are about to.
    pub(super) fn is_sharing(&self) -> bool {
        self.is_shared()
            && self
                .system
                .as_ref()
                .is_some_and(|system| !system.is_changing)
    }

    /// Whether rules leave a target as it is, given who it is now.
    pub(super) fn is_as_wanted(&self, target: &Target, info: &ProcessInfo) -> bool {
        self.admit(info)
            .is_some_and(|mode| target.is_shared || mode == target.mode)
    }

    /// Asks the rules about a process that shares probes with all others, if it does: its user,
    /// its name or its cgroup may have changed.
    pub(super) fn decide_about(&mut self, info: &ProcessInfo) {
        let pid = info.pid;
        if pid == std::process::id() {
            return;
        }
        let is_wanted = self.admit(info).is_some();
        match self.targets.get_mut(&pid).filter(|target| target.is_live()) {
            Some(target) if is_wanted || !target.is_by_rule => {
                if let Some(image) = target.current()
                    && image.info.start_ticks == info.start_ticks
                    && image.info.exe == info.exe
                {
                    image.info = info.clone();
                }
            }
            Some(_) => self.begin_to_leave(pid),
            None if is_wanted => self.no_longer_left_alone(pid),
            None => {}
        }
    }

    /// Looks again at a process that is not traced, whose program may be another by now, or how
    /// it is to be traced.
    pub(super) fn look_again(&mut self, pid: u32) {
        if let Some(one_by_one) = self.system.as_mut().and_then(one_by_one) {
            one_by_one.again.insert(pid);
        } else if self.is_left_alone(pid)
            && let Some(info) = Scanner::info(pid)
        {
            self.decide_about(&info);
        }
    }

    /// Looks at every process, whatever is known of it.
    pub(super) fn look_through_all(&mut self) {
        self.look(None);
    }

    /// Looks at processes that have mapped a file, which a new program does; at each not
    /// more often than once a tick.
    pub(super) fn look_at_processes(&mut self, mut pids: BTreeSet<u32>) {
        let Some(one_by_one) = self.system.as_mut().and_then(one_by_one) else {
            return;
        };
        for &pid in &pids {
            if !one_by_one.looked_at.insert(pid) {
                one_by_one.again.insert(pid);
            }
        }
        pids.retain(|pid| !one_by_one.again.contains(pid));
        if !pids.is_empty() {
            self.look(Some(pids));
        }
    }

    /// Looks at processes, or at all: reads who they are, elsewhere, and asks the rules.
    fn look(&mut self, pids: Option<BTreeSet<u32>>) {
        let Some(one_by_one) = self.system.as_mut().and_then(one_by_one) else {
            return;
        };
        one_by_one.looks += 1;
        self.spawn_job(move || {
            let begun_ns = monotonic_ns();
            let all: Option<HashSet<u32>> =
                pids.is_none().then(|| all_pids().into_iter().collect());
            let looked_at: Vec<u32> = match (&all, pids) {
                (Some(all), _) => all.iter().copied().collect(),
                (None, pids) => pids.into_iter().flatten().collect(),
            };
            let infos = looked_at.into_iter().filter_map(Scanner::info).collect();
            Command::Considered(Considered {
                infos,
                all,
                begun_ns,
            })
        });
    }

    /// Looks at the processes that are new, elsewhere: forked children map nothing.
    fn look_for_new(&mut self) {
        let Some(one_by_one) = self.system.as_mut().and_then(one_by_one) else {
            return;
        };
        one_by_one.looks += 1;
        let known = one_by_one.known.clone();
        self.spawn_job(move || {
            let begun_ns = monotonic_ns();
            let all: HashSet<u32> = all_pids().into_iter().collect();
            let infos = all
                .difference(&known)
                .filter_map(|&pid| Scanner::info(pid))
                .collect();
            Command::Considered(Considered {
                infos,
                all: Some(all),
                begun_ns,
            })
        });
    }

    /// Processes were looked at: takes on whom rules want, and lets those go that they do not
    /// want any more, or otherwise.
    pub(super) fn considered(&mut self, considered: Considered) {
        let Considered {
            infos,
            all,
            begun_ns,
        } = considered;
        let Some(system) = &mut self.system else {
            return;
        };
        let is_changing = system.is_changing;
        let Some(one_by_one) = &mut system.one_by_one else {
            return;
        };
        one_by_one.looks = one_by_one.looks.saturating_sub(1);
        if let Some(all) = all {
            one_by_one.tried.retain(|pid, _| all.contains(pid));
            one_by_one.told.retain(|pid| all.contains(pid));
            system.let_go.retain(|pid, _| all.contains(pid));
            system.births.forget_gone(&all, begun_ns);
            one_by_one.known = all;
        }
        if is_changing {
            return;
        }
        let own = std::process::id();
        for info in infos.iter().filter(|info| info.pid != own) {
            self.consider(info);
        }
        self.tell_started();
    }

    fn consider(&mut self, info: &ProcessInfo) {
        let pid = info.pid;
        match self.targets.get(&pid).filter(|target| target.is_live()) {
            Some(target) if target.is_by_rule && !self.is_as_wanted(target, info) => {
                self.begin_to_leave(pid);
            }
            Some(_) => {}
            None => {
                if let Some(mode) = self.admit(info) {
                    self.take_on_by_rule(pid, mode);
                }
            }
        }
    }

    fn take_on_by_rule(&mut self, pid: u32, mode: ModeChoice) {
        let Some(one_by_one) = self.system.as_mut().and_then(one_by_one) else {
            return;
        };
        one_by_one.under_way += 1;
        let (reply, answer) = oneshot::channel();
        self.take_on(pid, mode, Holder::Nobody, Wish::Rule, reply);
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let result = answer.await.unwrap_or(Err(TargetError::Stopped));
            if let Some(sender) = myself.upgrade() {
                let _ = sender.send(Command::RuleAttach { pid, result }).await;
            }
        });
    }

    /// A process was taken on since a rule wants it, or could not be.
    pub(super) fn taken_on_by_rule(&mut self, pid: u32, result: Result<Attached, TargetError>) {
        let Some(one_by_one) = self.system.as_mut().and_then(one_by_one) else {
            // The rules share probes among all by now.
            return;
        };
        one_by_one.under_way = one_by_one.under_way.saturating_sub(1);
        match result {
            Ok(_) => {
                one_by_one.tried.remove(&pid);
                // What rules say may be another thing since.
                self.leave_if_left_out(pid);
            }
            Err(error) => {
                let tries = one_by_one.tried.entry(pid).or_default();
                *tries += 1;
                if *tries < TRIES && may_become_fit(&error) {
                    one_by_one.again.insert(pid);
                }
                if is_no_surprise(&error) {
                    debug!(
                        pid,
                        error = with_causes(&error),
                        "not traced, although a rule wants it"
                    );
                } else if one_by_one.told.insert(pid) {
                    warn!(
                        pid,
                        error = with_causes(&error),
                        "not traced, although a rule wants it"
                    );
                }
            }
        }
        self.tell_started();
    }

    /// Lets a process go that rules leave out by now.
    pub(super) fn leave_if_left_out(&mut self, pid: u32) {
        let is_left_out = self.targets.get(&pid).is_some_and(|target| {
            let info = target.images.last().map(|image| &image.info);
            target.is_by_rule
                && target.is_live()
                && info.is_some_and(|info| !self.is_as_wanted(target, info))
        });
        if is_left_out {
            self.begin_to_leave(pid);
        }
    }

    /// What is to be done now and then for processes that are taken on one by one.
    pub(super) fn look_after_rules(&mut self, slow: bool, is_due: bool) {
        self.go_on_changing();
        let Some(system) = &mut self.system else {
            return;
        };
        if system.is_changing {
            return;
        }
        let Some(one_by_one) = one_by_one(system) else {
            return;
        };
        let again = mem::take(&mut one_by_one.again);
        one_by_one.looked_at.clear();
        if is_due {
            system.swept = Instant::now();
            self.look_through_all();
        } else if slow {
            self.look_for_new();
        }
        if !again.is_empty() {
            self.look_at_processes(again);
        }
    }
}

const fn one_by_one(system: &mut System) -> Option<&mut OneByOne> {
    system.one_by_one.as_mut()
}

/// Whether a process that could not be taken on may be fit in a moment: its program begins.
const fn may_become_fit(error: &TargetError) -> bool {
    matches!(
        error,
        TargetError::Find(FindError::NoAllocator { .. })
            | TargetError::Exited(_)
            | TargetError::Prefilter(_)
            | TargetError::Already(_)
    )
}

/// Whether it is what happens to processes that come and go.
const fn is_no_surprise(error: &TargetError) -> bool {
    matches!(
        error,
        TargetError::Find(FindError::NoAllocator { .. })
            | TargetError::Exited(_)
            | TargetError::Already(_)
            | TargetError::Process(_)
            | TargetError::Stopped
    )
}
