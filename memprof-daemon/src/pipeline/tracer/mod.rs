//! The task that owns the ledger.
//!
//! Everything that changes the books runs here, one thing after the other:
//! `booking` applies samples and sweeps, `attaching` takes processes on, `life`
//! follows them through exec and exit, `totals` reads what BPF has counted,
//! `reporting` answers those who ask. What blocks (reading files, attaching) runs
//! elsewhere and comes back as a `Command`.

mod attaching;
mod booking;
mod config;
mod life;
mod mappings;
mod reporting;
mod totals;

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray};
use memprof_common::{
    config::{TargetConfig, Unwind},
    counters::{COUNTERS, TargetCounters},
    stack::{StackKey, StackRecord},
    totals::TargetTotals,
};
use thiserror::Error;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::MissedTickBehavior,
};
use tracing::{error, warn};

use self::attaching::{Found, SiteBatch};
use super::{
    capture::Capture,
    prober::ProberHandle,
    scan::{Scan, Scanner},
    stack_copies::StackCopies,
    stats::{ProcessSummary, Stats},
    tables::{FileTable, TableStore},
    target::{AttachReply, Attached, Target, TargetError},
};
use crate::{
    config::Config,
    decode::decode,
    ledger::Ledger,
    probe::{
        attach::AttachError,
        live_map::LiveMap,
        loader::{self, LoadError, LoadOptions, Sizes},
        mode::{ModeChoice, ProbeMode},
        walker::Walker,
    },
    ring::{
        events::EventRing,
        log::LogReader,
        mmap_events::{MmapEvents, MmapEventsError},
    },
    sample::{ImageId, Sample},
};

