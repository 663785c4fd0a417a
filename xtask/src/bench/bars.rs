//! What memprof is held to, judged by the results.

use super::report::{Bar, Outcome, PairRow, Report, Verdict};

/// Bytes in a megabyte.
pub(super) const MB: f64 = 1e6;

/// The pair and malloc tables, by their places in [`super::pair::VARIANTS`].
const ONE_THREAD: usize = 0;
const MALLOC_ALONE: usize = 2;

/// All bars.
pub(super) fn bars(report: &Report) -> Vec<Bar> {
    let mut bars = vec![
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
    ];
    bars.extend(trace(report));
    bars.extend(dump(report));
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

fn over_floor(report: &Report, table: usize, what: &str) -> Bar {
    let result = || {
        let row = row(report, table, "memprof session")?;
        if let Some(floor) = &row.floor {
            self::row(report, table, floor)?;
        }
        let ratio = row.over_floor.ok_or("no common round with the floor")?;
        let unstable = if ratio.is_stable() {
            ""
        } else {
            ", not stable"
        };
        let value = format!(
            "{:.3} ± {:.3}{unstable}",
            ratio.median,
            ratio.median * ratio.spread
        );
        Ok((value, ratio.median <= 1.10))
    };
    bar(format!("{what} (session, one thread) <= 1.10"), result())
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
                Reached,
                NotMeasured,
                NotMeasured,
                Reached,
                Reached,
                Reached,
                NotMeasured,
                NotMeasured,
                NotMeasured
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
        let verdicts = verdicts(&report);
        for index in [0, 4, 5, 6] {
            assert_eq!(verdicts[index], Verdict::Missed, "bar {index}");
        }
    }
}
