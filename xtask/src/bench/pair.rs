//! What one malloc and one free cost under each tool.
//!
//! One process runs on through all rounds. In each, every tool in turn is put on
//! it, measured, and taken off, after a measurement without any: both of a ratio
//! are of the same process and moments apart. Peers that must be preloaded have
//! a process of their own, measured in the same rounds.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    context::Context,
    process::{LIMIT, Process, number},
    report::{Outcome, PairRow, PairTable},
    stats::{Estimate, median, ratios},
    tools::{Place, Probe, Tool, Work},
};

/// The most blocks that `malloc` may keep, a thread.
const MOST_BLOCKS: u64 = 200_000;

/// Measurements while a tool is on, of which the median counts.
const CHUNKS: usize = 3;

/// Rounds after which a row that is not stable is called so.
const MOST_ROUNDS: usize = 40;

/// Turns in a round, one with `--quick`. Tools with a bar of a few percent have
/// every turn, all others the first.
const TURNS: usize = 3;

/// Whether a bar is about the ratio of this tool to another.
fn has_every_turn(tool: Tool) -> bool {
    matches!(
        tool,
        Tool::Floor {
            probe: Probe::Session,
            place: Place::Sites | Place::SitesOnly,
        } | Tool::Memprof {
            probe: Some(Probe::Session | Probe::Prefilter),
            interval: None,
        }
    )
}

/// The rows of the floor whose ratio tells what memprof itself adds.
fn floor_of(tool: Tool, variant: &Variant) -> Option<Tool> {
    match tool {
        // What it adds is to no trap.
        Tool::Memprof {
            probe: Some(Probe::Prefilter),
            ..
        } => None,
        Tool::Memprof {
            probe: Some(probe), ..
        } => Some(Tool::Floor {
            probe,
            place: if variant.only_malloc {
                Place::SitesOnly
            } else {
                Place::Sites
            },
        }),
        _ => None,
    }
}

/// One table.
pub(super) struct Variant {
    /// Its name.
    pub(super) name: &'static str,
    only_malloc: bool,
    all_cores: bool,
}

/// The tables.
pub(super) const VARIANTS: [Variant; 3] = [
    Variant {
        name: "malloc and free, one thread",
        only_malloc: false,
        all_cores: false,
    },
    Variant {
        name: "malloc and free, all cores",
        only_malloc: false,
        all_cores: true,
    },
    Variant {
        name: "malloc alone, one thread",
        only_malloc: true,
        all_cores: false,
    },
];

/// Tools in the order of a round: a floor stands beside what it is the floor of.
fn tools(context: &Context) -> Vec<Tool> {
    let floor = |probe, place| Tool::Floor { probe, place };
    let memprof = |probe, interval| Tool::Memprof { probe, interval };
    let mut tools = vec![
        memprof(Some(Probe::Prefilter), None),
        memprof(Some(Probe::Prefilter), Some("64KiB")),
        memprof(Some(Probe::Prefilter), Some("1")),
        floor(Probe::Session, Place::Sites),
        memprof(Some(Probe::Session), None),
        floor(Probe::Session, Place::SitesOnly),
        memprof(Some(Probe::Session), Some("64KiB")),
        memprof(Some(Probe::Session), Some("1")),
        floor(Probe::Session, Place::Starts),
        floor(Probe::Multi, Place::Sites),
        memprof(Some(Probe::Multi), None),
        floor(Probe::Perf, Place::Sites),
        memprof(Some(Probe::Perf), None),
    ];
    if !context.has_probe_option {
        tools.extend([None, Some("64KiB"), Some("1")].map(|interval| memprof(None, interval)));
    }
    tools.extend([Tool::Bpftrace, Tool::Memleak]);
    tools
}

/// The target, and what it has done.
struct Target {
    process: Process,
    done: Work,
    /// Nanoseconds an operation took lately, a variant.
    pace: [f64; VARIANTS.len()],
}

impl Target {
    fn start(mut command: Command, cpus: usize) -> Result<Self> {
        command.args([cpus.to_string(), MOST_BLOCKS.to_string()]);
        let process = Process::spawn(&mut command)?;
        process.wait_stdout(LIMIT, |line| line == "ready")?;
        Ok(Self {
            process,
            done: Work::default(),
            pace: [0.0; VARIANTS.len()],
        })
    }