/// What a tracer is started with.
#[derive(Clone, Debug)]
pub struct TracerOptions {
    /// Mean sampling gap; 1 takes every allocation, 0 none.
    pub sample_interval_bytes: u64,
    /// Frames to keep of a stack.
    pub stack_depth: u32,
    /// Sizes of the BPF maps.
    pub sizes: Sizes,
    /// How to attach the probes.
    pub probe_mode: ModeChoice,
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
    /// The ring or the log cannot be watched, or there is no thread left.
    #[error("cannot set up the tracer")]
    Io(#[from] io::Error),
}

/// What the tracer is asked or told.
pub(super) enum Command {
    Attach {
        pid: u32,
        reply: AttachReply,
    },
    Scanned {
        pid: u32,
        result: Result<Box<Scan>, TargetError>,
    },
    Rescanned {
        image: ImageId,
        result: Result<Box<Scan>, TargetError>,
    },
    Found(Found),
    AttachDone {
        pid: u32,
        batch: SiteBatch,
        result: Result<Duration, AttachError>,
    },
    Detached {
        pid: u32,
        time: Option<Duration>,
    },
    Exited {
        pid: u32,
    },
    Compiled {
        pid: u32,
        file: (u64, u64),
        table: FileTable,
    },
    Capture {
        pid: Option<u32>,
        reply: oneshot::Sender<Capture>,
    },
    Stats {
        reply: oneshot::Sender<Stats>,
    },
    Config {
        reply: oneshot::Sender<Config>,
    },
    SetConfig {
        config: Config,
        reply: oneshot::Sender<Result<Config, MapError>>,
    },
    Processes {
        reply: oneshot::Sender<Vec<ProcessSummary>>,
    },
    Stop {
        reply: oneshot::Sender<Option<Duration>>,
    },
}

/// Commands that may wait. Senders wait when there are more.
const QUEUE: usize = 256;

/// Records of the ring that are taken before other work gets its turn.
const DRAIN_LIMIT: usize = 4096;

/// How often what nobody announces is looked after: new mappings, lost events.
const TICK: Duration = Duration::from_millis(100);

/// How many ticks pass between rounds of what costs more: sweeps, and readings
/// of the targets' memory.
const SLOW_TICKS: u32 = 10;

/// Talks to the tracer.
#[derive(Clone, Debug)]
pub struct TracerHandle {
    commands: mpsc::Sender<Command>,
    live: watch::Receiver<usize>,
}

impl TracerHandle {
    /// Traces a process; returns when its probes are in place.
    ///
    /// # Errors
    ///
    /// [`TargetError`]; nothing of the process stays attached.
    pub async fn attach(&self, pid: u32) -> Result<Attached, TargetError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Attach { pid, reply })
            .await
            .map_err(|_| TargetError::Stopped)?;
        answer.await.map_err(|_| TargetError::Stopped)?
    }

    /// As [`Self::attach`], for a thread outside of the runtime.
    ///
    /// # Errors
    ///
    /// As [`Self::attach`].
    pub fn attach_blocking(&self, pid: u32) -> Result<Attached, TargetError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .blocking_send(Command::Attach { pid, reply })
            .map_err(|_| TargetError::Stopped)?;
        answer.blocking_recv().map_err(|_| TargetError::Stopped)?
    }

    /// Copies the counters of one process or of all; none if the tracer has
    /// ended.
    pub async fn capture(&self, pid: Option<u32>) -> Option<Capture> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Capture { pid, reply })
            .await
            .ok()?;
        answer.await.ok()
    }

    /// What the tracer tells about itself; none if it has ended.
    pub async fn stats(&self) -> Option<Stats> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Stats { reply }).await.ok()?;
        answer.await.ok()
    }

    /// The settings in force; none if the tracer has ended.
    pub async fn config(&self) -> Option<Config> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Config { reply }).await.ok()?;
        answer.await.ok()
    }

    /// Puts settings in force, for all processes or for none; none if the tracer
    /// has ended.
    pub async fn set_config(&self, config: Config) -> Option<Result<Config, MapError>> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::SetConfig { config, reply })
            .await
            .ok()?;
        answer.await.ok()
    }

    /// The processes that are or were traced; none if the tracer has ended.
    pub async fn processes(&self) -> Option<Vec<ProcessSummary>> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Processes { reply })
            .await
            .ok()?;
        answer.await.ok()
    }

    /// Takes every probe off and ends the tracer; how long the kernel took.
    pub async fn stop(&self) -> Option<Duration> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Stop { reply }).await.ok()?;
        answer.await.ok()?
    }

    /// Waits until no traced process is left.
    pub async fn all_exited(&self) {
        let mut live = self.live.clone();
        // An error means that the tracer is gone, and its processes with it.
        let _ = live.wait_for(|&live| live == 0).await;
    }
}

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
    /// Stacks that are in the BPF map and in the ledger.
    learnt: Vec<StackKey>,
    stack_seed: u64,
    mmap_events: MmapEvents,
    mmap_lost_seen: u64,
    ledger: Ledger,
    targets: BTreeMap<u32, Target>,
    next_slot: u16,
    /// Images that have been replaced and whose books are to be closed.
    replaced: Vec<ImageId>,
    probe_mode: ProbeMode,
    /// Images that were met, with readings of exact totals to be confirmed.
    unconfirmed_totals: Vec<ImageId>,
    prober: ProberHandle,
    scanner: Arc<Scanner>,
    tables: Arc<TableStore>,
    stack_copies: Option<StackCopies>,
    log: Option<LogReader>,
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
}

