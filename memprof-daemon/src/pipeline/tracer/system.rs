//! Tracing of every process: files with allocators are probed once for all that map them
//! (`shared_files.rs`).
//!
//! Files are found by a look through `/proc` at the start, by the kernel's records about new
//! mappings from then on, and by further looks through `/proc`, which heal what was missed.
//! Processes are found by themselves: the first call of one takes a slot in BPF, and an event
//! tells of it ([`Tracer::claimed`]). From then on it is a target like others, except that no
//! probe is its own. Go programs, which may never make one, are found by the files that they map
//! ([`Tracer::go_mapped`]).

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use aya::maps::MapError;
use memprof_common::config::NO_SLOT;
use tokio::sync::oneshot;
use tracing::warn;

use super::{
    Command, Tracer,
    births::Births,
    go_programs::GoPrograms,
    looked_at::LookedAt,
    rules::{LetGo, OneByOne},
    shared_files::SharedFiles,
};
use crate::{
    pipeline::{
        sweep::{Looked, Swept},
        target::{Target, TargetError},
    },
    ring::mmap_events::{HostEvent, MmapEvent},
};

/// From one look through `/proc` to the next.
const SWEEP_EVERY: Duration = Duration::from_secs(15);

/// Says where processes are probed, once they are.
pub(in crate::pipeline) type StartReply = oneshot::Sender<Result<Everyone, TargetError>>;

/// What is probed in all processes.
#[derive(Clone, Debug)]
pub struct Everyone {
    /// How many sites are probed.
    pub sites: usize,
    /// Files that they are in.
    pub modules: Vec<String>,
    /// How many processes that rules name are traced, if such are probed one by one.
    pub named: Option<usize>,
}

/// What is known of all processes and their files.
pub(super) struct System {
    pub(super) files: SharedFiles,
    /// Files that were mapped and looked at.
    pub(super) looked_at: LookedAt,
    /// Go programs among all processes.
    pub(super) go: GoPrograms,
    /// Processes whose calls are not looked at.
    pub(super) left_alone: BTreeSet<u32>,
    /// Processes that may turn up.
    pub(super) births: Births,
    /// Who waits for all to be probed.
    pub(super) starting: Option<StartReply>,
    is_sweeping: bool,
    pub(super) swept: Instant,
    unclaimed_told: u64,
    /// If processes do not share probes.
    pub(super) one_by_one: Option<OneByOne>,
    /// All are being let go, since they will share probes, or will not any more.
    pub(super) is_changing: bool,
    /// Processes that somebody had let go, and what they ran: rules do not take them on again.
    pub(super) let_go: HashMap<u32, LetGo>,
    /// Rules may ask for the prefilter.
    pub(super) may_write: bool,
}

impl System {
    pub(super) fn new(names_few: bool, may_write: bool) -> Self {
        Self {
            files: SharedFiles::default(),
            looked_at: LookedAt::default(),
            go: GoPrograms::default(),
            left_alone: BTreeSet::new(),
            births: Births::default(),
            starting: None,
            is_sweeping: false,
            swept: Instant::now(),
            unclaimed_told: 0,
            one_by_one: names_few.then(OneByOne::default),
            is_changing: false,
            let_go: HashMap::new(),
            may_write,
        }
    }
}

impl Tracer {
    /// Begins to trace every process.
    pub(super) fn trace_all(&mut self, reply: StartReply) {
        if !self.is_shared() {
            if let Some(system) = &mut self.system {
                system.starting = Some(reply);
            }
            self.look_through_all();
            return;
        }
        let own = std::process::id();
        if let Err(source) = self.set_left_alone(own) {
            let source = Box::new(source);
            let _ = reply.send(Err(TargetError::Map { pid: own, source }));
            return;
        }
        self.fill_stock();
        if let Some(system) = &mut self.system {
            system.starting = Some(reply);
        }
        self.sweep_all();
    }

    /// Has BPF leave the calls of a process alone.
    pub(super) fn set_left_alone(&mut self, pid: u32) -> Result<(), MapError> {
        self.slot_map.insert(pid, NO_SLOT, 0)?;
        if let Some(system) = &mut self.system {
            system.left_alone.insert(pid);
        }
        Ok(())
    }

    /// Looks through all processes, elsewhere.
    pub(super) fn sweep_all(&mut self) {
        let Some(system) = self.system.as_mut().filter(|system| !system.is_sweeping) else {
            return;
        };
        system.is_sweeping = true;
        // Without rules it does not matter who they are.
        let is_ruled = !self.options.filters.is_empty();
        let scanner = self.scanner.clone();
        self.spawn_job(move || Command::Swept(scanner.sweep(is_ruled)));
    }