    /// Nanoseconds an operation on each thread.
    fn ask(&mut self, variant: &Variant, cpus: usize, count: u64) -> Result<f64> {
        let what = if variant.only_malloc {
            "malloc"
        } else {
            "pair"
        };
        let threads = if variant.all_cores { cpus } else { 1 };
        self.process.send(&format!("{what} {threads} {count}"))?;
        let (_, line) = self
            .process
            .wait_stdout(LIMIT, |line| line.starts_with("ns="))?;
        self.done = Work {
            allocs: number(&line, "allocs")?,
            bytes: number(&line, "bytes")?,
        };
        Ok(number(&line, "ns")? as f64 / count as f64)
    }

    /// The medians of all variants, their measurements interleaved.
    fn measure(&mut self, cpus: usize, chunk: Duration) -> Result<[f64; VARIANTS.len()]> {
        for (variant, pace) in VARIANTS.iter().zip(self.pace) {
            // Another tool may be on than was before.
            let tried = self.ask(variant, cpus, 1000)?;
            let index = VARIANTS.iter().position(|one| one.name == variant.name);
            if let Some(index) = index {
                self.pace[index] = if pace > tried / 2.0 && pace < tried * 2.0 {
                    pace
                } else {
                    tried
                };
            }
        }
        let mut values = [const { Vec::new() }; VARIANTS.len()];
        for _ in 0..CHUNKS {
            for (index, variant) in VARIANTS.iter().enumerate() {
                let most = if variant.only_malloc {
                    MOST_BLOCKS
                } else {
                    u64::MAX
                };
                let count = (chunk.as_nanos() as f64 / self.pace[index]) as u64;
                let ns = self.ask(variant, cpus, count.clamp(1000, most))?;
                self.pace[index] = ns;
                values[index].push(ns);
            }
        }
        Ok(values.map(|values| median(&values).unwrap_or(f64::NAN)))
    }
}

/// The values of one tool, one a turn; `None` where it failed or had no turn.
struct Series {
    name: String,
    tool: Option<Tool>,
    outcome: Outcome,
    values: [Vec<Option<f64>>; VARIANTS.len()],
    none: [Vec<Option<f64>>; VARIANTS.len()],
}

impl Series {
    fn new(name: String, tool: Option<Tool>, absence: Option<String>) -> Self {
        Self {
            name,
            tool,
            outcome: absence.map_or(Outcome::Measured, Outcome::Absent),
            values: [const { Vec::new() }; VARIANTS.len()],
            none: [const { Vec::new() }; VARIANTS.len()],
        }
    }

    fn push(&mut self, none: [f64; VARIANTS.len()], values: Result<[f64; VARIANTS.len()]>) {
        let values = match values {
            Ok(values) => values.map(Some),
            Err(error) => {
                eprintln!("  {}: {error:#}", self.name);
                self.outcome = Outcome::Failed(format!("{error:#}"));
                [None; VARIANTS.len()]
            }
        };
        for (index, value) in values.into_iter().enumerate() {
            self.values[index].push(value);
            self.none[index].push(Some(none[index]));
        }
    }

    fn skip(&mut self) {
        for index in 0..VARIANTS.len() {
            self.values[index].push(None);
            self.none[index].push(None);
        }
    }

    fn is_measured(&self) -> bool {
        self.outcome == Outcome::Measured
    }
}

/// Peers that are preloaded, each in its own process.
fn preloaded(context: &Context) -> Vec<(Series, Option<Target>)> {
    let pair = context.file("pair");
    let heaptrack = context.heaptrack.as_ref().map(|path| {
        let mut command = Command::new(path);
        command.args(["--raw", "-o"]).arg(context.file("heaptrack"));
        command.arg(&pair);
        command
    });
    let jemalloc = context.jemalloc.as_ref().map(|path| {
        let mut command = Command::new(&pair);
        command.env("LD_PRELOAD", path);
        command
    });
    let jemalloc_prof = context.jemalloc_prof.as_ref().map(|path| {
        let mut command = Command::new(&pair);
        command.env("LD_PRELOAD", path);
        command.env(
            "MALLOC_CONF",
            "prof:true,prof_active:true,lg_prof_sample:19",
        );
        command
    });
    [
        ("heaptrack", heaptrack),
        ("jemalloc", jemalloc),
        ("jemalloc, profiling at 512KiB", jemalloc_prof),
    ]
    .into_iter()
    .map(|(name, command)| {
        let mut series = Series::new(
            name.to_owned(),
            None,
            command.as_ref().err().map(|why| (*why).clone()),
        );
        let target = command.ok().and_then(|command| {
            Target::start(command, context.cpus)
                .map_err(|error| series.outcome = Outcome::Failed(format!("{error:#}")))
                .ok()
        });
        (series, target)
    })
    .collect()
}

