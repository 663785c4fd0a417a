//! Metrics for Prometheus and those who read its formats.
//!
//! How many series there are is bounded: sums over all targets have a label with the cause of
//! a loss at most, and series of their own have only so many targets, those that have been
//! traced for longest. A target that has series keeps them for as long as it is traced, so
//! that its counters only grow; those without are counted by `memprof_targets_unlisted`, and
//! are in the sums.

mod out;

use std::{collections::BTreeMap, fmt, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, prometheus_text, text},
    metrics::histogram::Histogram,
    registry::Registry,
};

use self::out::Out;

/// What is told, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// memprof's version.
    pub version: &'static str,
    /// How probes are attached.
    pub probe_mode: &'static str,
    /// Mean sampling gap.
    pub sample_interval_bytes: u64,
    /// Allocations sampled, of all targets that ever were.
    pub samples: u64,
    /// Of them: seen to be freed.
    pub frees: u64,
    /// Losses by cause.
    pub losses: BTreeMap<&'static str, u64>,
    /// Processes taken on.
    pub attached: u64,
    /// Processes that could not be.
    pub failed_to_attach: u64,
    /// How long taking on took in all.
    pub attach_time: Duration,
    /// Distinct stacks known.
    pub known_stacks: u64,
    /// Kernel memory for unwind tables.
    pub unwind_table_bytes: u64,
    /// Sweeps of the live map.
    pub sweeps: u64,
    /// Sweeps that could not read it.
    pub failed_sweeps: u64,
    /// Records of the ring that made no sense.
    pub undecodable_events: u64,
    /// What has become of children, if they are followed.
    pub children: Option<ChildMetrics>,
    /// Calls that were not looked at for want of a slot.
    pub unclaimed_calls: u64,
    /// Go programs that were not read.
    pub missed_go_programs: u64,
    /// Processes that can be traced besides those that are.
    pub free_slots: u64,
    /// The longest that one piece of work has kept others waiting.
    pub longest_round: Duration,
    /// Memory that is taken.
    pub memory: MemoryMetrics,
    /// All targets.
    pub targets: Vec<TargetMetrics>,
    /// What the daemon itself takes.
    pub daemon: DaemonMetrics,
}

/// What memprof takes of the host's memory, and what it gave up to stay below its limit.
#[derive(Clone, Debug, Default)]
pub struct MemoryMetrics {
    /// The limit, if there is one.
    pub max_bytes: Option<u64>,
    /// By kind.
    pub bytes: Vec<(&'static str, u64)>,
    /// How often caches were dropped.
    pub cache_drops: u64,
    /// Ended processes that were forgotten before their time.
    pub forgotten_early: u64,
    /// What there was no room for, and how often.
    pub refused: Vec<(&'static str, u64)>,
}

/// What has become of the children of processes that somebody has named.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChildMetrics {
    /// How many there are or were.
    pub found: u64,
    /// How many have been traced.
    pub traced: u64,
    /// How many have ended before they could be.
    pub missed: u64,
    /// How many have ended while there was no room for them.
    pub refused: u64,
}

/// One target.
#[derive(Clone, Debug, Default)]
pub struct TargetMetrics {
    /// Process id.
    pub pid: u32,
    /// Name of its main thread.
    pub comm: String,
    /// How its calls are looked at.
    pub engine: &'static str,
    /// Where it is in its life.
    pub state: &'static str,
    /// For how long it has been traced.
    pub traced: Duration,
    /// Allocations sampled.
    pub samples: u64,
    /// Estimates.
    pub alloc_bytes: u64,
    /// The same.
    pub alloc_objects: u64,
    /// The same.
    pub inuse_bytes: u64,
    /// The same.
    pub inuse_objects: u64,
    /// Losses of all causes.
    pub losses: u64,
    /// How long attaching took the kernel.
    pub attach_time: Duration,
    /// The longest that it ever stood still for us.
    pub longest_stop: Duration,
}

/// The daemon's own use of the host.
#[derive(Clone, Copy, Debug, Default)]
pub struct DaemonMetrics {
    /// Processor time, in user space and in the kernel.
    pub cpu_time: Duration,
    /// Resident memory.
    pub resident_bytes: u64,
    /// Address space.
    pub virtual_bytes: u64,
    /// Descriptors.
    pub open_fds: u64,
    /// Threads.
    pub threads: u64,
    /// Since when it runs, since 1970.
    pub start_time: Duration,
}

/// How long profiles take, from the request to the last byte.
#[derive(Clone, Debug)]
pub struct DumpTimes(Histogram);

impl Default for DumpTimes {
    fn default() -> Self {
        Self(Histogram::new([
            0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0,
        ]))
    }
}

impl DumpTimes {
    /// One more has been made.
    pub fn observe(&self, time: Duration) {
        self.0.observe(time.as_secs_f64());
    }
}

/// A format of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsFormat {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' text format, which is older.
    Prometheus,
}

