//! What a process pays that a daemon for all does not trace.
//!
//! One process runs on through all rounds. In each, every daemon in turn is started, the
//! process measured, and the daemon ended, after a measurement without any: both of a ratio
//! are of the same process and moments apart.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    context::Context,
    daemon::Daemon,
    process::{LIMIT, Process, number},
    report::ExcludedRow,
    stats::{Estimate, FEWEST_ROUNDS, median, ratios},
};

/// Measurements of a visit, of which the median counts.
const CHUNKS: usize = 3;

/// Nanoseconds that one takes, more or less.
const CHUNK_NS: f64 = 50e6;

/// Rounds, at most.
const MOST_ROUNDS: usize = 20;

/// The most blocks that `malloc` may keep, which is not used here.
const MOST_BLOCKS: u64 = 1000;

/// One daemon: its name, how it probes, its rules, and whether it traces the process.
struct Case {
    name: &'static str,
    options: &'static [&'static str],
    is_traced: bool,
}

const CASES: [Case; 5] = [
    Case {
        name: "traced with all others, session",
        options: &["--probe", "session"],
        is_traced: true,
    },
    Case {
        name: "`--exclude comm=pair`, session",
        options: &["--probe", "session", "--exclude", "comm=pair"],
        is_traced: false,
    },
    Case {
        name: "traced with all others, multi",
        options: &["--probe", "multi"],
        is_traced: true,
    },
    Case {
        name: "`--exclude comm=pair`, multi",
        options: &["--probe", "multi", "--exclude", "comm=pair"],
        is_traced: false,
    },
    Case {
        name: "`--include comm=churn`, session",
        options: &["--probe", "session", "--include", "comm=churn"],
        is_traced: false,
    },
];

/// Measures all of it.
///
/// # Errors
///
/// The process or memprof fails, or a process is traced that should not be.
pub(super) fn measure(context: &Context, time: Duration) -> Result<Vec<ExcludedRow>> {
    let deadline = Instant::now() + time;
    let mut command = Command::new(context.file("pair"));
    command.args(["1", &MOST_BLOCKS.to_string()]);
    let mut pair = Process::spawn(&mut command)?;
    pair.wait_stdout(LIMIT, |line| line == "ready")?;
    let mut none = Vec::new();
    let mut values = [const { Vec::new() }; CASES.len()];
    let mut before = [const { Vec::new() }; CASES.len()];
    let mut longest = Duration::ZERO;
    while none.len() < MOST_ROUNDS * CASES.len()
        && (none.len() < FEWEST_ROUNDS * CASES.len() || Instant::now() + longest < deadline)
    {
        let started = Instant::now();
        for (index, case) in CASES.iter().enumerate() {
            let without = nanoseconds(&mut pair)?;
            let daemon = Daemon::start_for_all(context, case.options)?;
            let with = nanoseconds(&mut pair)?;
            check(&daemon, case, pair.pid())?;
            daemon.stop()?;
            none.push(without);
            before[index].push(Some(without));
            values[index].push(Some(with));
        }
        longest = longest.max(started.elapsed());
    }
    let first = ExcludedRow {
        name: "no daemon".to_owned(),
        ns: Estimate::of(&none),
        over_none: None,
    };
    let rows = CASES.iter().zip(values.iter().zip(&before));
    let rows = rows.map(|(case, (values, before))| ExcludedRow {
        name: case.name.to_owned(),
        ns: Estimate::of(&values.iter().copied().flatten().collect::<Vec<_>>()),
        over_none: Estimate::of(&ratios(values, before)),
    });
    Ok(std::iter::once(first).chain(rows).collect())
}

/// Nanoseconds that a malloc and a free take.
fn nanoseconds(pair: &mut Process) -> Result<f64> {
    let mut ask = |count: u64| -> Result<f64> {
        pair.send(&format!("pair 1 {count}"))?;
        let (_, line) = pair.wait_stdout(LIMIT, |line| line.starts_with("ns="))?;
        Ok(number(&line, "ns")? as f64 / count as f64)
    };
    // The first calls have BPF told of the process, and the process let go.
    ask(1000)?;
    std::thread::sleep(Duration::from_millis(200));
    let tried = ask(1000)?;
    let count = (CHUNK_NS / tried) as u64;
    let mut values = Vec::new();
    for _ in 0..CHUNKS {
        values.push(ask(count.max(1000))?);
    }
    median(&values).context("nothing was measured")
}

/// The process is traced, or is not, as is meant.
fn check(daemon: &Daemon, case: &Case, pid: u32) -> Result<()> {
    let stats = daemon.stats()?;
    let processes = stats["processes"].as_array().context("no processes")?;
    let is_traced = processes
        .iter()
        .any(|one| one["pid"] == pid && one["state"] == "tracing");
    ensure!(
        is_traced == case.is_traced,
        "{}: it is {}traced",
        case.name,
        if is_traced { "" } else { "not " }
    );
    Ok(())
}