impl Tracer {
    /// Loads the BPF programs and starts the task.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing stays behind in the kernel.
    pub fn start(options: TracerOptions) -> Result<TracerHandle, StartError> {
        let stack_copies = options.stack_copies.as_deref();
        let loaded = loader::load(&LoadOptions {
            sizes: options.sizes,
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
        let mmap_events = MmapEvents::open()?;
        let (sender, commands) = mpsc::channel(QUEUE);
        let (live, live_receiver) = watch::channel(0);
        let log = loaded.log.map(LogReader::new).transpose()?;
        let tracer = Self {
            coarsest_interval_bytes: options.sample_interval_bytes,
            ring: EventRing::new(loaded.maps.events, options.sizes.ring_bytes)?,
            options,
            target_map: loaded.maps.targets,
            slot_map: loaded.maps.slots,
            counter_map: loaded.maps.counters,
            totals_map: loaded.maps.totals,
            live_map: loaded.maps.live,
            stack_map: loaded.maps.stacks,
            learnt: Vec::new(),
            stack_seed: random_seed(),
            mmap_events,
            mmap_lost_seen: 0,
            ledger: Ledger::new(),
            targets: BTreeMap::new(),
            next_slot: 0,
            replaced: Vec::new(),
            probe_mode: loaded.prober.mode(),
            unconfirmed_totals: Vec::new(),
            prober: ProberHandle::spawn(loaded.prober)?,
            scanner: Arc::new(Scanner::new(Arc::clone(&tables))),
            tables,
            stack_copies,
            log,
            myself: sender.downgrade(),
            commands,
            live,
            started: Instant::now(),
            sweep_again: false,
            sweeps: 0,
            failed_sweeps: 0,
            undecodable_events: 0,
            missing_stacks: 0,
        };
        tokio::spawn(tracer.run());
        Ok(TracerHandle {
            commands: sender,
            live: live_receiver,
        })
    }

    async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0_u32;
        let mut batch: Vec<Sample> = Vec::with_capacity(DRAIN_LIMIT);
        loop {
            let mut undecodable = 0;
            tokio::select! {
                drained = self.ring.drain(DRAIN_LIMIT, |record| match decode(record) {
                    Ok(sample) => batch.push(sample),
                    Err(_) => undecodable += 1,
                }) => {
                    if let Err(error) = drained {
                        // Without its ring the tracer is blind; a sweep at each
                        // tick would still keep in-use right, but say so.
                        error!(%error, "cannot wait for the event ring");
                        tokio::time::sleep(TICK).await;
                    }
                }
                command = self.commands.recv() => match command {
                    Some(Command::Stop { reply }) => {
                        let time = self.prober.detach_all().await;
                        let _ = reply.send(time);
                        return;
                    }
                    Some(command) => self.serve(command),
                    None => {
                        self.prober.detach_all().await;
                        return;
                    }
                },
                () = flush_log(&mut self.log) => {}
                _ = tick.tick() => {
                    ticks = ticks.wrapping_add(1);
                    self.look_after(ticks.is_multiple_of(SLOW_TICKS));
                }
            }
            self.undecodable_events += undecodable;
            self.apply_all(&batch);
            batch.clear();
            self.close_replaced();
            self.write_stack_copies();
        }
    }

    fn serve(&mut self, command: Command) {
        match command {
            Command::Attach { pid, reply } => self.begin_attach(pid, reply),
            Command::Scanned { pid, result } => self.scanned(pid, result),
            Command::Rescanned { image, result } => self.rescanned(image, result),
            Command::Found(found) => self.found(found),
            Command::AttachDone { pid, batch, result } => self.attach_done(pid, batch, result),
            Command::Detached { pid, time } => {
                if let Some(target) = self.targets.get_mut(&pid) {
                    target.detach_time = time;
                }
            }
            Command::Exited { pid } => self.exited(pid),
            Command::Compiled { pid, file, table } => self.compiled(pid, file, table),
            Command::Capture { pid, reply } => {
                let capture = self.capture(pid);
                let _ = reply.send(capture);
            }
            Command::Processes { reply } => {
                let processes = self.processes();
                let _ = reply.send(processes);
            }
            Command::Config { reply } => {
                let _ = reply.send(self.config());
            }
            Command::SetConfig { config, reply } => {
                let result = self.set_config(config);
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
        if slow {
            // Reads the whole live map: not at every tick while events get lost.
            self.sweep_if_lossy();
            self.refresh_memory();
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

    /// Runs `work` where it may block, and has the command it makes served.
    fn spawn_job(&self, work: impl FnOnce() -> Command + Send + 'static) {
        let myself = self.myself.clone();
        tokio::task::spawn_blocking(move || {
            let command = work();
            if let Some(sender) = myself.upgrade()
                && sender.blocking_send(command).is_err()
            {
                warn!("the tracer ended before a job was done");
            }
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
