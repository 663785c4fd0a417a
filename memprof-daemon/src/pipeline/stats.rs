//! What the tracer tells about itself: the body of `GET /v1/stats`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

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
    /// Go programs that were not read, since they had ended or no slot was free.
    pub missed_go_programs: u64,
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
    /// What memprof takes of the host's memory.
    pub memory: MemoryStats,
    /// One entry a target.
    pub processes: Vec<ProcessStats>,
}

/// What memprof takes of the host's memory, and what has been given up for the limit's sake.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct MemoryStats {
    /// The limit; null if there is none.
    pub max_bytes: Option<u64>,
    /// By kind.
    pub bytes: MemoryBytes,
    /// Bytes of the event ring.
    pub ring_bytes: u32,
    /// Sampled blocks that can be live at once.
    pub live_entries: u32,
    /// Stacks that BPF can know at once.
    pub stack_entries: u32,
    /// Calls that can be under way at once.
    pub in_flight_entries: u32,
    /// What stacks may take at this moment; null without a limit.
    pub max_stack_bytes: Option<u64>,
    /// Further stacks are counted as the unknown one, each time as `stacks_full`.
    pub refuses_stacks: bool,
    /// Further processes are not taken on.
    pub refuses_targets: bool,
    /// How often caches were dropped.
    pub cache_drops: u64,
    /// Ended processes that were forgotten before their time.
    pub forgotten_early: u64,
    /// How often a process was not taken on, of those that were asked for.
    pub refused_targets: u64,
    /// How often there was no room for an unwind table or a list of mappings.
    pub refused_tables: u64,
}

/// Bytes by kind: the first three the kernel's or the targets', the others the daemon's.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct MemoryBytes {
    /// BPF's maps at their fullest, and buffers for the kernel's records.
    pub maps: u64,
    /// Unwind tables and lists of mappings.
    pub tables: u64,
    /// What the prefilter has mapped into processes. It is theirs, and not counted for the limit.
    pub prefilter: u64,
    /// Live blocks in the books.
    pub blocks: u64,
    /// Stacks and their counters.
    pub stacks: u64,
    /// What is known of processes.
    pub processes: u64,
    /// Names of functions.
    pub names: u64,
    /// All else.
    pub other: u64,
}

impl MemoryBytes {
    /// Each with its name.
    pub(super) const fn kinds(&self) -> [(&'static str, u64); 8] {
        [
            ("maps", self.maps),
            ("tables", self.tables),
            ("prefilter", self.prefilter),
            ("blocks", self.blocks),
            ("stacks", self.stacks),
            ("processes", self.processes),
            ("names", self.names),
            ("other", self.other),
        ]
    }
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

/// What programs of one process have counted, in sums.
#[derive(Clone, Debug)]
pub(super) struct Counted {
    /// What is told of all processes together.
    pub(super) sums: Sums,
    /// Allocations sampled, by Go's runtime too.
    pub(super) samples: u64,
    /// Estimates.
    pub(super) allocated: StackCounters,
    /// Bytes asked for, if all calls were counted exactly.
    pub(super) exact_bytes: Option<u64>,
    /// When the first was met; none if there was none.
    pub(super) since: Option<Instant>,
}

impl Default for Counted {
    fn default() -> Self {
        Self {
            sums: Sums::default(),
            samples: 0,
            allocated: StackCounters::default(),
            exact_bytes: Some(0),
            since: None,
        }
    }
}

impl Counted {
    /// Adds a later one's.
    pub(super) fn add(&mut self, later: &Self) {
        self.sums.add(&later.sums);
        self.samples += later.samples;
        self.allocated += later.allocated;
        let exact = self.exact_bytes.zip(later.exact_bytes);
        self.exact_bytes = exact.map(|(before, later)| before + later);
        self.since = self.since.or(later.since);
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
    pub(super) fn new(counted: Counted, held: &StackCounters, traced: Duration) -> Self {
        let allocated = Numbers::of(&counted.allocated);
        let held = Numbers::of(held);
        let traced_s = traced.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate is no exact number")]
        let bytes = counted.exact_bytes.unwrap_or(allocated.alloc_bytes) as f64;
        let mut losses = counted.sums.losses;
        losses.retain(|_, number| *number != 0);
        Self {
            traced_s,
            samples: counted.samples,
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
    /// `scanning`, `attaching`, `tracing`, `refused`, `detaching`, `detached` or `ended`.
    pub state: &'static str,
    /// `prefilter`, `uprobe` or `go runtime`.
    pub engine: &'static str,
    /// Why it is `uprobe` although the prefilter was wanted.
    pub engine_reason: Option<String>,
    /// Of a Go program.
    pub go: Option<GoStatus>,
    /// Whose child it is, if it is traced for that.
    pub child_of: Option<u32>,
    /// What it has cost.
    #[serde(flatten)]
    pub cost: Cost,
    /// What its books say.
    #[serde(flatten)]
    pub books: Books,
}

/// What is told of a target that is a Go program.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GoStatus {
    /// The version of Go that built it.
    pub version: String,
    /// Its `runtime.MemProfileRate`, 0 if it has turned profiling off; null if that was never
    /// read.
    pub mem_profile_rate: Option<u64>,
    /// Seconds since its profile was read, or from then to its end; null if it never was.
    pub age_s: Option<f64>,
    /// Seconds since it has published the profile that was read, or from then to its end; null
    /// if it has published none while memprof looked.
    pub published_s: Option<f64>,
    /// Why nothing of it can be read.
    pub refusal: Option<String>,
    /// Why the last try to read it has failed.
    pub failure: Option<String>,
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
    /// Shards of ended threads that the prefilter has given to others to take.
    pub shards_given_back: u64,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that sums of programs begin with the first of them, and that what is not known
    /// of one is not known of all.
    #[test]
    fn programs_add_up() {
        let program = |samples, exact_bytes| Counted {
            sums: Sums {
                alloc_events: samples,
                free_events: 1,
                losses: BTreeMap::from([("ring_full", samples)]),
            },
            samples,
            exact_bytes,
            since: Some(Instant::now()),
            ..Counted::default()
        };
        let mut all = Counted::default();
        let (first, second) = (program(2, Some(10)), program(3, Some(20)));
        all.add(&first);
        all.add(&second);
        assert_eq!((all.samples, all.exact_bytes), (5, Some(30)));
        assert_eq!((all.sums.alloc_events, all.sums.free_events), (5, 2));
        assert_eq!(all.sums.losses["ring_full"], 5);
        assert_eq!(all.since, first.since);
        all.add(&program(1, None));
        all.add(&program(1, Some(1)));
        assert_eq!((all.samples, all.exact_bytes), (7, None));
    }
}
