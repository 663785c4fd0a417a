//! The sections about stacks, and the tables by which they are walked.

use super::{MB, heading, note, push, ratio};
use crate::bench::{
    report::{Many, Outcome, TableRow, Traced, UnwindRow},
    stats::Estimate,
};

/// A sample's stack, walked in two ways.
pub(super) fn walk(out: &mut String, rows: &[UnwindRow]) {
    heading(
        out,
        "One call of malloc, sampled: its stack walked by unwind tables, and by `bpf_get_stack`",
        "| frames | in BPF, ns: tables | `bpf_get_stack` | ratio | in all, ns: tables | `bpf_get_stack` | ratio | measured | |\n\
         |---|---|---|---|---|---|---|---|---|",
    );
    let ns = |estimate: Option<Estimate>| {
        estimate.map_or_else(String::new, |ns| format!("{:.0}", ns.median))
    };
    for row in rows {
        let frames = row.frames.map(|frames| frames.to_string());
        let rounds = row.bpf.ratio.map(|ratio| ratio.rounds.to_string());
        push(
            out,
            format!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                frames.as_deref().unwrap_or("not sampled"),
                ns(row.bpf.tables),
                ns(row.bpf.kernel),
                ratio(row.bpf.ratio),
                ns(row.call.tables),
                ns(row.call.kernel),
                ratio(row.call.ratio),
                rounds.unwrap_or_default(),
                note(&Outcome::Measured, &[row.bpf.ratio, row.call.ratio]),
            ),
        );
    }
    push(
        out,
        "\nThe same C program has unwind information and frame pointers. \"In BPF\" is the run time of memprof's \
         programs by the kernel's clock (`kernel.bpf_stats_enabled`), at entry and return together; \"in all\" is the \
         call as the program sees it, traps included, that clock off."
            .to_owned(),
    );
    if let Some(words) = parts(rows) {
        push(out, words);
    }
}

/// What of a sample is the walk: by the frames that one stack has more than another.
fn parts(rows: &[UnwindRow]) -> Option<String> {
    let (short, long) = (rows.iter().find(|row| row.frames.is_some())?, rows.last()?);
    let more = long
        .frames?
        .checked_sub(short.frames?)
        .filter(|&more| more > 0)? as f64;
    let each = |get: fn(&UnwindRow) -> Option<Estimate>| {
        Some((get(long)?.median - get(short)?.median) / more)
    };
    let tables = each(|row| row.bpf.tables)?;
    let kernel = each(|row| row.bpf.kernel)?;
    let share =
        |row: &UnwindRow| Some(100.0 * tables * row.frames? as f64 / row.call.tables?.median);
    let shares: Vec<String> = rows
        .iter()
        .filter_map(|row| Some(format!("{:.0} % of {} frames", share(row)?, row.frames?)))
        .collect();
    Some(format!(
        "\nA frame takes {tables:.0} ns by tables and {kernel:.0} ns by `bpf_get_stack`, hash included: the slope \
         between {} and {} frames. Of a whole call, frames by tables are {}.",
        short.frames?,
        long.frames?,
        shares.join(", "),
    ))
}

/// Unwind tables of large files.
pub(super) fn tables(out: &mut String, rows: &[TableRow]) {
    heading(
        out,
        "Unwind tables of large files",
        "| file | size | functions | rows | table | compiled in, median and slowest | memory for that |\n\
         |---|---|---|---|---|---|---|",
    );
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / MB);
    for row in rows {
        let median = Estimate::of(&row.seconds).map_or(f64::NAN, |seconds| seconds.median);
        push(
            out,
            format!(
                "| {} | {} | {} | {} | {} | {:.1}, {:.1} ms | {} |",
                row.path,
                mb(row.file_bytes),
                row.functions,
                row.rows,
                mb(row.table_bytes),
                median * 1e3,
                slowest(&row.seconds) * 1e3,
                mb(row.peak_bytes.iter().copied().max().unwrap_or(0)),
            ),
        );
    }
    push(
        out,
        "\nThe memory is the most that was resident beyond what was before: the table, and the pages of the file that \
         were read."
            .to_owned(),
    );
}

/// The most of some times.
pub(in crate::bench) fn slowest(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(0.0, f64::max)
}

/// What a cell tells of some processes.
type Told<'a> = &'a dyn Fn(&Traced) -> String;

/// Many processes under one daemon.
pub(super) fn many(out: &mut String, many: &Many) {
    heading(
        out,
        &format!("{} processes under one daemon", many.all.processes),
        &format!(
            "| what | {} process | {} processes |\n|---|---|---|",
            many.one.processes, many.all.processes
        ),
    );
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / MB);
    let ms = |ms: f64| format!("{ms:.0} ms");
    let of = |(count, bytes): (usize, u64)| format!("{count}: {}", mb(bytes));
    let rows: [(&str, Told<'_>); 11] = [
        ("start of the daemon until all are traced", &|one| {
            ms(one.attach_ms)
        }),
        ("processor time for that", &|one| {
            format!("{:.2} s", one.attach_cpu_s)
        }),
        ("SIGTERM until the daemon has ended", &|one| {
            ms(one.detach_ms)
        }),
        ("files with code, each once: their tables", &|one| {
            of(one.files)
        }),
        (
            "such files, once a process: their tables if they were not shared",
            &|one| of(one.mapped),
        ),
        (
            "unwind tables and lists of mappings, kernel memory",
            &|one| mb(one.unwind_table_bytes),
        ),
        ("other BPF maps, kernel memory", &|one| {
            mb(one.bpf_maps_bytes)
        }),
        ("daemon resident", &|one| mb(one.rss_bytes)),
        ("daemon resident: peak", &|one| mb(one.rss_peak_bytes)),
        ("daemon cores, processes idle", &|one| {
            format!("{:.3}", one.idle_cores)
        }),
        ("kernel memory and daemon, a process more", &|one| {
            if one.processes == many.one.processes {
                return String::new();
            }
            let sum = |traced: &Traced| {
                (traced.unwind_table_bytes + traced.bpf_maps_bytes + traced.rss_bytes) as f64
            };
            let more = (one.processes - many.one.processes) as f64;
            format!("{:.0} kB", (sum(one) - sum(&many.one)) / more / 1e3)
        }),
    ];
    for (what, measured) in rows {
        push(
            out,
            format!(
                "| {what} | {} | {} |",
                measured(&many.one),
                measured(&many.all)
            ),
        );
    }
    push(
        out,
        format!(
            "\nThe processes: {}. Default sampling interval.",
            many.programs
        ),
    );
}
