//! Attach, dump and detach with a million live blocks of many stacks.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    check::in_use,
    context::Context,
    daemon::Daemon,
    process::{LIMIT, Process, number},
    report::Dump,
};

/// Distinct call stacks.
const STACKS: u64 = 50_000;

/// Blocks of each.
const BLOCKS: u64 = 20;

/// Measures all of it.
///
/// # Errors
///
/// memprof or the target fails.
pub(super) fn measure(context: &Context) -> Result<Dump> {
    let mut target = Process::spawn(&mut Command::new(context.file("stacks")))?;
    target.wait_stdout(LIMIT, |line| line == "ready")?;
    // One daemon more, for the clock: the other one outlives the target.
    let detach = Daemon::start(context, target.pid())?.stop()?;

    let daemon = Daemon::start(context, target.pid())?;
    daemon.settle()?;
    let idle_rss_bytes = daemon.memory("VmRSS")?;
    target.send(&format!("fill {STACKS} {BLOCKS}"))?;
    let (_, line) = target.wait_stdout(LIMIT, |line| line.starts_with("ns="))?;
    let books = daemon.settle()?;
    let loaded_rss_bytes = daemon.memory("VmRSS")?;
    let stats = daemon.stats()?;
    let times = context.pick(5, 3);
    let (json_s, json_bytes) = time(&daemon, "json", times)?;
    let (pprof_s, pprof_bytes) = time(&daemon, "pprof", times)?;
    let rss_bytes = daemon.memory("VmRSS")?;
    let rss_peak_bytes = daemon.memory("VmHWM")?;
    let bpf_maps_bytes = daemon.bpf_maps()?;
    let (profile_live, _) = in_use(&daemon.profile()?);

    target.close_stdin();
    target.finish(LIMIT)?;
    let detach_ms = detached(&daemon)?;
    let process = &stats["processes"][0];
    let dump = Dump {
        live: number(&line, "live")?,
        profile_live,
        stacks: STACKS,
        known_stacks: stats["known_stacks"].as_u64().unwrap_or(0),
        dropped: books.dropped,
        sites: process["sites"].as_u64().unwrap_or(0),
        attach_clock_ms: daemon.attach.as_secs_f64() * 1e3,
        attach_ms: process["attach_ms"].as_f64(),
        detach_clock_ms: detach.as_secs_f64() * 1e3,
        detach_ms,
        json_s,
        json_bytes,
        pprof_s,
        pprof_bytes,
        idle_rss_bytes,
        loaded_rss_bytes,
        rss_bytes,
        rss_peak_bytes,
        bpf_maps_bytes,
    };
    daemon.stop()?;
    Ok(dump)
}

fn time(daemon: &Daemon, format: &str, times: usize) -> Result<(Vec<f64>, u64)> {
    let (mut seconds, mut bytes) = (Vec::new(), 0);
    for _ in 0..times {
        let asked = Instant::now();
        bytes = daemon.get(&format!("/v1/profile?format={format}"))?.len() as u64;
        seconds.push(asked.elapsed().as_secs_f64());
    }
    Ok((seconds, bytes))
}

/// Milliseconds that detaching took, once the daemon tells.
fn detached(daemon: &Daemon) -> Result<Option<f64>> {
    for _ in 0..100 {
        if let Some(ms) = daemon.stats()?["processes"][0]["detach_ms"].as_f64() {
            return Ok(Some(ms));
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(None)
}
