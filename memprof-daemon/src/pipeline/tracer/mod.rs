//! The task that owns the ledger.
//!
//! `starting` makes it, `running` is its loop. Everything that changes the books runs here, one
//! thing after the other:
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
mod running;
mod shards;
mod shared_files;
mod slots;
mod starting;
mod system;
mod taking_out;
pub(super) mod targets;
mod totals;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use memprof_common::{
    config::TargetConfig,
    counters::{COUNTERS, TargetCounters},
    stack::{StackKey, StackRecord},
    totals::TargetTotals,
};
use tokio::sync::{Semaphore, mpsc, watch};
use tracing::{error, warn};

pub use self::{
    config::ConfigError,
    handle::TracerHandle,
    starting::{StartError, TracerOptions},
    system::Everyone,
    targets::{LeaveError, Left},
};
use self::{
    family::Family, forgetting::Stacks, handle::Command, marks::Mark, memory::Memory, slots::Slots,
    system::System,
};
use super::{
    prober::ProberHandle,
    scan::Scanner,
    stack_copies::StackCopies,
    stats::{Attaching, Sums},
    tables::TableStore,
    target::Target,
};
use crate::{
    ledger::Ledger,
    probe::{live_map::LiveMap, mode::ProbeMode},
    ring::{
        events::EventRing,
        log::LogReader,
        mmap_events::{MmapAlarm, MmapEvents},
    },
    sample::ImageId,
};

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

/// Keys the hash of stacks. The standard library's hasher takes its keys from
/// the system's random numbers.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(SystemTime::now())
}
