//! What memprof is held to, judged by the results.

use super::{
    render::{stops::longest, unwinding::slowest},
    report::{Bar, Outcome, PairRow, Report, Verdict},
    stats::Estimate,
    tables::LLVM,
};

/// Bytes in a megabyte.
pub(super) const MB: f64 = 1e6;

/// The pair and malloc tables, by their places in [`super::pair::VARIANTS`].
const ONE_THREAD: usize = 0;
const ALL_CORES: usize = 1;
const MALLOC_ALONE: usize = 2;

/// All bars.
pub(super) fn bars(report: &Report) -> Vec<Bar> {
    let mut bars = vec![added(report, ONE_THREAD), added(report, ALL_CORES)];
    bars.extend(programs(report));
    bars.extend([
        over_floor(
            report,
            ONE_THREAD,
            "malloc and free at the default interval, over the floor",
        ),
        cheaper(report, "bpftrace leak script"),
        cheaper(report, "bcc memleak"),
        over_floor(
            report,
            MALLOC_ALONE,
            "malloc at the default interval, over entries only",
        ),
    ]);
    bars.extend(trace(report));
    bars.extend(dump(report));
    bars.push(stopped(report));
    bars.extend([walked(report), compiled(report), held_once(report)]);
    bars
}

fn bar(name: impl Into<String>, result: Result<(String, bool), String>) -> Bar {
    let (value, verdict) = match result {
        Ok((value, true)) => (value, Verdict::Reached),
        Ok((value, false)) => (value, Verdict::Missed),
        Err(why) => (why, Verdict::NotMeasured),
    };
    Bar {
        name: name.into(),
        value,
        verdict,
    }
}

fn row<'a>(report: &'a Report, table: usize, name: &str) -> Result<&'a PairRow, String> {
    let table = report
        .pair
        .get(table)
        .ok_or("section `pair` was not measured")?;
    let row = table.rows.iter().find(|row| row.name == name);
    let row = row.ok_or_else(|| format!("no row {name}"))?;
    match &row.outcome {
        Outcome::Measured => Ok(row),
        Outcome::Absent(why) | Outcome::Failed(why) => Err(format!("{name}: {why}")),
    }
}

/// The most that the prefilter may add to a malloc and a free, in nanoseconds.
const MOST_ADDED_NS: f64 = 5.0;
/// The most that it may add to a program's time.
const MOST_ADDED: f64 = 1.03;

/// What the prefilter adds to a pair, of the ratio to none and of what a pair takes without.
fn added(report: &Report, table: usize) -> Bar {
    let result = || {
        let ours = row(report, table, "memprof prefilter")?;
        let none = row(report, table, "none")?;
        let (Some(ratio), Some(none)) = (ours.over_none, none.ns) else {
            return Err("no value".to_owned());
        };
        let added = (ratio.median - 1.0) * none.median;
        let spread = ratio.median * ratio.spread * none.median;
        let value = format!("{added:+.1} ± {spread:.1} ns to {:.1} ns", none.median);
        Ok((value, added <= MOST_ADDED_NS))
    };
    let name = report
        .pair
        .get(table)
        .map_or("malloc and free", |table| &table.name);
    bar(
        format!("{name}: the prefilter adds <= {MOST_ADDED_NS} ns at the default interval"),
        result(),
    )
}

/// What the default adds to each program.
fn programs(report: &Report) -> Vec<Bar> {
    if report.programs.is_empty() {
        let why = "section `programs` was not measured".to_owned();
        return vec![bar(
            "programs at the default: <= 1.03 times their time",
            Err(why),
        )];
    }
    report
        .programs
        .iter()
        .map(|program| {
            let row = program
                .rows
                .iter()
                .find(|row| row.name == "memprof, default");
            let result = match row.map(|row| (&row.outcome, row.over_none)) {
                Some((Outcome::Measured, Some(ratio))) => {
                    Ok((ratio_with_spread(ratio), ratio.median <= MOST_ADDED))
                }
                Some((Outcome::Absent(why) | Outcome::Failed(why), _)) => Err(why.clone()),
                _ => Err("no common round".to_owned()),
            };
            bar(
                format!(
                    "{} at the default: <= {MOST_ADDED} times its time",
                    program.name
                ),
                result,
            )
        })
        .collect()
}

fn over_floor(report: &Report, table: usize, what: &str) -> Bar {
    let result = || {
        let row = row(report, table, "memprof session")?;
        if let Some(floor) = &row.floor {
            self::row(report, table, floor)?;
        }
        let ratio = row.over_floor.ok_or("no common round with the floor")?;
        Ok((ratio_with_spread(ratio), ratio.median <= 1.10))
    };
    bar(format!("{what} (session, one thread) <= 1.10"), result())
}

