//! The section about processes that are not traced.

use super::{heading, note, push, ratio};
use crate::bench::report::{ExcludedRow, Outcome};

/// What a process pays beside a daemon for all.
pub(super) fn excluded(out: &mut String, rows: &[ExcludedRow]) {
    heading(
        out,
        "A process beside `memprof daemon -a`: malloc and free, one thread",
        "| | ns a pair | over no daemon | measured | |\n|---|---|---|---|---|",
    );
    for row in rows {
        let ns = row.ns.map(|ns| format!("{:.1}", ns.median));
        let rounds = row.ns.map(|ns| ns.rounds.to_string());
        push(
            out,
            format!(
                "| {} | {} | {} | {} | {} |",
                row.name,
                ns.unwrap_or_default(),
                ratio(row.over_none),
                rounds.unwrap_or_default(),
                note(&Outcome::Measured, &[row.over_none]),
            ),
        );
    }
    push(
        out,
        "\nWhere rules name few, each of these is probed by itself, and nobody else has a probe. Else a library is \
         probed for all who map it, and one that is left out pays the trap."
            .to_owned(),
    );
}
