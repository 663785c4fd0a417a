//! From what the tracer tells about itself to metrics, with what the daemon takes.

use std::{fs, time::Duration};

use nix::sys::resource::{UsageWho, getrusage};

use super::stats::{ChildTally, MemoryStats, ProcessFacts, ProcessStats, Stats};
use crate::{
    export::metrics::{ChildMetrics, DaemonMetrics, MemoryMetrics, Metrics, TargetMetrics},
    process::info::{ProcessInfo, read_memory, read_status, status_field},
};

/// The metrics that follow from statistics.
pub(super) fn metrics(stats: Stats) -> Metrics {
    Metrics {
        version: stats.version,
        probe_mode: stats.probe_mode,
        sample_interval_bytes: stats.sample_interval_bytes,
        samples: stats.sums.alloc_events,
        frees: stats.sums.free_events,
        losses: stats.sums.losses,
        attached: stats.attaching.attached,
        failed_to_attach: stats.attaching.failed_to_attach,
        attach_time: duration(stats.attaching.attached_ms),
        known_stacks: stats.known_stacks as u64,
        unwind_table_bytes: stats.unwind_table_bytes,
        sweeps: stats.sweeps,
        failed_sweeps: stats.failed_sweeps,
        undecodable_events: stats.undecodable_events,
        children: stats.follows_children.then(|| children(stats.children)),
        unclaimed_calls: stats.unclaimed_calls,
        missed_go_programs: stats.missed_go_programs,
        free_slots: stats.free_slots as u64,
        longest_round: duration(stats.longest_round_ms),
        memory: memory(&stats.memory),
        targets: stats.processes.into_iter().map(target).collect(),
        daemon: daemon(),
    }
}

fn memory(stats: &MemoryStats) -> MemoryMetrics {
    MemoryMetrics {
        max_bytes: stats.max_bytes,
        bytes: stats.bytes.kinds().to_vec(),
        cache_drops: stats.cache_drops,
        forgotten_early: stats.forgotten_early,
        refused: vec![
            ("target", stats.refused_targets),
            ("table", stats.refused_tables),
        ],
    }
}

fn target(process: ProcessStats) -> TargetMetrics {
    let ProcessFacts {
        pid,
        comm,
        state,
        engine,
        cost,
        books,
        ..
    } = process.facts;
    TargetMetrics {
        pid,
        comm,
        engine,
        state,
        traced: Duration::try_from_secs_f64(books.traced_s).unwrap_or_default(),
        samples: books.samples,
        alloc_bytes: books.alloc_bytes,
        alloc_objects: books.alloc_objects,
        inuse_bytes: books.inuse_bytes,
        inuse_objects: books.inuse_objects,
        losses: books.losses.values().sum(),
        attach_time: duration(cost.attach_ms),
        longest_stop: duration(cost.longest_stopped_ms),
    }
}

const fn children(tally: ChildTally) -> ChildMetrics {
    ChildMetrics {
        found: tally.found,
        traced: tally.traced,
        missed: tally.missed,
        refused: tally.refused,
    }
}

fn duration(milliseconds: f64) -> Duration {
    Duration::try_from_secs_f64(milliseconds / 1e3).unwrap_or_default()
}

/// What this process takes; 0 for what the kernel does not tell.
fn daemon() -> DaemonMetrics {
    let pid = std::process::id();
    let cpu_time = getrusage(UsageWho::RUSAGE_SELF).map_or(Duration::ZERO, |usage| {
        let time = usage.user_time() + usage.system_time();
        let seconds = u64::try_from(time.tv_sec()).unwrap_or_default();
        let micros = u64::try_from(time.tv_usec()).unwrap_or_default();
        Duration::from_secs(seconds) + Duration::from_micros(micros)
    });
    let memory = read_memory(pid).ok();
    let status = read_status(pid).unwrap_or_default();
    let start = ProcessInfo::read(pid).ok().and_then(|info| {
        let start = info.start_time;
        start.duration_since(std::time::UNIX_EPOCH).ok()
    });
    DaemonMetrics {
        cpu_time,
        resident_bytes: memory.map_or(0, |memory| memory.rss_bytes),
        virtual_bytes: memory.map_or(0, |memory| memory.virtual_bytes),
        // One of them is this reading's.
        open_fds: fs::read_dir("/proc/self/fd")
            .map_or(0, |fds| fds.count().saturating_sub(1) as u64),
        threads: status_field(&status, "Threads:").unwrap_or_default(),
        start_time: start.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that the kernel tells all of it of this process.
    #[test]
    fn of_this_process() {
        let this = daemon();
        assert!(this.cpu_time > Duration::ZERO);
        assert!(this.resident_bytes > 0 && this.virtual_bytes > this.resident_bytes);
        assert!(this.open_fds >= 3 && this.threads >= 1);
        assert!(this.start_time > Duration::from_secs(1_500_000_000));
    }
}
