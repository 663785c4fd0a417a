//! docs/benchmarks.md from the results.

mod blocks;
mod calls;
mod excluded;
pub(super) mod stops;
pub(super) mod unwinding;

use std::fmt::Write as _;

use super::{
    bars::{MB, bars},
    report::{Outcome, Report, Verdict},
    stats::Estimate,
};

/// The page.
pub(super) fn markdown(report: &Report) -> String {
    let mut out = String::from(
        "# Benchmarks\n\n<!-- Written by `cargo xtask bench`; do not edit. `cargo xtask bench --render FILE` \
         writes it again from results. -->\n\n",
    );
    let host = &report.host;
    let how = if report.quick {
        ", with `--quick`: rough numbers"
    } else {
        ""
    };
    push(
        &mut out,
        format!(
            "Measured {} in {:.0} s{how}, on {} with {} logical processors, Linux {}, {}. memprof is of commit {}.\n",
            host.date,
            report.duration_s,
            host.machine,
            host.cpus,
            host.kernel,
            host.libc,
            host.commit
        ),
    );
    push(&mut out,
        "Every number is a median of interleaved rounds; ± is half its 95 % confidence interval. A ratio is \
         taken within each round, of measurements that follow each other. \"Not stable\" is a ratio whose \
         interval is 3 % of it or wider, or that has fewer than 5 rounds.\n".to_owned(),
    );
    heading(&mut out, "Bars", "| bar | measured | |\n|---|---|---|");
    for bar in bars(report) {
        let verdict = match bar.verdict {
            Verdict::Reached => "reached",
            Verdict::Missed => "**missed**",
            Verdict::NotMeasured => "not measured",
        };
        push(
            &mut out,
            format!("| {} | {} | {verdict} |", bar.name, cell(&bar.value)),
        );
    }
    for table in &report.pair {
        calls::pair(&mut out, table);
    }
    for table in &report.programs {
        calls::program(&mut out, table);
    }
    if let Some(results) = &report.trace {
        blocks::trace(&mut out, results);
    }
    if let Some(results) = &report.dump {
        blocks::dump(&mut out, results);
    }
    if !report.stops.is_empty() {
        stops::stops(&mut out, &report.stops);
    }
    if !report.unwind.is_empty() {
        unwinding::walk(&mut out, &report.unwind);
    }
    if !report.tables.is_empty() {
        unwinding::tables(&mut out, &report.tables);
    }
    if let Some(results) = &report.many {
        unwinding::many(&mut out, results);
    }
    if !report.excluded.is_empty() {
        excluded::excluded(&mut out, &report.excluded);
    }
    if !report.failures.is_empty() {
        heading(&mut out, "Failed", "| section | reason |\n|---|---|");
        for failure in &report.failures {
            push(
                &mut out,
                format!("| {} | {} |", failure.section, cell(&failure.reason)),
            );
        }
    }
    heading(&mut out, "Versions", "| | |\n|---|---|");
    for version in &host.versions {
        push(
            &mut out,
            format!("| {} | {} |", version.name, cell(&version.version)),
        );
    }
    out
}

fn push(out: &mut String, line: String) {
    out.push_str(&line);
    out.push('\n');
}

fn heading(out: &mut String, title: &str, table: &str) {
    push(out, format!("\n## {title}\n\n{table}"));
}

/// Text that does not end a table's cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn ratio(estimate: Option<Estimate>) -> String {
    estimate.map_or_else(String::new, |estimate| {
        let digits = if estimate.median < 10.0 { 2 } else { 0 };
        let half = estimate.median * estimate.spread;
        if estimate.rounds < 2 {
            return format!("{:.digits$}", estimate.median);
        }
        format!("{:.digits$} ± {half:.digits$}", estimate.median)
    })
}

/// What is to be said of a row beside its numbers.
fn note(outcome: &Outcome, ratios: &[Option<Estimate>]) -> String {
    match outcome {
        Outcome::Absent(why) => format!("absent: {}", cell(why)),
        Outcome::Failed(why) => format!("**error**: {}", cell(why)),
        Outcome::Measured if ratios.iter().flatten().any(|ratio| !ratio.is_stable()) => {
            "not stable".to_owned()
        }
        Outcome::Measured => String::new(),
    }
}