impl MetricsFormat {
    /// The better one of those that an `Accept` header names.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        let names_it = |part: &str| {
            let name = part.split(';').next().unwrap_or_default();
            name.trim()
                .eq_ignore_ascii_case("application/openmetrics-text")
        };
        if accept.split(',').any(names_it) {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// What HTTP calls it.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => prometheus_text::CONTENT_TYPE,
        }
    }
}

/// Writes metrics, with series of their own for `max_targets` targets.
///
/// # Errors
///
/// None that is known of; the library's signature has one.
pub fn write(
    format: MetricsFormat,
    metrics: Metrics,
    dumps: &DumpTimes,
    max_targets: usize,
) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape {
        metrics,
        max_targets,
    }));
    registry.register(
        "memprof_dump_seconds",
        "How long profiles take that are asked for over HTTP, windows not counted",
        dumps.0.clone(),
    );
    let mut out = String::new();
    match format {
        MetricsFormat::OpenMetrics => text::encode(&mut out, &registry)?,
        MetricsFormat::Prometheus => prometheus_text::encode(&mut out, &registry)?,
    }
    Ok(out)
}

#[derive(Debug)]
struct Scrape {
    metrics: Metrics,
    max_targets: usize,
}

impl Scrape {
    /// Those that have series of their own: who was first stays first while it is traced.
    fn listed(&self) -> Vec<&TargetMetrics> {
        let mut targets: Vec<&TargetMetrics> = self.metrics.targets.iter().collect();
        targets.sort_by_key(|target| (target.is_over(), std::cmp::Reverse(target.traced)));
        targets.truncate(self.max_targets);
        targets
    }
}

impl TargetMetrics {
    fn is_over(&self) -> bool {
        matches!(self.state, "ended" | "detached")
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(encoder);
        self.sums(&mut out)?;
        self.memory(&mut out)?;
        self.daemon(&mut out)?;
        self.targets(&mut out)
    }
}

impl Scrape {
    fn sums(&self, out: &mut Out<'_>) -> fmt::Result {
        let metrics = &self.metrics;
        let build = [
            ("version", metrics.version),
            ("probe_mode", metrics.probe_mode),
        ];
        out.gauges("memprof_build_info", "Which memprof this is", [(build, 1)])?;
        out.gauge(
            "memprof_sample_interval_bytes",
            "Mean bytes between two samples; 1 is every allocation, 0 is none",
            metrics.sample_interval_bytes,
        )?;
        out.counter(
            "memprof_samples",
            "Sampled allocations, of all targets that ever were",
            metrics.samples,
        )?;
        out.counter(
            "memprof_freed_samples",
            "Sampled allocations that have been freed",
            metrics.frees,
        )?;
        out.counters(
            "memprof_losses",
            "What was lost or came late, by cause, of all targets that ever were",
            metrics.losses.iter().map(|(c, &n)| ([("cause", *c)], n)),
        )?;
        out.counters(
            "memprof_attaches",
            "Processes that were taken on, or could not be",
            [
                ([("result", "attached")], metrics.attached),
                ([("result", "failed")], metrics.failed_to_attach),
            ],
        )?;
        out.counter_f64(
            "memprof_attach_seconds",
            "How long taking processes on took in all",
            metrics.attach_time,
        )?;
        out.gauge(
            "memprof_known_stacks",
            "Distinct stacks known",
            metrics.known_stacks,
        )?;
        out.gauge(
            "memprof_unwind_table_bytes",
            "Kernel memory for unwind tables and lists of mappings",
            metrics.unwind_table_bytes,
        )?;
        out.counter(
            "memprof_sweeps",
            "Sweeps of the live map, after events were lost",
            metrics.sweeps,
        )?;
        out.counter(
            "memprof_failed_sweeps",
            "Sweeps that could not read the live map",
            metrics.failed_sweeps,
        )?;
        out.counter(
            "memprof_unclaimed_calls",
            "Calls of processes that were not looked at, since no slot was free for them",
            metrics.unclaimed_calls,
        )?;
        out.counter(
            "memprof_missed_go_programs",
            "Go programs that were not read, since they had ended or no slot was free",
            metrics.missed_go_programs,
        )?;
        if let Some(children) = metrics.children {
            out.counter(
                "memprof_children_found",
                "Children of the processes that are named",
                children.found,
            )?;
            out.counter(
                "memprof_children_traced",
                "Children that have been traced",
                children.traced,
            )?;
            out.counter(
                "memprof_children_missed",
                "Children that have ended before they could be traced",
                children.missed,
            )?;
            out.counter(
                "memprof_children_refused",
                "Children that have ended while there was no room for them",
                children.refused,
            )?;
        }
        out.gauge(
            "memprof_free_slots",
            "Processes that can be traced besides those that are",
            metrics.free_slots,
        )?;
        out.counter(
            "memprof_undecodable_events",
            "Records of the ring that could not be decoded",
            metrics.undecodable_events,
        )?;
        out.gauge_f64(
            "memprof_longest_round_seconds",
            "The longest that one piece of work has kept the event ring waiting",
            metrics.longest_round,
        )
    }

