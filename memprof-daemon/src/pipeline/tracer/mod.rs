//! The task that owns the ledger.
//!
//! Everything that changes the books runs here, one thing after the other:
//! `booking` applies samples and sweeps, `attaching` takes processes on, `life`
//! follows them through exec and exit, `targets` lets them go, `forgetting` ends what is known
//! of them, `marks` counts from a moment on, `shards` has the prefilter's given back,
//! `memory` keeps below the limit,
//! `rules` and `manner` choose among all processes, `children` follows forks,
//! `go_programs` finds Go programs among all, `golang` has their profiles read,
//! `totals` reads what BPF has counted,
//! `reporting` answers those who ask, through a `handle`. What blocks (reading files, attaching) runs
//! elsewhere and comes back as a `Command`.

mod admission;
mod attaching;
mod births;
mod booking;
pub(super) mod children;
mod claims;
mod config;
mod family;
mod forgetting;
mod go_programs;
pub(super) mod golang;
mod handle;
mod life;
mod looked_at;
mod manner;
mod mappings;
mod marks;
mod memory;
pub(super) mod prefilter;
mod reporting;
pub(super) mod rules;
mod shards;
mod slots;
mod system;
mod taking_out;
pub(super) mod targets;
mod totals;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use aya::{
    maps::{Array, HashMap, MapData, PerCpuArray},
    util::nr_cpus,
};
use memprof_common::{
    config::{TargetConfig, Unwind},
    counters::{COUNTERS, TargetCounters},
    stack::{StackKey, StackRecord},
    totals::TargetTotals,
};
use thiserror::Error;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::MissedTickBehavior,
};
use tracing::{error, warn};

pub use self::{
    config::ConfigError,
    handle::TracerHandle,
    system::Everyone,
    targets::{LeaveError, Left},
};
use self::{
    family::Family, forgetting::Stacks, handle::Command, marks::Mark, memory::Memory, slots::Slots,
    system::System,
};
use super::{
    budget::{Budget, Host, MaxMemory, TooLittle, WantedSizes},
    prober::ProberHandle,
    scan::Scanner,
    stack_copies::StackCopies,
    stats::{Attaching, Sums},
    tables::TableStore,
    target::Target,
};
use crate::{
    decode::decode,
    filter::Filters,
    ledger::Ledger,
    probe::{
        live_map::LiveMap,
        loader::{self, LoadError, LoadOptions},
        mode::{ModeChoice, ProbeMode},
        pools::Pools,
        walker::Walker,
    },
    ring::{
        events::EventRing,
        log::LogReader,
        mmap_events::{MmapAlarm, MmapEvents, MmapEventsError, Scope},
    },
    sample::{ImageId, Sample},
    symbolize::SymbolizeHandle,
};

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

/// Commands that may wait. Senders wait when there are more.
const QUEUE: usize = 256;

/// Jobs under way at a time: where every process is traced, a hundred can start at once, and
/// what is traced is to have the processors.
const MAX_JOBS: usize = 8;

/// Records of the ring that are taken before other work gets its turn.
const DRAIN_LIMIT: usize = 4096;

/// After new mappings were looked at, others wait so long: programs that start one after the
/// other keep nobody busy.
const MMAP_REST: Duration = Duration::from_millis(5);

/// How long files that no process maps any more are held, in case that another one does.
const HOLD_FILES: Duration = Duration::from_secs(10);

/// How often what nobody announces is looked after: new mappings, lost events.
const TICK: Duration = Duration::from_millis(100);

/// How many ticks pass between rounds of what costs more: sweeps, and readings
/// of the targets' memory.
const SLOW_TICKS: u32 = 10;

