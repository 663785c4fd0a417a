//! Every allocation of two busy threads.

use std::process::Command;

use anyhow::Result;

use super::{
    check::in_use,
    context::Context,
    daemon::Daemon,
    process::{LIMIT, Process, number},
    report::{Trace, TraceRun},
};

/// Busy threads.
const THREADS: usize = 2;

/// Blocks that each thread holds.
const SLOTS: [u64; 2] = [1_000, 100_000];

/// Blocks of the memory measurement: fewer than memprof has room for by default.
const LIVE_BLOCKS: u64 = 1_000_000;

/// Measures all of it.
///
/// # Errors
///
/// memprof or a target fails.
pub(super) fn measure(context: &Context) -> Result<Trace> {
    let mut runs = Vec::new();
    let mut probe_mode = String::new();
    for slots in SLOTS {
        let mut command = Command::new(context.file("churn"));
        let mut target = Process::spawn(command.args([THREADS.to_string(), slots.to_string()]))?;
        target.wait_stdout(LIMIT, |line| line == "ready")?;
        let daemon = Daemon::start(context, target.pid())?;
        for _ in 0..context.pick(3, 2) {
            runs.push(run(&mut target, &daemon, context.pick(8_000, 2_000))?);
        }
        let mode = daemon.stats()?["probe_mode"].as_str().map(str::to_owned);
        probe_mode = mode.unwrap_or_default();
        daemon.stop()?;
    }

    let mut target = Process::spawn(&mut Command::new(context.file("stacks")))?;
    target.wait_stdout(LIMIT, |line| line == "ready")?;
    let daemon = Daemon::start(context, target.pid())?;
    daemon.settle()?;
    let idle = daemon.memory("VmRSS")?;
    target.send(&format!("fill 1 {LIVE_BLOCKS}"))?;
    target.wait_stdout(LIMIT, |line| line.starts_with("ns="))?;
    daemon.settle()?;
    let loaded = daemon.memory("VmRSS")?;
    daemon.stop()?;
    Ok(Trace {
        threads: THREADS,
        probe_mode,
        runs,
        idle_rss_bytes: idle,
        live_blocks: LIVE_BLOCKS,
        rss_bytes_per_block: loaded.saturating_sub(idle) as f64 / LIVE_BLOCKS as f64,
    })
}

fn run(target: &mut Process, daemon: &Daemon, milliseconds: u64) -> Result<TraceRun> {
    let before = daemon.settle()?;
    let cpu = daemon.cpu_s()?;
    target.send(&format!("run {milliseconds}"))?;
    let (_, line) = target.wait_stdout(LIMIT, |line| line.starts_with("ns="))?;
    let books = daemon.settle()?;
    let daemon_cpu_s = daemon.cpu_s()? - cpu;
    let (objects, bytes) = in_use(&daemon.profile()?);
    let live = number(&line, "live")?;
    // Counts go on from run to run; this run's are told.
    let dropped = books.dropped.iter().map(|(cause, count)| {
        let earlier = before.dropped.iter().find(|(other, _)| other == cause);
        (
            cause.clone(),
            count - earlier.map_or(0, |(_, count)| *count),
        )
    });
    Ok(TraceRun {
        live,
        seconds: number(&line, "ns")? as f64 / 1e9,
        calls: number(&line, "allocs")? + number(&line, "frees")?,
        events: books.events - before.events,
        dropped: dropped.filter(|(_, count)| *count > 0).collect(),
        daemon_cpu_s,
        inuse_objects: (live, objects),
        inuse_bytes: (number(&line, "live_bytes")?, bytes),
    })
}