    fn memory(&self, out: &mut Out<'_>) -> fmt::Result {
        let memory = &self.metrics.memory;
        if let Some(max_bytes) = memory.max_bytes {
            out.gauge(
                "memprof_max_memory_bytes",
                "What memprof may take of the host's memory",
                max_bytes,
            )?;
        }
        out.gauges(
            "memprof_memory_bytes",
            "What memprof takes of the host's memory, by kind; maps as if they were full",
            memory.bytes.iter().map(|(kind, n)| ([("kind", *kind)], *n)),
        )?;
        out.counter(
            "memprof_cache_drops",
            "How often caches were dropped since memory was short",
            memory.cache_drops,
        )?;
        out.counter(
            "memprof_forgotten_early",
            "Ended processes that were forgotten before their time since memory was short",
            memory.forgotten_early,
        )?;
        out.counters(
            "memprof_refused",
            "What was not taken on since memory was short: targets, unwind tables",
            memory
                .refused
                .iter()
                .map(|(what, n)| ([("what", *what)], *n)),
        )
    }

    fn daemon(&self, out: &mut Out<'_>) -> fmt::Result {
        let daemon = &self.metrics.daemon;
        out.counter_f64(
            "process_cpu_seconds",
            "Processor time of the daemon",
            daemon.cpu_time,
        )?;
        out.gauge(
            "process_resident_memory_bytes",
            "Resident memory of the daemon",
            daemon.resident_bytes,
        )?;
        out.gauge(
            "process_virtual_memory_bytes",
            "Address space of the daemon",
            daemon.virtual_bytes,
        )?;
        out.gauge(
            "process_open_fds",
            "Descriptors of the daemon",
            daemon.open_fds,
        )?;
        out.gauge("process_threads", "Threads of the daemon", daemon.threads)?;
        out.gauge_f64(
            "process_start_time_seconds",
            "When the daemon was started, since 1970",
            daemon.start_time,
        )
    }

    fn targets(&self, out: &mut Out<'_>) -> fmt::Result {
        let targets = self.listed();
        let mut states: BTreeMap<&str, u64> = BTreeMap::new();
        for target in &self.metrics.targets {
            *states.entry(target.state).or_default() += 1;
        }
        out.gauges(
            "memprof_targets",
            "Targets by state",
            states.iter().map(|(state, &n)| ([("state", *state)], n)),
        )?;
        let unlisted = self.metrics.targets.len().saturating_sub(targets.len());
        out.gauge(
            "memprof_targets_unlisted",
            "Targets without series of their own, since there are too many",
            unlisted as u64,
        )?;
        let pids: Vec<String> = targets.iter().map(|t| t.pid.to_string()).collect();
        let labels = |place: usize, target: &'_ TargetMetrics| {
            let pid = pids.get(place).cloned().unwrap_or_default();
            [("pid", pid), ("comm", target.comm.clone())]
        };
        let series = |value: fn(&TargetMetrics) -> u64| {
            let targets = targets.iter().enumerate();
            targets
                .map(|(place, target)| (labels(place, target), value(target)))
                .collect::<Vec<_>>()
        };
        let times = |value: fn(&TargetMetrics) -> Duration| {
            let targets = targets.iter().enumerate();
            targets
                .map(|(place, target)| (labels(place, target), value(target).as_secs_f64()))
                .collect::<Vec<_>>()
        };
        out.counters(
            "memprof_target_samples",
            "Sampled allocations of a target",
            series(|target| target.samples),
        )?;
        out.counters(
            "memprof_target_allocated_bytes",
            "Bytes that a target has allocated, estimated",
            series(|target| target.alloc_bytes),
        )?;
        out.counters(
            "memprof_target_allocated_objects",
            "Blocks that a target has allocated, estimated",
            series(|target| target.alloc_objects),
        )?;
        out.gauges(
            "memprof_target_inuse_bytes",
            "Bytes that a target has in use, estimated, of what it allocated while traced",
            series(|target| target.inuse_bytes),
        )?;
        out.gauges(
            "memprof_target_inuse_objects",
            "Blocks that a target has in use, estimated",
            series(|target| target.inuse_objects),
        )?;
        out.counters(
            "memprof_target_losses",
            "What was lost of a target, or came late, of all causes",
            series(|target| target.losses),
        )?;
        out.gauges(
            "memprof_target_attach_seconds",
            "How long attaching to a target took",
            times(|target| target.attach_time),
        )?;
        out.gauges(
            "memprof_target_longest_stop_seconds",
            "The longest that a target stood still while it was changed",
            times(|target| target.longest_stop),
        )?;
        let engines = targets.iter().enumerate().map(|(place, target)| {
            let [pid, comm] = labels(place, target);
            ([pid, comm, ("engine", target.engine.to_owned())], 1)
        });
        out.gauges(
            "memprof_target_info",
            "How a target's calls are looked at",
            engines,
        )
    }
}

#[cfg(test)]
mod tests;
