//! What the tracer tells about itself: the body of `GET /v1/stats`.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use super::versions::StackVersions;
use crate::{
    export::{
        Numbers,
        totals::{CallTotals, ExactTotals, SizeClass},
    },
    ledger::{EventTally, StackCounters},
    process::origin::Origin,
};

/// The tracer at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// Version of memprof.
    pub version: &'static str,
    /// Seconds since the start.
    pub uptime_s: f64,
    /// How probes are attached.
    pub probe_mode: &'static str,
    /// Mean sampling gap.
    pub sample_interval_bytes: u64,
    /// Distinct stacks known.
    pub known_stacks: usize,
    /// Sweeps of the live map, after events were lost.
    pub sweeps: u64,
    /// Sweeps that could not read the map.
    pub failed_sweeps: u64,
    /// Records of the ring that could not be decoded.
    pub undecodable_events: u64,
    /// Records about mappings that the kernel had no room for.
    pub lost_mapping_events: u64,
    /// Every process is traced.
    pub traces_all: bool,
    /// Children of the processes that are named are traced, too.
    pub follows_children: bool,
    /// What has become of them.
    pub children: ChildTally,
    /// How many more processes can be traced at this moment.
    pub free_slots: usize,
    /// Calls of processes that were not looked at, since no slot was free for them.
    pub unclaimed_calls: u64,
    /// Processes that were traced and have been forgotten.
    pub forgotten_processes: u64,
    /// Stacks that BPF named and did not hold any more.
    pub missing_stacks: u64,
    /// How stacks are walked: `auto`, `dwarf` or `fp`.
    pub unwind: &'static str,
    /// Bytes of kernel memory for unwind tables and lists of mappings.
    pub unwind_table_bytes: u64,
    /// Lists of mappings that BPF was told.
    pub mapping_lists: u64,
    /// Milliseconds that telling them took, in all.
    pub mapping_lists_ms: f64,
    /// The longest that it took from a mapping to the moment at which BPF could walk stacks
    /// through it, in milliseconds.
    pub longest_table_delay_ms: f64,
    /// The longest that one piece of work has kept all others waiting, in milliseconds.
    pub longest_round_ms: f64,
    /// Sums over all targets, also those that have been forgotten.
    pub sums: Sums,
    /// How often processes were attached to, and how long that took.
    #[serde(flatten)]
    pub attaching: Attaching,
    /// One entry a target.
    pub processes: Vec<ProcessStats>,
}

/// Sums that only grow.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sums {
    /// Allocations booked.
    pub alloc_events: u64,
    /// Frees booked.
    pub free_events: u64,
    /// Losses by cause.
    pub losses: BTreeMap<&'static str, u64>,
}

impl Sums {
    /// Adds another's.
    pub(super) fn add(&mut self, other: &Self) {
        self.alloc_events += other.alloc_events;
        self.free_events += other.free_events;
        for (cause, number) in &other.losses {
            *self.losses.entry(cause).or_default() += number;
        }
    }
}

/// What has become of the children of processes that somebody has named, where those are
/// followed. Those that are left out of all sums are on their way, or could not be traced yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChildTally {
    /// How many there are or were.
    pub found: u64,
    /// How many have been traced.
    pub traced: u64,
    /// How many have ended before they could be.
    pub missed: u64,
    /// How many have ended while there was no room for them.
    pub refused: u64,
}

/// How processes were taken on.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Attaching {
    /// Processes that were.
    pub attached: u64,
    /// Processes that could not be.
    pub failed_to_attach: u64,
    /// Milliseconds that attaching took, in all.
    pub attached_ms: f64,
}

/// What a target's books say, in short.
#[derive(Clone, Debug, Serialize)]
pub struct Books {
    /// Seconds that it was traced for.
    pub traced_s: f64,
    /// Allocations sampled.
    pub samples: u64,
    /// Estimate of the blocks allocated.
    pub alloc_objects: u64,
    /// Estimate of the bytes allocated.
    pub alloc_bytes: u64,
    /// Bytes asked for a second, on average: counted exactly if all calls were, else
    /// estimated; null if it was traced for less than a tenth of a second.
    pub alloc_bytes_per_s: Option<f64>,
    /// Estimate of the blocks in use.
    pub inuse_objects: u64,
    /// Estimate of the bytes in use.
    pub inuse_bytes: u64,
    /// Losses by cause; those that there are.
    pub losses: BTreeMap<&'static str, u64>,
}

