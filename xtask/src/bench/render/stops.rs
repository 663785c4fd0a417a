//! The section about how long processes stand still.

use super::{heading, push};
use crate::bench::{report::StopRow, stats::median};

/// Attaching to processes of many threads, and detaching.
pub(super) fn stops(out: &mut String, rows: &[StopRow]) {
    heading(
        out,
        "Stopped time of the prefilter, in ms: the median, and the longest",
        "| threads | stopped to attach | attached after | stopped to detach | detached after | rounds |\n\
         |---|---|---|---|---|---|",
    );
    for row in rows {
        let cell = |values: &[f64], digits: usize| {
            let (median, most) = (median(values).unwrap_or(f64::NAN), longest(values));
            format!("{median:.digits$}, {most:.digits$}")
        };
        push(
            out,
            format!(
                "| {}, {} of them busy | {} | {} | {} | {} | {} |",
                row.threads,
                row.busy,
                cell(&row.stopped_ms, 1),
                cell(&row.attach_ms, 0),
                cell(&row.unstopped_ms, 1),
                cell(&row.detach_ms, 0),
                row.stopped_ms.len()
            ),
        );
    }
    push(
        out,
        "\nOf each attach and detach the longest stop counts, by memprof's own clock: from the moment at which the \
         first thread is asked to stop until the last goes on. \"After\" is from the start of the daemon until it \
         listens, and from SIGTERM until it has ended. Busy threads allocate and free without a pause; the others \
         sleep."
            .to_owned(),
    );
}

/// The longest.
pub(in crate::bench) fn longest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}