    /// All processes were looked through.
    pub(super) fn swept(&mut self, swept: &Swept) {
        let now = Instant::now();
        if let Some(system) = &mut self.system {
            system.is_sweeping = false;
            system.let_go.retain(|pid, _| swept.pids.contains(pid));
            system.births.forget_gone(&swept.pids, swept.begun_ns);
        }
        if !self.is_shared() {
            // The rules were others when it began.
            return;
        }
        if let Some((pid, is_in_use)) = swept.hooked
            && !self.may_share_beside(pid, is_in_use)
        {
            return;
        }
        for info in &swept.infos {
            self.decide_about(info);
        }
        self.share_modules(&swept.modules);
        self.go_swept(swept);
        let Some(system) = &mut self.system else {
            return;
        };
        system.swept = now;
        system.files.note_mapped(&swept.mapped_inodes, now);
        let gone: Vec<u32> = system
            .left_alone
            .iter()
            .copied()
            .filter(|pid| !swept.pids.contains(pid))
            .collect();
        for pid in gone {
            system.left_alone.remove(&pid);
            // BPF may have done it.
            let _ = self.slot_map.remove(&pid);
        }
        self.forget_unused_files(now);
        self.tell_started();
    }

    /// Whether probes may be put into files that all processes map, although one has the
    /// prefilter, or did when it was looked at. The kernel would write a breakpoint amid the
    /// jumps there, which crashes the process.
    fn may_share_beside(&mut self, pid: u32, is_in_use: bool) -> bool {
        let Some(system) = &mut self.system else {
            return false;
        };
        if let Some(reply) = system.starting.take() {
            let _ = reply.send(Err(match is_in_use {
                true => TargetError::InUse(pid),
                false => TargetError::HasLeftover(pid),
            }));
            return false;
        }
        // What is probed was probed before it came, and whoever put it in has seen that.
        if !system.files.is_empty() {
            return true;
        }
        warn!(
            pid,
            "nothing is traced as long as the prefilter is in a process: `memprof cleanup -p` \
             takes it out"
        );
        system.swept = Instant::now();
        false
    }

    /// Takes notice of what the kernel has told of processes, those that are not known among
    /// them.
    pub(super) fn note_lives(&mut self, events: Vec<HostEvent>) {
        let Some(system) = &mut self.system else {
            return;
        };
        let mut mapped = Vec::new();
        let mut forked = Vec::new();
        for event in events {
            match event {
                HostEvent::Fork {
                    timestamp_ns,
                    pid,
                    parent,
                } => {
                    system.births.fork(pid, parent, timestamp_ns);
                    forked.push(pid);
                }
                HostEvent::Exec {
                    timestamp_ns,
                    pid,
                    comm,
                } => system.births.exec(pid, comm, timestamp_ns),
                HostEvent::Exit { pid, .. } => system.births.exit(pid),
                HostEvent::Mmap(event) => {
                    system.births.map(&event);
                    mapped.push(event);
                }
            }
        }
        system.births.forget_ended();
        // Those of targets are looked through by themselves.
        mapped.retain(|event| !self.targets.get(&event.pid).is_some_and(Target::is_live));
        if self.is_shared() {
            self.look_at(mapped);
        } else {
            let mapped = mapped.iter().map(|event| event.pid);
            self.look_at_processes(mapped.chain(forked).collect());
        }
    }

    /// Files were mapped by processes that are not known.
    fn look_at(&mut self, events: Vec<MmapEvent>) {
        let Some(system) = &mut self.system else {
            return;
        };
        let (unknown, go) = system.looked_at.sort_out(events);
        if !unknown.is_empty() {
            let scanner = self.scanner.clone();
            self.spawn_job(move || Command::Looked(scanner.look_at(unknown)));
        }
        self.go_mapped(&go);
    }

    /// Files that were mapped were looked at.
    pub(super) fn looked(&mut self, looked: Looked) {
        self.share_modules(&looked.modules);
        let Some(system) = &mut self.system else {
            return;
        };
        let go = system.looked_at.learn(looked.files);
        self.go_mapped(&go);
    }

    /// Tells who waits, once all that was found at first is probed.
    pub(super) fn tell_started(&mut self) {
        let Some(system) = &mut self.system else {
            return;
        };
        let is_settled =
            system.one_by_one.as_ref().is_none_or(OneByOne::is_settled) && system.go.is_settled();
        if system.is_sweeping || system.files.is_attaching() || !is_settled {
            return;
        }
        let Some(reply) = system.starting.take() else {
            return;
        };
        let modules: BTreeSet<String> = system
            .files
            .sites()
            .map(|site| site.module.clone())
            .collect();
        let named = system.one_by_one.is_some().then(|| *self.live.borrow());
        let everyone = Everyone {
            named,
            sites: system.files.sites().count(),
            modules: modules.into_iter().collect(),
        };
        let _ = reply.send(Ok(everyone));
    }

    /// What is to be done now and then.
    pub(super) fn look_after_all(&mut self, slow: bool) {
        self.release_slots();
        let Some(system) = &mut self.system else {
            return;
        };
        let is_due = slow && system.starting.is_none() && system.swept.elapsed() >= SWEEP_EVERY;
        if system.one_by_one.is_some() || system.is_changing {
            self.look_after_rules(slow, is_due);
            return;
        }
        self.fill_stock();
        if slow {
            self.tell_unclaimed();
        }
        if is_due {
            self.sweep_all();
        }
    }

    fn tell_unclaimed(&mut self) {
        let calls = self.slots.unclaimed_calls();
        if let Some(system) = &mut self.system {
            if calls > system.unclaimed_told && system.unclaimed_told == 0 {
                warn!(
                    calls,
                    "calls of processes that no slot was free for were not looked at; told \
                     once, and counted as unclaimed_calls"
                );
            }
            system.unclaimed_told = calls;
        }
    }
}
