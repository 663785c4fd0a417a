//! What a sample costs whose stack is walked by unwind tables, and one whose stack the
//! kernel walks by frame pointers (`bpf_get_stack`).
//!
//! One program has both, frame pointers and unwind information. In each round memprof is
//! put on it once for each way to walk; the calls are made at stacks of as many frames
//! as are wanted, and without sampling, one after the other.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    check::stacks,
    context::Context,
    daemon::Daemon,
    process::{LIMIT, Process, number},
    report::{UnwindCost, UnwindRow},
    run_time::RunTime,
    stats::{Estimate, median, ratios},
};

/// Frames of the stacks, from the caller of malloc to the outermost.
const FRAMES: [usize; 3] = [10, 30, 100];

/// `--unwind` of the two ways.
const WAYS: [&str; 2] = ["auto", "fp"];

/// Calls of a measurement, and measurements, of which the median counts. Few calls: what
/// interrupts a BPF program counts as its run time.
const CALLS: u64 = 400;
const CHUNKS: usize = 15;

/// Rounds that more do not improve on.
const MOST_ROUNDS: usize = 40;

/// The rows: no sample, then [`FRAMES`].
const ROWS: usize = FRAMES.len() + 1;

/// Nanoseconds a call, for each row.
#[derive(Clone, Copy)]
struct Visit {
    /// The whole call, as the program sees it; the kernel's clock is off.
    call: [f64; ROWS],
    /// In BPF programs.
    bpf: [f64; ROWS],
}

/// Measures for as long as `budget` at most.
///
/// # Errors
///
/// memprof or the target fails, or stacks are not as deep as they should be.
pub(super) fn measure(context: &Context, budget: Duration) -> Result<Vec<UnwindRow>> {
    let deadline = Instant::now() + budget;
    let mut target = Process::spawn(&mut Command::new(context.file("deep")))?;
    target.wait_stdout(LIMIT, |line| line == "ready")?;
    let mut visits: [Vec<Visit>; WAYS.len()] = [const { Vec::new() }; WAYS.len()];
    let mut longest = Duration::ZERO;
    while visits[0].len() < MOST_ROUNDS
        && (visits[0].is_empty() || Instant::now() + longest < deadline)
    {
        let started = Instant::now();
        for (way, visits) in WAYS.iter().zip(&mut visits) {
            visits.push(visit(context, &mut target, way)?);
        }
        longest = longest.max(started.elapsed());
    }
    Ok((0..ROWS).map(|row| summary(row, &visits)).collect())
}

/// Puts memprof on the target, measures all rows, and takes it off.
fn visit(context: &Context, target: &mut Process, way: &str) -> Result<Visit> {
    // Probes on each call: without a sample, the prefilter comes to no program.
    let options = ["-i", "1", "--probe", "uprobe", "--unwind", way];
    let daemon = Daemon::start_with(context, &options, &[target.pid()])?;
    // How many frames there are above the program's own differs: by frame pointers, those
    // of the C library are not found.
    calls(target, 1, 1)?;
    daemon.settle()?;
    let above = only_stack(&daemon)?;
    let depths = FRAMES.map(|frames| (frames + 1).saturating_sub(above));

    let mut visit = Visit {
        call: [f64::NAN; ROWS],
        bpf: [f64::NAN; ROWS],
    };
    for row in 0..ROWS {
        daemon.set_interval(u64::from(row != 0))?;
        let depth = *row
            .checked_sub(1)
            .map_or(&depths[0], |index| &depths[index]);
        calls(target, depth, CALLS)?;
        let (mut call, mut bpf) = (Vec::new(), Vec::new());
        for _ in 0..CHUNKS {
            call.push(calls(target, depth, CALLS)?);
        }
        let clock = RunTime::start()?;
        for _ in 0..CHUNKS {
            bpf.push(in_programs(&daemon, target, depth)?);
        }
        drop(clock);
        visit.call[row] = median(&call).unwrap_or(f64::NAN);
        visit.bpf[row] = median(&bpf).unwrap_or(f64::NAN);
    }
    check(&daemon)?;
    daemon.stop()?;
    Ok(visit)
}

