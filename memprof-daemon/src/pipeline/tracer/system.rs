//! Tracing of every process: files with allocators are probed once for all that map them.
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
use memprof_common::{config::NO_SLOT, function::Function};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::{
    Command, Tracer,
    births::Births,
    go_programs::GoPrograms,
    looked_at::LookedAt,
    rules::{LetGo, OneByOne},
};
use crate::{
    causes::with_causes,
    export::profile::ProbeSite,
    pipeline::{
        sweep::{Looked, Swept},
        target::{Target, TargetError, probed_site, shown_site},
    },
    probe::{
        attach::{AttachError, FileId},
        find::AllocatorModule,
    },
    ring::mmap_events::{HostEvent, MmapEvent},
};

/// From one look through `/proc` to the next.
const SWEEP_EVERY: Duration = Duration::from_secs(15);

/// A file that nobody maps any more is probed so long: holding it keeps its file system
/// busy, and to probe it anew costs milliseconds in which calls are missed.
const KEEP_UNUSED: Duration = Duration::from_secs(30);

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

/// A file that is probed for all.
struct SharedFile {
    /// Holds the file, and so its inode.
    module: AllocatorModule,
    shown: Vec<ProbeSite>,
    state: FileState,
    /// When some process was last known to map it.
    used: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FileState {
    Attaching,
    Probed,
    /// The kernel has refused; it is not asked again while the file is in use.
    Refused,
}

/// What is known of all processes and their files.
pub(super) struct System {
    files: HashMap<FileId, SharedFile>,
    next_site: u16,
    /// Files that were mapped and looked at.
    pub(super) looked_at: LookedAt,
    /// Go programs among all processes.
    pub(super) go: GoPrograms,
    /// Processes whose calls are not looked at.
    pub(super) left_alone: BTreeSet<u32>,
    /// Processes that may turn up.
    pub(super) births: Births,
    /// Who waits for all to be probed.
    starting: Option<StartReply>,
    is_sweeping: bool,
    pub(super) swept: Instant,
    unclaimed_told: u64,
    /// If processes do not share probes.
    pub(super) one_by_one: Option<OneByOne>,
    /// All are being let go, since they will share probes, or will not any more.
    pub(super) is_changing: bool,
    /// Files of which the probes that all share are being taken off.
    pub(super) unsharing: usize,
    /// Processes that somebody had let go, and what they ran: rules do not take them on again.
    pub(super) let_go: HashMap<u32, LetGo>,
    /// Rules may ask for the prefilter.
    pub(super) may_write: bool,
}

impl System {
    pub(super) fn new(names_few: bool, may_write: bool) -> Self {
        Self {
            files: HashMap::new(),
            next_site: 0,
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
            unsharing: 0,
            let_go: HashMap::new(),
            may_write,
        }
    }