fn ratio_with_spread(ratio: Estimate) -> String {
    let unstable = if ratio.is_stable() {
        ""
    } else {
        ", not stable"
    };
    format!(
        "{:.3} ± {:.3}{unstable}",
        ratio.median,
        ratio.median * ratio.spread
    )
}

fn cheaper(report: &Report, peer: &str) -> Bar {
    let result = || {
        let ours = row(report, ONE_THREAD, "memprof session")
            .or_else(|_| row(report, ONE_THREAD, "memprof auto"))?;
        let theirs = row(report, ONE_THREAD, peer)?;
        let (Some(our_ns), Some(their_ns)) = (ours.ns, theirs.ns) else {
            return Err("no value".to_owned());
        };
        let ratio = their_ns.median / our_ns.median;
        Ok((format!("{ratio:.1} times ({})", ours.name), ratio >= 4.0))
    };
    bar(
        format!("malloc and free at the default interval, cheaper than {peer} by >= 4 times"),
        result(),
    )
}

fn trace(report: &Report) -> [Bar; 3] {
    let missing = || "section `trace` was not measured".to_owned();
    let trace = report.trace.as_ref().ok_or_else(missing);
    let dropped = trace.as_ref().map_err(Clone::clone).map(|trace| {
        let dropped = trace.runs.iter().flat_map(|run| &run.dropped);
        let dropped: u64 = dropped.map(|(_, count)| count).sum();
        let events: u64 = trace.runs.iter().map(|run| run.events).sum();
        (format!("{dropped} of {events} events"), dropped == 0)
    });
    let exact = trace.as_ref().map_err(Clone::clone).map(|trace| {
        let is_exact = |pair: (u64, u64)| pair.0 == pair.1;
        let runs = trace.runs.iter();
        let right = runs.filter(|run| is_exact(run.inuse_objects) && is_exact(run.inuse_bytes));
        let right = right.count();
        let all = trace.runs.len();
        (format!("in {right} of {all} runs"), right == all)
    });
    let share = trace.as_ref().map_err(Clone::clone).map(|trace| {
        let shares = trace.runs.iter().map(|run| run.daemon_cpu_s / run.seconds);
        let most = shares.fold(0.0, f64::max);
        (format!("{most:.2} cores at most"), most < 0.5)
    });
    [
        bar(
            "every allocation of two busy threads: nothing dropped",
            dropped,
        ),
        bar("every allocation of two busy threads: in-use exact", exact),
        bar(
            "every allocation of two busy threads: daemon < 0.5 cores",
            share,
        ),
    ]
}

fn dump(report: &Report) -> [Bar; 3] {
    let missing = || "section `dump` was not measured".to_owned();
    let dump = report.dump.as_ref().ok_or_else(missing);
    let slowest = |seconds: &[f64]| {
        let most = seconds.iter().copied().fold(0.0, f64::max);
        (
            format!("{most:.2} s, the slowest of {}", seconds.len()),
            most < 1.0,
        )
    };
    let json = dump
        .as_ref()
        .map_err(Clone::clone)
        .map(|dump| slowest(&dump.json_s));
    let pprof = dump
        .as_ref()
        .map_err(Clone::clone)
        .map(|dump| slowest(&dump.pprof_s));
    let resident = dump.as_ref().map_err(Clone::clone).map(|dump| {
        let value = format!(
            "{:.0} MB after the dumps, {:.0} MB at its peak",
            dump.rss_bytes as f64 / MB,
            dump.rss_peak_bytes as f64 / MB
        );
        (value, (dump.rss_peak_bytes as f64) < 400.0 * MB)
    });
    [
        bar("a million live blocks of 50,000 stacks: JSON < 1 s", json),
        bar("a million live blocks of 50,000 stacks: pprof < 1 s", pprof),
        bar(
            "a million live blocks of 50,000 stacks: daemon < 400 MB resident",
            resident,
        ),
    ]
}

/// The longest that a process may stand still, in milliseconds.
const MOST_STOPPED_MS: f64 = 20.0;

fn stopped(report: &Report) -> Bar {
    let row = report.stops.iter().max_by_key(|row| row.threads);
    let result = row.map(|row| {
        let (attach, detach) = (longest(&row.stopped_ms), longest(&row.unstopped_ms));
        let value = format!(
            "{attach:.1} ms to attach, {detach:.1} ms to detach, the longest of {} rounds",
            row.stopped_ms.len()
        );
        (
            value,
            attach <= MOST_STOPPED_MS && detach <= MOST_STOPPED_MS,
        )
    });
    bar(
        format!("200 threads, half of them busy: stopped by the prefilter <= {MOST_STOPPED_MS} ms"),
        result.ok_or_else(|| "section `attach` was not measured".to_owned()),
    )
}

