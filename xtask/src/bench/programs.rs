//! What real programs cost under memprof and its peers.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    context::Context,
    report::{Outcome, ProgramRow, ProgramTable},
    stats::{Estimate, FEWEST_ROUNDS, ratios},
    tools::{Left, Probe, Tool},
    workloads::{self, Workload},
};

/// Rounds of one program after which rows that are not stable are called so.
const MOST_ROUNDS: usize = 80;

/// Rounds in which tools take part that make a program some times slower: as many as a
/// stable ratio needs.
const SLOW_ROUNDS: usize = FEWEST_ROUNDS;

/// The same of those that make it tens of times slower.
const SLOWEST_ROUNDS: usize = 2;

/// The ratio by which memprof is judged has to be known better than the bar of 3 % is wide.
const JUDGED_SPREAD: f64 = 0.01;

/// How a program is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// By itself.
    Plain,
    /// With a tool put on it before its first allocation, or on a server once it
    /// is up.
    Attached(Tool),
    /// Under heaptrack from its start.
    Heaptrack,
}

/// One run of a program.
pub(super) struct Run {
    /// For all its work.
    pub(super) time: Duration,
    /// Calls of the allocator while it lasted, and who counted them.
    pub(super) left: Left,
}

const DEFAULT: Tool = Tool::Memprof {
    probe: None,
    interval: None,
};

const UPROBES: Tool = Tool::Memprof {
    probe: Some(Probe::Uprobe),
    interval: None,
};

/// One program under one tool.
struct Series {
    name: &'static str,
    how: How,
    outcome: Outcome,
    /// The rounds it takes part in, the first ones.
    rounds: usize,
    /// A value a round.
    seconds: Vec<Option<f64>>,
    /// How long the last round took, with all that belongs to it.
    took: Duration,
}

/// The places of the rows that a program is judged by, which take part in every round.
const NONE: usize = 0;
const OURS: usize = 1;

/// Measures all programs: the rows that they are judged by for as long as half of `budget`, the
/// others for as long as the other half, but once in any case. So a tool that makes a program
/// forty times slower leaves the others their rounds.
///
/// # Errors
///
/// The input of a program cannot be made.
pub(super) fn measure(context: &Context, budget: Duration) -> Result<Vec<ProgramTable>> {
    let workloads = workloads::all(context)?;
    let share = budget / 2 / u32::try_from(workloads.len().max(1))?;
    let mut tables = Vec::new();
    for workload in workloads {
        tables.push(match workload {
            Ok(workload) => measure_one(context, workload.as_ref(), share),
            Err((name, why)) => ProgramTable {
                name: name.to_owned(),
                calls_per_second: None,
                calls_source: None,
                rows: vec![ProgramRow {
                    name: "none".to_owned(),
                    outcome: Outcome::Absent(why),
                    seconds: None,
                    throughput: None,
                    over_none: None,
                }],
            },
        });
    }
    Ok(tables)
}

fn measure_one(context: &Context, workload: &dyn Workload, budget: Duration) -> ProgramTable {
    // What is left for the judged rows, and for the others.
    let (mut judged_left, mut others_left) = (budget, budget);
    let absence = |why: Option<String>| why.map_or(Outcome::Measured, Outcome::Absent);
    let one = |name, how, outcome, rounds| Series {
        name,
        how,
        outcome,
        rounds,
        seconds: Vec::new(),
        took: Duration::ZERO,
    };
    let mut all = [
        one("none", How::Plain, Outcome::Measured, MOST_ROUNDS),
        one(
            "memprof, default",
            How::Attached(DEFAULT),
            Outcome::Measured,
            MOST_ROUNDS,
        ),
        one(
            "memprof, uprobes",
            How::Attached(UPROBES),
            absence(UPROBES.absence(context)),
            SLOW_ROUNDS,
        ),
        one(
            "bpftrace leak script",
            How::Attached(Tool::Bpftrace),
            absence(Tool::Bpftrace.absence(context)),
            SLOWEST_ROUNDS,
        ),
        one(
            "heaptrack",
            How::Heaptrack,
            absence(context.heaptrack.clone().err()),
            SLOW_ROUNDS,
        ),
    ];
    // memprof's count is of all calls; bpftrace's of malloc and free.
    let mut calls: BTreeMap<&'static str, u64> = BTreeMap::new();
    for round in 1..=MOST_ROUNDS {
        let round_started = Instant::now();
        // What the machine does meanwhile grows and shrinks: who is first changes.
        let mut order: Vec<usize> = (0..all.len()).collect();
        if round % 2 == 0 {
            order.swap(NONE, OURS);
        }
        for place in order {
            let series = &mut all[place];
            let started = Instant::now();
            let mut seconds = None;
            let is_of_bar = place <= OURS;
            let has_time = is_of_bar || round == 1 || series.took <= others_left;
            if !has_time {
                series.rounds = round - 1;
            }
            if series.outcome == Outcome::Measured && round <= series.rounds {
                match workload.run(context, series.how) {
                    Ok(run) => {
                        seconds = Some(run.time.as_secs_f64());
                        if let Some((count, source)) = run.left.calls {
                            calls.insert(source, count);
                        }
                    }
                    Err(error) => {
                        eprintln!("  {}: {}: {error:#}", workload.name(), series.name);
                        series.outcome = Outcome::Failed(format!("{error:#}"));
                    }
                }
            }
            series.seconds.push(seconds);
            series.took = started.elapsed();
            let left = if is_of_bar {
                &mut judged_left
            } else {
                &mut others_left
            };
            *left = left.saturating_sub(series.took);
        }
        let took = round_started.elapsed();
        eprintln!(
            "  {}, round {round}: {:.1} s",
            workload.name(),
            took.as_secs_f64()
        );
        let is_known = is_judged(&all[OURS], &all[NONE]);
        let next = all[NONE].took + all[OURS].took;
        if next > judged_left || is_known && round >= SLOW_ROUNDS {
            break;
        }
    }
    let plain = Estimate::of(&present(&all[NONE]));
    let (source, count) = ["memprof", "bpftrace"]
        .into_iter()
        .find_map(|source| Some((source, *calls.get(source)?)))
        .unzip();
    ProgramTable {
        name: workload.name().to_owned(),
        calls_per_second: count
            .zip(plain)
            .map(|(count, plain)| count as f64 / plain.median),
        calls_source: source.map(str::to_owned),
        rows: all
            .iter()
            .map(|series| row(series, &all[NONE], workload))
            .collect(),
    }
}

fn present(series: &Series) -> Vec<f64> {
    series.seconds.iter().flatten().copied().collect()
}

/// Whether more rounds would tell nothing new of `series`.
fn is_judged(series: &Series, none: &Series) -> bool {
    series.outcome != Outcome::Measured
        || Estimate::of(&ratios(&series.seconds, &none.seconds))
            .is_some_and(|estimate| estimate.is_stable() && estimate.spread < JUDGED_SPREAD)
}

fn row(series: &Series, none: &Series, workload: &dyn Workload) -> ProgramRow {
    let is_measured = series.outcome == Outcome::Measured;
    let seconds = Estimate::of(&present(series)).filter(|_| is_measured);
    let (units, unit) = workload.units();
    ProgramRow {
        name: series.name.to_owned(),
        outcome: series.outcome.clone(),
        seconds,
        throughput: seconds.map(|seconds| (units / seconds.median, unit.to_owned())),
        over_none: Estimate::of(&ratios(&series.seconds, &none.seconds))
            .filter(|_| is_measured && series.how != How::Plain),
    }
}
