//! What a tracer is started with, and its start.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::util::nr_cpus;
use memprof_common::config::Unwind;
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc, watch};

use super::{
    Tracer, Work, family::Family, forgetting::Stacks, handle::TracerHandle, memory::Memory,
    random_seed, slots::Slots, system::System,
};
use crate::{
    filter::Filters,
    ledger::Ledger,
    pipeline::{
        budget::{Budget, Host, MaxMemory, TooLittle, WantedSizes},
        prober::ProberHandle,
        scan::Scanner,
        stack_copies::StackCopies,
        stats::Sums,
        tables::TableStore,
    },
    probe::{
        loader::{self, LoadError, LoadOptions},
        mode::ModeChoice,
        pools::Pools,
        walker::Walker,
    },
    ring::{
        events::EventRing,
        log::LogReader,
        mmap_events::{MmapEvents, MmapEventsError, Scope},
    },
    symbolize::SymbolizeHandle,
};

/// Commands that may wait. Senders wait when there are more.
const QUEUE: usize = 256;

/// Jobs under way at a time: where every process is traced, a hundred can start at once, and
/// what is traced is to have the processors.
const MAX_JOBS: usize = 8;

/// What a tracer is started with.
#[derive(Clone, Debug)]
pub struct TracerOptions {
    /// Mean sampling gap; 1 takes every allocation, 0 none.
    pub sample_interval_bytes: u64,
    /// Frames to keep of a stack.
    pub stack_depth: u32,
    /// How much memory may be taken.
    pub max_memory: MaxMemory,
    /// Sizes of the BPF maps that are to be what they are, whatever that leaves for others.
    pub sizes: WantedSizes,
    /// How to attach the probes.
    pub probe_mode: ModeChoice,
    /// Functions that are traced beside those of known allocators.
    pub pools: Pools,
    /// Every process is traced that rules let pass, once that is
    /// [asked for](TracerHandle::trace_all).
    pub all: bool,
    /// Those rules.
    pub filters: Filters,
    /// The children of processes that are named are traced, too.
    pub children: bool,
    /// How long what is known of a process is kept after its end; for ever if none.
    pub keep_exited: Option<Duration>,
    /// How long threads may be in the way of the prefilter.
    pub attach_timeout: Duration,
    /// How to walk stacks.
    pub unwind: Unwind,
    /// How BPF goes from frame to frame; the best way if none is named.
    pub walker: Option<Walker>,
    /// Where to write what each walk saw, for tests of the unwinder.
    pub stack_copies: Option<PathBuf>,
    /// Pass on the diagnostics of the BPF side.
    pub bpf_log: bool,
}

