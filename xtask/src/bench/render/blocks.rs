//! The sections about what the daemon makes of every allocation.

use super::{MB, heading, push};
use crate::bench::report::{Dump, Trace};

fn losses(dropped: &[(String, u64)]) -> String {
    if dropped.is_empty() {
        return "none".to_owned();
    }
    let words: Vec<String> = dropped
        .iter()
        .map(|(cause, count)| format!("{cause} {count}"))
        .collect();
    words.join(", ")
}

/// Every allocation of busy threads.
pub(super) fn trace(out: &mut String, trace: &Trace) {
    heading(
        out,
        &format!(
            "Every allocation of {} busy threads (probe mode {})",
            trace.threads, trace.probe_mode
        ),
        "| live blocks | calls/s | events booked | dropped | daemon s per million events | daemon cores | \
         in-use objects: program, profile | in-use bytes: program, profile |\n|---|---|---|---|---|---|---|---|",
    );
    for run in &trace.runs {
        push(
            out,
            format!(
                "| {} | {:.0} | {} | {} | {:.2} | {:.2} | {}, {} | {}, {} |",
                run.live,
                run.calls as f64 / run.seconds,
                run.events,
                losses(&run.dropped),
                run.daemon_cpu_s * 1e6 / run.events.max(1) as f64,
                run.daemon_cpu_s / run.seconds,
                run.inuse_objects.0,
                run.inuse_objects.1,
                run.inuse_bytes.0,
                run.inuse_bytes.1
            ),
        );
    }
    push(
        out,
        format!(
            "\nResident memory of the daemon: {:.0} MB with nothing live, then {:.0} bytes for each of {} live blocks \
         of one stack.",
            trace.idle_rss_bytes as f64 / MB,
            trace.rss_bytes_per_block,
            trace.live_blocks
        ),
    );
}

/// A million live blocks.
pub(super) fn dump(out: &mut String, dump: &Dump) {
    heading(
        out,
        &format!(
            "Attach, dump, detach: {} live blocks of {} stacks",
            dump.live, dump.stacks
        ),
        "| what | measured |\n|---|---|",
    );
    let ms = |ms: Option<f64>| ms.map_or_else(|| "not told".to_owned(), |ms| format!("{ms:.1} ms"));
    let all = |seconds: &[f64]| {
        let words: Vec<String> = seconds.iter().map(|one| format!("{one:.2}")).collect();
        format!("{} s", words.join(", "))
    };
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / MB);
    for (what, measured) in [
        ("blocks in the profile", dump.profile_live.to_string()),
        ("stacks the daemon knows", dump.known_stacks.to_string()),
        ("dropped events on the way", losses(&dump.dropped)),
        ("sites probed", dump.sites.to_string()),
        (
            "attach: start of the daemon until it listens",
            ms(Some(dump.attach_clock_ms)),
        ),
        ("attach: what the daemon tells", ms(dump.attach_ms)),
        (
            "detach: SIGTERM until the daemon has ended, program going on",
            ms(Some(dump.detach_clock_ms)),
        ),
        (
            "detach: what the daemon tells, program ended",
            ms(dump.detach_ms),
        ),
        ("JSON, one after the other", all(&dump.json_s)),
        ("size of the JSON", mb(dump.json_bytes)),
        ("pprof, one after the other", all(&dump.pprof_s)),
        ("size of the pprof file", mb(dump.pprof_bytes)),
        ("daemon resident: nothing live", mb(dump.idle_rss_bytes)),
        ("daemon resident: all booked", mb(dump.loaded_rss_bytes)),
        ("daemon resident: after the dumps", mb(dump.rss_bytes)),
        ("daemon resident: peak", mb(dump.rss_peak_bytes)),
        ("BPF maps, kernel memory", mb(dump.bpf_maps_bytes)),
    ] {
        push(out, format!("| {what} | {measured} |"));
    }
}