/// Measures all tables, for as long as `budget` at most.
///
/// # Errors
///
/// The target cannot be run without any tool.
pub(super) fn measure(context: &Context, budget: Duration) -> Result<Vec<PairTable>> {
    let deadline = Instant::now() + budget;
    let mut target = Target::start(Command::new(context.file("pair")), context.cpus)?;
    let mut attached: Vec<Series> = tools(context)
        .into_iter()
        .map(|tool| Series::new(tool.to_string(), Some(tool), tool.absence(context)))
        .collect();
    let mut preloaded = preloaded(context);
    let chunk = Duration::from_millis(context.pick(100, 30));
    let plain = chunk / 4;

    let mut round = 0;
    let mut longest = Duration::ZERO;
    while round < MOST_ROUNDS && (round == 0 || Instant::now() + longest < deadline) {
        let started = Instant::now();
        for turn in 0..context.pick(TURNS, 1) {
            for series in attached.iter_mut().filter(|series| series.is_measured()) {
                match series.tool {
                    Some(tool) if turn == 0 || has_every_turn(tool) => {
                        let none = target.measure(context.cpus, plain)?;
                        series.push(none, under(tool, context, &mut target, none, chunk));
                    }
                    _ => series.skip(),
                }
            }
        }
        for (series, other) in &mut preloaded {
            if let Some(other) = other.as_mut().filter(|_| series.is_measured()) {
                let none = target.measure(context.cpus, plain)?;
                series.push(none, other.measure(context.cpus, plain));
            }
        }
        round += 1;
        longest = longest.max(started.elapsed());
        eprintln!("  round {round}: {:.1} s", started.elapsed().as_secs_f64());
        let all = || {
            attached
                .iter()
                .chain(preloaded.iter().map(|(series, _)| series))
        };
        if all().filter(|series| series.is_measured()).all(is_stable) {
            break;
        }
    }
    attached.extend(preloaded.into_iter().map(|(series, _)| series));
    Ok((0..VARIANTS.len())
        .map(|index| table(context, index, &attached))
        .collect())
}

/// Puts `tool` on the target, measures, and takes it off.
fn under(
    tool: Tool,
    context: &Context,
    target: &mut Target,
    none: [f64; VARIANTS.len()],
    chunk: Duration,
) -> Result<[f64; VARIANTS.len()]> {
    let pid = target.process.pid();
    let attached = tool.attach(context, pid, &mut || {
        Ok(target.ask(&VARIANTS[0], context.cpus, 10_000)? > 10.0 * none[0])
    })?;
    let before = target.done;
    let values = target.measure(context.cpus, chunk)?;
    attached.detach(Some(Work {
        allocs: target.done.allocs - before.allocs,
        bytes: target.done.bytes - before.bytes,
    }))?;
    Ok(values)
}

fn is_stable(series: &Series) -> bool {
    series
        .values
        .iter()
        .zip(&series.none)
        .all(|(values, none)| {
            Estimate::of(&ratios(values, none)).is_some_and(|estimate| estimate.is_stable())
        })
}

fn table(context: &Context, index: usize, all: &[Series]) -> PairTable {
    let variant = &VARIANTS[index];
    let none: Vec<f64> = all
        .iter()
        .flat_map(|series| series.none[index].iter().flatten().copied())
        .collect();
    let mut rows = vec![PairRow {
        name: "none".to_owned(),
        outcome: Outcome::Measured,
        ns: Estimate::of(&none),
        over_none: None,
        floor: None,
        over_floor: None,
    }];
    for series in all {
        let values = &series.values[index];
        let present: Vec<f64> = values.iter().flatten().copied().collect();
        let floor = series.tool.and_then(|tool| floor_of(tool, variant));
        let floor = floor.and_then(|floor| all.iter().find(|other| other.tool == Some(floor)));
        let measured = |estimate: Option<Estimate>| estimate.filter(|_| series.is_measured());
        rows.push(PairRow {
            name: series.name.clone(),
            outcome: series.outcome.clone(),
            ns: measured(Estimate::of(&present)),
            over_none: measured(Estimate::of(&ratios(values, &series.none[index]))),
            floor: floor.map(|floor| floor.name.clone()),
            over_floor: floor
                .filter(|floor| floor.is_measured())
                .and_then(|floor| measured(Estimate::of(&ratios(values, &floor.values[index])))),
        });
    }
    PairTable {
        name: variant.name.to_owned(),
        operation: if variant.only_malloc {
            "malloc"
        } else {
            "pair"
        }
        .to_owned(),
        threads: if variant.all_cores { context.cpus } else { 1 },
        rows,
    }
}