/// Why a tracer could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// The BPF object could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The kernel does not tell about new mappings.
    #[error("cannot watch for new executable mappings")]
    MmapEvents(#[from] MmapEventsError),
    /// There is not enough memory for it.
    #[error(transparent)]
    TooLittleMemory(#[from] TooLittle),
    /// All processes are to be traced, and none may be written to unasked.
    #[error("all processes are traced by uprobes, which write to none: not with --probe prefilter")]
    NotByPrefilter,
    /// A rule asks for what is ruled out.
    #[error("a rule asks for the prefilter, and --probe for uprobes, which write to no process")]
    NeverWrites,
    /// The prefilter has no stubs for what the user has named.
    #[error("functions that --function names are traced by uprobes: not with --probe prefilter")]
    PoolsByPrefilter,
    /// The ring or the log cannot be watched, or there is no thread left.
    #[error("cannot set up the tracer")]
    Io(#[from] io::Error),
}

impl Tracer {
    /// Loads the BPF programs and starts the task. It has `names` forgotten if memory is short.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing stays behind in the kernel.
    pub fn start(
        mut options: TracerOptions,
        names: SymbolizeHandle,
    ) -> Result<TracerHandle, StartError> {
        let may_write = options.probe_mode.may_write();
        if options.filters.may_write() && !may_write {
            return Err(StartError::NeverWrites);
        }
        if !options.pools.is_empty() && !options.probe_mode.may_probe() {
            return Err(StartError::PoolsByPrefilter);
        }
        let names_few = options.filters.names_few();
        let system = options.all.then(|| System::new(names_few, may_write));
        if options.all && options.probe_mode.may_write() {
            if !options.probe_mode.may_probe() {
                return Err(StartError::NotByPrefilter);
            }
            options.probe_mode = ModeChoice::Uprobe;
        }
        let host = Host {
            cpus: nr_cpus().map_err(|(_, error)| error)? as u64,
            traces_all: options.all,
        };
        let budget = Budget::new(options.max_memory, &options.sizes, host)?;
        let stack_copies = options.stack_copies.as_deref();
        let loaded = loader::load(&LoadOptions {
            sizes: budget.sizes,
            mode: options.probe_mode,
            bpf_log: options.bpf_log,
            copy_stacks: stack_copies.is_some(),
            walker: options.walker,
        })?;
        let stack_copies = stack_copies
            .zip(loaded.maps.stack_copies)
            .map(|(path, ring)| StackCopies::create(path, ring))
            .transpose()?;
        let tables = Arc::new(TableStore::new(loaded.maps.arena));
        let scanner = Arc::new(Scanner::new(Arc::clone(&tables), &options.pools));
        let family = options.children.then(Family::new);
        let mmap_events = MmapEvents::open(if system.is_some() || family.is_some() {
            Scope::Lives
        } else {
            Scope::Mappings
        })?;
        let (sender, commands) = mpsc::channel(QUEUE);
        let (live, live_receiver) = watch::channel(0);
        let log = loaded.log.map(LogReader::new).transpose()?;
        let mut tracer = Self {
            coarsest_interval_bytes: options.sample_interval_bytes,
            ring: EventRing::new(loaded.maps.events, budget.sizes.ring_bytes)?,
            options,
            target_map: loaded.maps.targets,
            slot_map: loaded.maps.slots,
            counter_map: loaded.maps.counters,
            totals_map: loaded.maps.totals,
            live_map: loaded.maps.live,
            stack_map: loaded.maps.stacks,
            memory: Memory::new(budget, names),
            stacks: Stacks::default(),
            stack_seed: random_seed(),
            mmap_alarm: Some(mmap_events.alarm()?),
            mmap_rest: None,
            mmap_events,
            mmap_lost_seen: 0,
            ledger: Ledger::new(),
            targets: BTreeMap::new(),
            slots: Slots::new(
                loaded.maps.states,
                loaded.maps.free_slots,
                loaded.maps.unclaimed_calls,
                loaded.maps.calls,
            ),
            system,
            family,
            last_serial: 0,
            go_rest: Duration::ZERO,
            memory_turn: 0,
            unwanted: Vec::new(),
            replaced: Vec::new(),
            probe_mode: loaded.prober.mode(),
            unconfirmed_totals: Vec::new(),
            prober: ProberHandle::spawn(loaded.prober)?,
            scanner,
            tables,
            unpublished: BTreeSet::new(),
            publish_at: None,
            stack_copies,
            log,
            jobs: Arc::new(Semaphore::new(MAX_JOBS)),
            myself: sender.downgrade(),
            commands,
            live,
            started: Instant::now(),
            sweep_again: false,
            sweeps: 0,
            failed_sweeps: 0,
            undecodable_events: 0,
            missing_stacks: 0,
            work: Work::default(),
            is_paused: false,
            reset: None,
            forgotten: Sums::default(),
            forgotten_targets: 0,
            told_losses: BTreeMap::new(),
        };
        tracer.look_after_memory();
        let profiles = tracer.memory.profiles();
        tokio::spawn(tracer.run());
        Ok(TracerHandle::new(sender, live_receiver, profiles))
    }
}