/// Frames of the stack that the bar about walks is for.
const WALKED_FRAMES: usize = 30;

fn walked(report: &Report) -> Bar {
    let row = report
        .unwind
        .iter()
        .find(|row| row.frames == Some(WALKED_FRAMES));
    let result = match row.map(|row| row.bpf.ratio) {
        Some(Some(ratio)) => Ok((ratio_with_spread(ratio), ratio.median <= 2.0)),
        Some(None) => Err("no common round with `bpf_get_stack`".to_owned()),
        None => Err("section `unwind` was not measured".to_owned()),
    };
    bar(
        format!(
            "a sample of {WALKED_FRAMES} frames: time in BPF by unwind tables, over bpf_get_stack <= 2"
        ),
        result,
    )
}

fn compiled(report: &Report) -> Bar {
    let row = report.tables.iter().find(|row| row.path == LLVM);
    let result = match row {
        Some(row) => {
            let most = slowest(&row.seconds);
            let value = format!("{most:.3} s, the slowest of {}", row.seconds.len());
            Ok((value, most < 1.0))
        }
        None if report.tables.is_empty() => Err("section `tables` was not measured".to_owned()),
        None => Err("not installed: libllvm14".to_owned()),
    };
    bar(
        "unwind table of libLLVM-14 (110 MB): compiled in < 1 s",
        result,
    )
}

/// Room that the arena has more than its tables need: it grows by a mebibyte, and holds
/// the lists of mappings.
const ARENA_SLACK: u64 = 2 << 20;

fn held_once(report: &Report) -> Bar {
    let result = report.many.as_ref().map(|many| {
        let (held, once, each) = (
            many.all.unwind_table_bytes,
            many.all.files.1,
            many.all.mapped.1,
        );
        let value = format!(
            "{:.1} MB held, {:.1} MB of tables, {:.1} MB if each process had its own",
            held as f64 / MB,
            once as f64 / MB,
            each as f64 / MB
        );
        (value, held <= once + ARENA_SLACK && held < each)
    });
    bar(
        "300 processes: an unwind table is held once, however many map its file",
        result.ok_or_else(|| "section `many` was not measured".to_owned()),
    )
}

#[cfg(test)]
mod tests {
    use super::{super::render::tests::example, *};

    fn verdicts(report: &Report) -> Vec<Verdict> {
        bars(report).iter().map(|bar| bar.verdict).collect()
    }

    /// Check that results below the limits reach the bars, and absent ones are
    /// not measured.
    #[test]
    fn judged() {
        use Verdict::{NotMeasured, Reached};
        let report = example();
        assert_eq!(
            verdicts(&report),
            [
                Reached,
                NotMeasured,
                Reached,
                Reached,
                Reached,
                NotMeasured,
                NotMeasured,
                Reached,
                Reached,
                Reached,
                NotMeasured,
                NotMeasured,
                NotMeasured,
                Reached,
                Reached,
                Reached,
                Reached
            ]
        );
    }

    /// Check that each bar is missed by a result beyond it.
    #[test]
    fn missed() {
        let mut report = example();
        if let Some(ratio) = &mut report.pair[0].rows[2].over_floor {
            ratio.median = 1.2;
        }
        if let Some(trace) = &mut report.trace {
            trace.runs[0].dropped = vec![("alloc_ring_full".to_owned(), 1)];
            trace.runs[0].inuse_bytes.1 += 1;
            trace.runs[0].daemon_cpu_s = 10.0;
        }
        if let Some(ratio) = &mut report.unwind[2].bpf.ratio {
            ratio.median = 2.1;
        }
        report.stops[0].unstopped_ms[2] = 21.0;
        report.tables[0].seconds[1] = 1.1;
        if let Some(many) = &mut report.many {
            many.all.unwind_table_bytes = 4_000_000;
        }
        if let Some(ratio) = &mut report.pair[0].rows[5].over_none {
            ratio.median = 1.6;
        }
        if let Some(ratio) = &mut report.programs[0].rows[0].over_none {
            ratio.median = 1.04;
        }
        let verdicts = verdicts(&report);
        for index in [0, 2, 3, 7, 8, 9, 13, 14, 15, 16] {
            assert_eq!(verdicts[index], Verdict::Missed, "bar {index}");
        }
    }
}