    /// Where all are probed.
    pub(super) fn sites(&self) -> impl Iterator<Item = &ProbeSite> {
        let probed = |file: &&SharedFile| file.state == FileState::Probed;
        self.files
            .values()
            .filter(probed)
            .flat_map(|file| &file.shown)
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
        for file in system.files.values_mut() {
            if swept.mapped_inodes.contains(&file.module.file.inode) {
                file.used = now;
            }
        }
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

    /// Takes the probes off files that nobody has mapped for long.
    fn forget_unused_files(&mut self, now: Instant) {
        let Some(system) = &mut self.system else {
            return;
        };
        let unused = system.files.extract_if(|_, file| {
            file.state != FileState::Attaching && now.duration_since(file.used) > KEEP_UNUSED
        });
        for (id, file) in unused {
            info!(path = %file.module.file.path.display(), "nobody maps an allocator any more");
            let prober = self.prober.clone();
            tokio::spawn(async move {
                prober.detach_shared(id).await;
                drop(file);
            });
        }
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

    /// Takes the probes off that all processes share; but not those that are being put on,
    /// for which it has to be called again.
    pub(super) fn share_no_files(&mut self) {
        let Some(system) = &mut self.system else {
            return;
        };
        let settled = system
            .files
            .extract_if(|_, file| file.state != FileState::Attaching);
        for (id, file) in settled {
            system.unsharing += 1;
            let prober = self.prober.clone();
            let myself = self.myself.clone();
            tokio::spawn(async move {
                prober.detach_shared(id).await;
                drop(file);
                if let Some(sender) = myself.upgrade() {
                    let _ = sender.send(Command::Unshared).await;
                }
            });
        }
    }

    /// Whether no file has probes any more that all processes share.
    pub(super) fn shares_nothing(&self) -> bool {
        let shares_nothing = |system: &System| system.files.is_empty() && system.unsharing == 0;
        self.system.as_ref().is_none_or(shares_nothing)
    }

    /// The probes of a file are off.
    pub(super) fn unshared(&mut self) {
        if let Some(system) = &mut self.system {
            system.unsharing = system.unsharing.saturating_sub(1);
        }
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

    /// Probes what is not probed yet of `modules`, for every process.
    pub(super) fn share_modules(&mut self, modules: &[AllocatorModule]) {
        let is_shared = self.is_shared();
        let Some(system) = &mut self.system else {
            return;
        };
        // What was found before a change of rules.
        if !is_shared || system.is_changing {
            return;
        }
        for module in modules {
            let id = (module.file.device, module.file.inode);
            if let Some(known) = system.files.get_mut(&id) {
                known.used = Instant::now();
                continue;
            }
            let mut sites = Vec::new();
            let mut shown = Vec::new();
            for found in &module.sites {
                sites.push(probed_site(module, found, system.next_site));
                system.next_site = system.next_site.wrapping_add(1);
                shown.push(shown_site(module, found));
            }
            let file = SharedFile {
                module: module.clone(),
                shown,
                state: FileState::Attaching,
                used: Instant::now(),
            };
            system.files.insert(id, file);
            let prober = self.prober.clone();
            let myself = self.myself.clone();
            // What keeps the file open must outlive the attaching.
            let keep = module.clone();
            tokio::spawn(async move {
                let result = prober.attach_shared(id, sites).await;
                drop(keep);
                if let Some(sender) = myself.upgrade() {
                    let _ = sender.send(Command::Shared { file: id, result }).await;
                }
            });
        }
    }

    /// A file was probed for all, or could not be.
    pub(super) fn shared(&mut self, id: FileId, result: Result<Duration, AttachError>) {
        let Some(system) = &mut self.system else {
            return;
        };
        let Some(file) = system.files.get_mut(&id) else {
            return;
        };
        let path = file.module.file.path.display();
        match result {
            Ok(time) => {
                info!(%path, sites = file.shown.len(), ?time, "probed for all processes");
                file.state = FileState::Probed;
            }
            Err(error @ AttachError::SeccompOfAny(_)) if system.starting.is_some() => {
                // It is the same for every file.
                if let Some(reply) = system.starting.take() {
                    let _ = reply.send(Err(error.into()));
                }
                return;
            }
            Err(error) => {
                warn!(%path, error = with_causes(&error), "cannot probe an allocator");
                file.state = FileState::Refused;
            }
        }
        self.tell_started();
    }

    /// Tells who waits, once all that was found at first is probed.
    pub(super) fn tell_started(&mut self) {
        let Some(system) = &mut self.system else {
            return;
        };
        let is_attaching = |file: &SharedFile| file.state == FileState::Attaching;
        let is_settled =
            system.one_by_one.as_ref().is_none_or(OneByOne::is_settled) && system.go.is_settled();
        if system.is_sweeping || system.files.values().any(is_attaching) || !is_settled {
            return;
        }
        let Some(reply) = system.starting.take() else {
            return;
        };
        let modules: BTreeSet<String> = system.sites().map(|site| site.module.clone()).collect();
        let named = system.one_by_one.is_some().then(|| *self.live.borrow());
        let everyone = Everyone {
            named,
            sites: system.sites().count(),
            modules: modules.into_iter().collect(),
        };
        let _ = reply.send(Ok(everyone));
    }

    /// Notes what a target's modules mean for it: where it is probed with all others, and
    /// whether one allocator may call another.
    pub(super) fn join_modules(&mut self, pid: u32, modules: &[AllocatorModule]) {
        self.share_modules(modules);
        let Some(target) = self.targets.get_mut(&pid).filter(|target| target.is_live()) else {
            return;
        };
        let nested = target.malloc_files.len() > 1;
        for module in modules {
            let file = &module.file;
            let shown = module.sites.iter().map(|found| shown_site(module, found));
            target.sites.extend(shown);
            target
                .modules
                .insert(file.path.to_string_lossy().into_owned());
            let malloc = Function::Malloc.symbol();
            if module.sites.iter().any(|found| found.is_called(malloc)) {
                target.malloc_files.insert((file.device, file.inode));
            }
        }
        if !nested
            && target.malloc_files.len() > 1
            && let Err(error) = self.tell_bpf(pid)
        {
            warn!(pid, %error, "calls of one allocator by another are counted twice");
        }
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