/// The owner of the books, of the maps and of all targets.
pub struct Tracer {
    options: TracerOptions,
    /// The largest sampling interval that was ever in force.
    coarsest_interval_bytes: u64,
    ring: EventRing,
    target_map: Array<MapData, TargetConfig>,
    slot_map: HashMap<MapData, u32, u32>,
    counter_map: PerCpuArray<MapData, TargetCounters>,
    totals_map: PerCpuArray<MapData, TargetTotals>,
    live_map: LiveMap,
    stack_map: HashMap<MapData, StackKey, StackRecord>,
    memory: Memory,
    stacks: Stacks,
    stack_seed: u64,
    mmap_events: MmapEvents,
    mmap_alarm: Option<MmapAlarm>,
    /// Records are left alone until then.
    mmap_rest: Option<Instant>,
    mmap_lost_seen: u64,
    ledger: Ledger,
    targets: BTreeMap<u32, Target>,
    slots: Slots,
    /// Where every process is traced.
    system: Option<System>,
    /// Whose children are followed, if any are.
    family: Option<Family>,
    last_serial: u64,
    /// From one reading of a Go program to the next at least, since there are so many.
    go_rest: Duration,
    /// The process whose memory is asked for next.
    memory_turn: u32,
    /// Processes that are traced with all others and are not to be.
    unwanted: Vec<u32>,
    /// Images that have been replaced and whose books are to be closed.
    replaced: Vec<ImageId>,
    probe_mode: ProbeMode,
    /// Images that were met, with readings of exact totals to be confirmed.
    unconfirmed_totals: Vec<ImageId>,
    prober: ProberHandle,
    scanner: Arc<Scanner>,
    tables: Arc<TableStore>,
    /// Processes with tables that BPF was not told of, and until when it has to be.
    unpublished: BTreeSet<u32>,
    publish_at: Option<Instant>,
    stack_copies: Option<StackCopies>,
    log: Option<LogReader>,
    /// Turns for jobs.
    jobs: Arc<Semaphore>,
    /// For jobs to answer to.
    myself: mpsc::WeakSender<Command>,
    commands: mpsc::Receiver<Command>,
    live: watch::Sender<usize>,
    started: Instant,
    /// The last sweep could not settle everything.
    sweep_again: bool,
    sweeps: u64,
    failed_sweeps: u64,
    undecodable_events: u64,
    missing_stacks: u64,
    work: Work,
    /// Nothing is sampled, whatever the interval.
    is_paused: bool,
    /// Allocations are counted since then, in profiles.
    reset: Option<Arc<Mark>>,
    /// Sums over the targets that have been forgotten.
    forgotten: Sums,
    /// How many these are.
    forgotten_targets: u64,
    /// Losses as they were last told in sums.
    told_losses: BTreeMap<&'static str, u64>,
}

/// How long the tracer's work takes.
#[derive(Debug, Default)]
struct Work {
    /// Lists of mappings that BPF was told, and how long that took.
    lists: u64,
    list_time: Duration,
    /// From a mapping to its table.
    longest_table_delay: Duration,
    /// One turn of the loop.
    longest_round: Duration,
    attaching: Attaching,
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

