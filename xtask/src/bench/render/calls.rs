//! The sections about what calls and programs cost.

use super::{capital, heading, note, push, ratio};
use crate::bench::report::{PairTable, ProgramTable};

/// What a call costs under each tool.
pub(super) fn pair(out: &mut String, table: &PairTable) {
    let threads = if table.threads == 1 {
        "thread"
    } else {
        "threads"
    };
    heading(
        out,
        &format!("{} ({} {threads})", capital(&table.name), table.threads),
        &format!(
            "| tool | ns a {} | over none | over its floor | measured | |\n|---|---|---|---|---|---|",
            table.operation
        ),
    );
    for row in &table.rows {
        let ns = row.ns.map_or_else(String::new, |ns| {
            let digits = usize::from(ns.median < 1000.0);
            format!("{:.digits$}", ns.median)
        });
        let rounds = row.ns.map_or_else(String::new, |ns| ns.rounds.to_string());
        push(
            out,
            format!(
                "| {} | {ns} | {} | {} | {rounds} | {} |",
                row.name,
                ratio(row.over_none),
                ratio(row.over_floor),
                note(&row.outcome, &[row.over_none, row.over_floor])
            ),
        );
    }
}

/// What programs cost under each tool.
pub(super) fn program(out: &mut String, table: &ProgramTable) {
    heading(
        out,
        &capital(&table.name),
        "| tool | seconds | work a second | time over none | rounds | |\n|---|---|---|---|---|---|",
    );
    for row in &table.rows {
        let seconds = row
            .seconds
            .map_or_else(String::new, |seconds| format!("{:.3}", seconds.median));
        let rounds = row
            .seconds
            .map_or_else(String::new, |seconds| seconds.rounds.to_string());
        let work = row.throughput.as_ref();
        let work = work.map_or_else(String::new, |(rate, unit)| format!("{rate:.0} {unit}"));
        push(
            out,
            format!(
                "| {} | {seconds} | {work} | {} | {rounds} | {} |",
                row.name,
                ratio(row.over_none),
                note(&row.outcome, &[row.over_none])
            ),
        );
    }
    if let (Some(calls), Some(source)) = (table.calls_per_second, &table.calls_source) {
        push(
            out,
            format!(
                "\n{calls:.0} calls of the allocator a second without a tool, as counted by {source}."
            ),
        );
    }
}