/// Nanoseconds a call, as the target tells.
fn calls(target: &mut Process, depth: usize, count: u64) -> Result<f64> {
    let ns = allocate(target, depth, count)?;
    give_back(target)?;
    Ok(ns)
}

fn allocate(target: &mut Process, depth: usize, count: u64) -> Result<f64> {
    target.send(&format!("run {depth} {count}"))?;
    let (_, line) = target.wait_stdout(LIMIT, |line| line.starts_with("ns="))?;
    Ok(number(&line, "ns")? as f64 / count as f64)
}

fn give_back(target: &mut Process) -> Result<()> {
    target.send("free")?;
    target.wait_stdout(LIMIT, |line| line.starts_with("freed="))?;
    Ok(())
}

/// Nanoseconds in BPF programs a call.
fn in_programs(daemon: &Daemon, target: &mut Process, depth: usize) -> Result<f64> {
    let before = daemon.runs()?;
    allocate(target, depth, CALLS)?;
    let after = daemon.runs()?;
    give_back(target)?;
    if after.count < before.count + CALLS {
        bail!("the kernel has timed too few runs of the programs");
    }
    Ok((after.ns - before.ns) as f64 / CALLS as f64)
}

fn depths(daemon: &Daemon) -> Result<Vec<(usize, u64)>> {
    let profile = daemon.profile()?;
    let process = profile.pointer("/processes/0");
    let process = process.context("the profile has no process")?;
    stacks(process)
        .map(|stack| {
            let frames = stack["frames"]
                .as_array()
                .context("a stack has no frames")?;
            let calls = stack["alloc_objects"].as_u64();
            Ok((frames.len(), calls.context("no alloc_objects")?))
        })
        .collect()
}

/// Frames of the only stack there is.
fn only_stack(daemon: &Daemon) -> Result<usize> {
    match depths(daemon)?.as_slice() {
        &[(frames, _)] => Ok(frames),
        others => bail!("one call made {} stacks", others.len()),
    }
}

/// All calls were sampled, and their stacks as deep as they should be.
fn check(daemon: &Daemon) -> Result<()> {
    let books = daemon.settle()?;
    if !books.dropped.is_empty() {
        bail!("it lost events: {:?}", books.dropped);
    }
    let depths = depths(daemon)?;
    for frames in FRAMES {
        let wanted = (2 * CHUNKS as u64 + 1) * CALLS;
        let found = depths.iter().find(|&&(depth, _)| depth == frames);
        let calls = found.map_or(0, |&(_, calls)| calls);
        if calls != wanted {
            bail!("it has {calls} of {wanted} calls at stacks of {frames} frames: {depths:?}");
        }
    }
    Ok(())
}

fn summary(row: usize, visits: &[Vec<Visit>; WAYS.len()]) -> UnwindRow {
    let [tables, kernel] = visits;
    let column = |visits: &[Visit], get: fn(&Visit) -> &[f64; ROWS]| -> Vec<f64> {
        visits.iter().map(|visit| get(visit)[row]).collect()
    };
    let call: fn(&Visit) -> &[f64; ROWS] = |visit| &visit.call;
    let bpf: fn(&Visit) -> &[f64; ROWS] = |visit| &visit.bpf;
    let cost = |get| {
        let (tables, kernel) = (column(tables, get), column(kernel, get));
        let all = |values: &[f64]| values.iter().copied().map(Some).collect::<Vec<_>>();
        UnwindCost {
            tables: Estimate::of(&tables),
            kernel: Estimate::of(&kernel),
            ratio: Estimate::of(&ratios(&all(&tables), &all(&kernel))),
        }
    };
    UnwindRow {
        frames: row.checked_sub(1).map(|index| FRAMES[index]),
        bpf: cost(bpf),
        call: cost(call),
    }
}