    async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0_u32;
        let mut batch: Vec<Sample> = Vec::with_capacity(DRAIN_LIMIT);
        loop {
            let mut undecodable = 0;
            // Where waiting ends and work begins.
            let begun;
            let next_child = self.next_child();
            tokio::select! {
                drained = self.ring.drain(DRAIN_LIMIT, |record| match decode(record) {
                    Ok(sample) => batch.push(sample),
                    Err(_) => undecodable += 1,
                }) => {
                    begun = Instant::now();
                    if let Err(error) = drained {
                        // Without its ring the tracer is blind; a sweep at each
                        // tick would still keep in-use right, but say so.
                        error!(%error, "cannot wait for the event ring");
                        tokio::time::sleep(TICK).await;
                    }
                }
                command = self.commands.recv() => match command {
                    Some(Command::Stop { reply }) => {
                        self.settle_hooking().await;
                        self.take_all_out().await;
                        let time = self.prober.detach_all().await;
                        let _ = reply.send(time);
                        return;
                    }
                    Some(command) => {
                        begun = Instant::now();
                        self.serve(command);
                    }
                    None => {
                        self.take_all_out().await;
                        self.prober.detach_all().await;
                        return;
                    }
                },
                result = mapped(self.mmap_alarm.as_ref(), self.mmap_rest) => {
                    begun = Instant::now();
                    if let Err(error) = result {
                        warn!(%error, "new mappings are looked after ten times a second only");
                        self.mmap_alarm = None;
                    }
                    self.drain_mmap_events();
                    self.mmap_rest = Some(Instant::now() + MMAP_REST);
                }
                () = reached(self.publish_at) => {
                    begun = Instant::now();
                    self.publish_ready();
                }
                () = reached(next_child) => {
                    begun = Instant::now();
                    self.take_on_children();
                }
                () = flush_log(&mut self.log) => begun = Instant::now(),
                _ = tick.tick() => {
                    ticks = ticks.wrapping_add(1);
                    begun = Instant::now();
                    self.look_after(ticks.is_multiple_of(SLOW_TICKS));
                }
            }
            self.undecodable_events += undecodable;
            self.apply_all(&batch);
            batch.clear();
            self.bound_blocks();
            self.close_replaced();
            self.let_unwanted_go();
            self.write_stack_copies();
            self.work.longest_round = self.work.longest_round.max(begun.elapsed());
            // There is more, and there will be: let others have their turn, the signal that
            // ends all of this among them.
            tokio::task::yield_now().await;
        }
    }

    fn serve(&mut self, command: Command) {
        match command {
            Command::Attach { pid, holder, reply } => self.begin_attach(pid, holder, reply),
            Command::Scanned { pid, result } => self.scanned(pid, result),
            Command::Rescanned { image, result } => self.rescanned(image, result),
            Command::Found(found) => self.found(found),
            Command::ReadGo { pid, done } => self.read_go_now(pid, &done),
            Command::GoRead(read) => self.go_read(*read),
            Command::AttachDone { pid, batch, result } => self.attach_done(pid, batch, result),
            Command::Hooked(hooked) => self.hooked(*hooked),
            Command::ShardsGivenBack {
                pid,
                serial,
                result,
            } => {
                self.shards_given_back(pid, serial, result);
            }
            Command::Detached { pid, serial, time } => {
                if let Some(target) = self.target_of(pid, serial) {
                    // The thread that detaches may have ended, and all probes with it.
                    target.detach_time = time.or(Some(Duration::ZERO));
                }
            }
            Command::Exited { pid, serial } => self.exited(pid, serial),
            Command::TraceAll { reply } => self.trace_all(reply),
            Command::Swept(swept) => self.swept(&swept),
            Command::Considered(considered) => self.considered(considered),
            Command::Unshared => self.unshared(),
            Command::ChildScanned {
                pid,
                serial,
                result,
            } => self.child_scanned(pid, serial, result),
            Command::Parents(parents) => self.parents_looked(&parents),
            Command::ChildrenSettled { reply } => self.when_settled(reply),
            Command::RuleAttach { pid, result } => self.taken_on_by_rule(pid, result),
            Command::Looked(looked) => self.looked(looked),
            Command::GoAttach { pid, runs, result } => self.go_taken_on(pid, runs, result),
            Command::Shared { file, result } => self.shared(file, result),
            Command::Met { pid, serial, scan } => self.met(pid, serial, scan),
            Command::SlotFree { slot, pid } => {
                tracing::debug!(pid, slot, "the slot is free");
                self.give_back(slot, true);
            }
            Command::Compiled { pid, file, table } => self.compiled(pid, file, table),
            Command::Capture { pid, since, reply } => {
                let capture = self.capture(pid, since.as_deref());
                let _ = reply.send(capture);
            }
            Command::Mark { reply } => {
                let _ = reply.send(Arc::new(self.mark()));
            }
            Command::Reset { reply } => {
                let _ = reply.send(self.reset());
            }
            Command::Detach { pid, reply } => self.detach_for_good(pid, reply),
            Command::TakenOut(taken_out) => self.taken_out(*taken_out),
            Command::Left { pid, serial, time } => self.left(pid, serial, time),
            Command::Processes { reply } => {
                let processes = self.processes();
                let _ = reply.send(processes);
            }
            Command::Config { reply } => {
                let _ = reply.send(self.config());
            }
            Command::SetConfig { change, reply } => {
                let result = self.set_config(change);
                let _ = reply.send(result);
            }
            Command::Stats { reply } => {
                let stats = self.stats();
                let _ = reply.send(stats);
            }
            // Served by the loop, which it ends.
            Command::Stop { reply } => drop(reply),
        }
    }

    /// The regular round.
    fn look_after(&mut self, slow: bool) {
        self.drain_mmap_events();
        // BPF wakes the reader of the ring for little.
        self.drain_ring();
        self.refill();
        self.give_shards_back();
        self.look_after_all(slow);
        self.look_after_children(slow);
        if slow {
            self.scanner.forget_files(HOLD_FILES);
            self.forget_kept();
            self.look_after_memory();
            // Reads the whole live map: not at every tick while events get lost.
            self.sweep_if_lossy();
            self.refresh_memory_in_turn();
            self.read_go_in_turn();
        }
    }

    /// Writes what walks saw since the last time.
    pub(super) fn write_stack_copies(&mut self) {
        if let Some(copies) = &mut self.stack_copies
            && let Err(error) = copies.write()
        {
            error!(%error, "cannot write copies of stacks");
            self.stack_copies = None;
        }
    }

    const fn next_serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    /// Runs `work` where it may block, and has the command it makes served.
    fn spawn_job(&self, work: impl FnOnce() -> Command + Send + 'static) {
        let myself = self.myself.clone();
        let job = move || {
            let command = work();
            if let Some(sender) = myself.upgrade()
                && sender.blocking_send(command).is_err()
            {
                warn!("the tracer ended before a job was done");
            }
        };
        let jobs = Arc::clone(&self.jobs);
        tokio::spawn(async move {
            // It is never closed.
            let turn = jobs.acquire_owned().await;
            // Not given up within the job: its thread would not be free yet for the next one,
            // which would get a new thread.
            let _ = tokio::task::spawn_blocking(job).await;
            drop(turn);
        });
    }

    /// The target's losses, summed over the CPUs.
    fn losses(&self, slot: u16) -> [u64; COUNTERS] {
        let mut sum = [0; COUNTERS];
        match self.counter_map.get(&u32::from(slot), 0) {
            Ok(values) => {
                for counters in values.iter() {
                    for (sum, value) in sum.iter_mut().zip(counters.dropped) {
                        *sum += value;
                    }
                }
            }
            Err(error) => warn!(%error, "cannot read the counters of losses"),
        }
        sum
    }
}

/// Waits for a new mapping, of any process, after a moment's rest; for ever without an alarm.
async fn mapped(alarm: Option<&MmapAlarm>, rest: Option<Instant>) -> io::Result<()> {
    if let Some(rest) = rest.filter(|rest| *rest > Instant::now()) {
        tokio::time::sleep_until(rest.into()).await;
    }
    match alarm {
        Some(alarm) => alarm.recorded().await,
        None => std::future::pending().await,
    }
}

/// Waits for a moment; for ever without one.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Passes on what the BPF side has logged; never returns without a log.
async fn flush_log(log: &mut Option<LogReader>) {
    match log {
        Some(reader) => {
            if let Err(error) = reader.flush().await {
                warn!(%error, "cannot wait for the log of the BPF programs");
                *log = None;
            }
        }
        None => std::future::pending().await,
    }
}

/// Keys the hash of stacks. The standard library's hasher takes its keys from
/// the system's random numbers.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(SystemTime::now())
}