fn capital(text: &str) -> String {
    let mut out = String::new();
    let mut letters = text.chars();
    if let Some(first) = letters.next() {
        let _ = write!(out, "{}{}", first.to_uppercase(), letters.as_str());
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::{
        super::{report::*, tables::LLVM},
        *,
    };

    fn estimate(median: f64) -> Option<Estimate> {
        Some(Estimate {
            median,
            spread: 0.01,
            rounds: 9,
        })
    }

    fn row(name: &str, ns: f64, floor: Option<(&str, f64)>) -> PairRow {
        PairRow {
            name: name.to_owned(),
            outcome: Outcome::Measured,
            ns: estimate(ns),
            over_none: estimate(ns / 10.0),
            floor: floor.map(|(name, _)| name.to_owned()),
            over_floor: floor.and_then(|(_, ratio)| estimate(ratio)),
        }
    }

    fn cost(ns: f64, ratio: f64) -> UnwindCost {
        UnwindCost {
            tables: estimate(ns * ratio),
            kernel: estimate(ns),
            ratio: estimate(ratio),
        }
    }

    fn traced(processes: usize) -> Traced {
        Traced {
            processes,
            attach_ms: 300.0,
            attach_cpu_s: 0.2,
            files: (2, 500_000),
            mapped: (2 * processes, 500_000 * processes as u64),
            unwind_table_bytes: 1_000_000,
            bpf_maps_bytes: 200_000_000,
            rss_bytes: 30_000_000 + processes as u64 * 10_000,
            rss_peak_bytes: 50_000_000,
            idle_cores: 0.01,
            detach_ms: 100.0,
        }
    }

    /// Results with a floor, a peer, one that is absent, and no section `dump`.
    pub(in super::super) fn example() -> Report {
        let mut memleak = row("bcc memleak", 0.0, None);
        memleak.outcome = Outcome::Absent("not installed: bpfcc-tools".to_owned());
        (memleak.ns, memleak.over_none) = (None, None);
        Report {
            schema: SCHEMA.to_owned(),
            host: Host {
                date: "2026-01-02T03:04:05Z".to_owned(),
                machine: "a machine".to_owned(),
                cpus: 2,
                kernel: "6.18".to_owned(),
                libc: "glibc 2.36".to_owned(),
                commit: "0123456789ab".to_owned(),
                versions: Vec::new(),
            },
            quick: true,
            duration_s: 100.0,
            pair: vec![PairTable {
                name: "malloc and free".to_owned(),
                operation: "pair".to_owned(),
                threads: 1,
                rows: vec![
                    row("none", 10.0, None),
                    row("floor session", 1000.0, None),
                    row("memprof session", 1050.0, Some(("floor session", 1.05))),
                    row("bpftrace leak script", 9000.0, None),
                    memleak,
                    row("memprof prefilter", 13.0, None),
                ],
            }],
            programs: vec![ProgramTable {
                name: "a program".to_owned(),
                calls_per_second: None,
                calls_source: None,
                rows: vec![ProgramRow {
                    name: "memprof, default".to_owned(),
                    outcome: Outcome::Measured,
                    seconds: None,
                    throughput: None,
                    over_none: Some(Estimate {
                        median: 1.02,
                        ..row("none", 10.0, None).ns.unwrap()
                    }),
                }],
            }],
            trace: Some(Trace {
                threads: 2,
                probe_mode: "session".to_owned(),
                runs: vec![TraceRun {
                    live: 10,
                    seconds: 2.0,
                    calls: 100,
                    events: 100,
                    dropped: Vec::new(),
                    daemon_cpu_s: 0.5,
                    inuse_objects: (10, 10),
                    inuse_bytes: (160, 160),
                }],
                idle_rss_bytes: 1,
                live_blocks: 1,
                rss_bytes_per_block: 1.0,
            }),
            dump: None,
            stops: vec![StopRow {
                threads: 200,
                busy: 100,
                stopped_ms: vec![3.0, 5.0, 4.0],
                attach_ms: vec![20.0, 30.0, 25.0],
                unstopped_ms: vec![2.0, 2.5, 3.0],
                detach_ms: vec![40.0, 50.0, 45.0],
            }],
            unwind: [(None, 70.0), (Some(10), 1000.0), (Some(30), 3000.0)]
                .map(|(frames, ns)| UnwindRow {
                    frames,
                    bpf: cost(ns, 1.5),
                    call: cost(ns + 1000.0, 1.25),
                })
                .into(),
            tables: vec![TableRow {
                path: LLVM.to_owned(),
                file_bytes: 107_000_000,
                functions: 95_000,
                rows: 950_000,
                table_bytes: 7_900_000,
                peak_bytes: vec![30_000_000, 31_000_000],
                seconds: vec![0.05, 0.06],
            }],
            many: Some(Many {
                programs: "300 times a program".to_owned(),
                one: traced(1),
                all: traced(300),
            }),
            excluded: [
                ("no daemon", 12.0, None),
                ("left out", 1200.0, Some(cost(1.0, 100.0).ratio)),
            ]
            .map(|(name, ns, over_none)| ExcludedRow {
                name: name.to_owned(),
                ns: row("none", ns, None).ns,
                over_none: over_none.flatten(),
            })
            .into(),
            failures: Vec::new(),
            bars: Vec::new(),
        }
    }

    /// Check that a page has the bars, ratios with their spread, and who is absent.
    #[test]
    fn page() {
        let page = markdown(&example());
        assert!(
            page.contains("<= 1.10 | 1.050 ± 0.011 | reached |"),
            "{page}"
        );
        assert!(
            page.contains("| memprof session | 1050 | 105 ± 1 | 1.05 ± 0.01 | 9 |  |"),
            "{page}"
        );
        assert!(
            page.contains("| absent: not installed: bpfcc-tools |"),
            "{page}"
        );
    }

    /// Check the sections about stacks: what a frame takes is the slope, and what sharing
    /// tables saves stands beside what they take.
    #[test]
    fn unwinding() {
        let page = markdown(&example());
        for line in [
            "| not sampled | 105 | 70 | 1.50 ± 0.01 | 1338 | 1070 | 1.25 ± 0.01 | 9 |  |",
            "| 30 | 4500 | 3000 | 1.50 ± 0.01 | 5000 | 4000 | 1.25 ± 0.01 | 9 |  |",
            "A frame takes 150 ns by tables and 100 ns by `bpf_get_stack`, hash included: the slope \
             between 10 and 30 frames. Of a whole call, frames by tables are 60 % of 10 frames, 90 % of 30 frames.",
            "| 107.0 MB | 95000 | 950000 | 7.9 MB | 55.0, 60.0 ms | 31.0 MB |",
            "| files with code, each once: their tables | 2: 0.5 MB | 2: 0.5 MB |",
            "| 2: 0.5 MB | 600: 150.0 MB |",
            "| kernel memory and daemon, a process more |  | 10 kB |",
        ] {
            assert!(page.contains(line), "{line}\n{page}");
        }
    }

    /// Check that what an excluded process pays stands beside what it pays without a daemon.
    #[test]
    fn excluded() {
        let page = markdown(&example());
        for line in [
            "| no daemon | 12.0 |  | 9 |  |",
            "| left out | 1200.0 | 100 ± 1 | 9 |  |",
        ] {
            assert!(page.contains(line), "{line}\n{page}");
        }
    }

    /// Check that for stops the median and the worst are shown.
    #[test]
    fn stops() {
        let page = markdown(&example());
        let row = "| 200, 100 of them busy | 4.0, 5.0 | 25, 30 | 2.5, 3.0 | 45, 50 | 3 |";
        assert!(page.contains(row), "{page}");
    }

    /// Check that results read back from JSON give the same page.
    #[test]
    fn round_trip() {
        let report = example();
        let json = serde_json::to_string(&report).expect("JSON");
        let read: Report = serde_json::from_str(&json).expect("results");
        assert_eq!(markdown(&read), markdown(&report));
    }

    /// Check that an unstable ratio is called so, and text cannot break a table.
    #[test]
    fn notes() {
        let loose = Estimate {
            median: 2.0,
            spread: 0.2,
            rounds: 9,
        };
        assert_eq!(note(&Outcome::Measured, &[Some(loose)]), "not stable");
        assert_eq!(
            note(&Outcome::Failed("a|b\nc".to_owned()), &[]),
            "**error**: a\\|b c"
        );
    }
}