impl Books {
    pub(super) fn new(
        sums: Sums,
        allocated: &StackCounters,
        held: &StackCounters,
        exact_bytes: Option<u64>,
        traced: Duration,
    ) -> Self {
        let allocated = Numbers::of(allocated);
        let held = Numbers::of(held);
        let traced_s = traced.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate is no exact number")]
        let bytes = exact_bytes.unwrap_or(allocated.alloc_bytes) as f64;
        let mut losses = sums.losses;
        losses.retain(|_, number| *number != 0);
        Self {
            traced_s,
            samples: sums.alloc_events,
            alloc_objects: allocated.alloc_objects,
            alloc_bytes: allocated.alloc_bytes,
            alloc_bytes_per_s: (traced_s >= 0.1).then(|| bytes / traced_s),
            inuse_objects: held.inuse_objects.unsigned_abs(),
            inuse_bytes: held.inuse_bytes.unsigned_abs(),
            losses,
        }
    }
}

/// What is told of a target wherever it is.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessFacts {
    /// Process id.
    pub pid: u32,
    /// Name of its main thread.
    pub comm: String,
    /// `scanning`, `attaching`, `tracing`, `detaching`, `detached` or `ended`.
    pub state: &'static str,
    /// `prefilter` or `uprobe`.
    pub engine: &'static str,
    /// Why it is `uprobe` although the prefilter was wanted.
    pub engine_reason: Option<String>,
    /// Whose child it is, if it is traced for that.
    pub child_of: Option<u32>,
    /// What it has cost.
    #[serde(flatten)]
    pub cost: Cost,
    /// What its books say.
    #[serde(flatten)]
    pub books: Books,
}

/// One target in `GET /v1/processes`.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessSummary {
    /// See there.
    #[serde(flatten)]
    pub facts: ProcessFacts,
    /// Path of its program.
    pub exe: String,
    /// Its user, pid namespaces and cgroup; as yet unknown while it is scanned.
    #[serde(flatten)]
    pub origin: Option<Origin>,
    /// Files with probed functions.
    pub modules: Vec<String>,
}

/// One target in `GET /v1/stats`.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessStats {
    /// See there.
    #[serde(flatten)]
    pub facts: ProcessFacts,
    /// Sites probed.
    pub sites: usize,
    /// One entry a program image.
    pub images: Vec<ImageStats>,
}

/// A time as it is told.
pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What tracing has cost a target, apart from its calls.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// Milliseconds that it was stopped for the last time, by the prefilter.
    pub stopped_ms: f64,
    /// Milliseconds that it was ever stopped at most.
    pub longest_stopped_ms: f64,
    /// Bytes that the prefilter has mapped into it.
    pub image_bytes: u64,
    /// Milliseconds that attaching took the kernel.
    pub attach_ms: f64,
    /// Milliseconds that detaching took the kernel, once it has happened.
    pub detach_ms: Option<f64>,
}

/// One program image: `alloc_events = live + free_events + purged`.
#[derive(Clone, Debug, Serialize)]
pub struct ImageStats {
    /// How many `execve`s came before it.
    pub epoch: u32,
    /// Allocations booked.
    pub alloc_events: u64,
    /// Frees booked.
    pub free_events: u64,
    /// Sampled blocks live.
    pub live: u64,
    /// Live blocks that vanished with the process.
    pub purged: u64,
    /// Frees of blocks that were not in the books.
    pub unmatched_frees: u64,
    /// Frees found out since the address was allocated again.
    pub replaced_allocations: u64,
    /// Allocations found in the live map, not in the ring.
    pub recovered_allocations: u64,
    /// Frees found missing in the live map.
    pub swept_frees: u64,
    /// Frees taken back since a `realloc` failed.
    pub restored_allocations: u64,
    /// Samples that were told so long after code had been replaced that it is not known any
    /// more which they ran in.
    pub late_samples: u64,
    /// Places in replaced files that have no names, since too many such files would have to
    /// be held open.
    pub closed_places: u64,
    /// Buckets of the prefilter's sampled set that have been full: their frees all trap.
    pub overflowed_buckets: u64,
    /// Losses by cause.
    pub dropped_events: BTreeMap<&'static str, u64>,
    /// All calls, counted exactly; null if they are not known.
    pub totals: Option<CallTotals>,
    /// Allocating calls by size; null with `totals`.
    pub size_histogram: Option<Vec<SizeClass>>,
}

impl ImageStats {
    pub(super) fn new(
        epoch: u32,
        live: u64,
        tally: EventTally,
        versions: &StackVersions,
        dropped_events: BTreeMap<&'static str, u64>,
        totals: Option<ExactTotals>,
        overflowed_buckets: u64,
    ) -> Self {
        Self {
            epoch,
            alloc_events: tally.alloc_events,
            free_events: tally.free_events,
            live,
            purged: tally.purged,
            unmatched_frees: tally.unmatched_frees,
            replaced_allocations: tally.replaced_allocations,
            recovered_allocations: tally.recovered_allocations,
            swept_frees: tally.swept_frees,
            restored_allocations: tally.restored_allocations,
            late_samples: versions.late_samples,
            closed_places: versions.closed_places,
            overflowed_buckets,
            dropped_events,
            totals: totals.as_ref().map(|totals| totals.calls),
            size_histogram: totals.map(|totals| totals.size_histogram),
        }
    }
}
