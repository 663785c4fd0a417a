//! `memprof cleanup`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;

use super::args::parse_seconds;
use crate::{
    prefilter::{
        leftover::{find, remove},
        tracer::with_tracer,
    },
    process::exit::ExitWatch,
};

/// Take the prefilter of a memprof that was killed out of a process
///
/// Or that of its parent out of a forked child. The functions of the allocator get their
/// bytes back, and the memory is unmapped. A process without one is left alone, and so is
/// one that a running memprof traces.
#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    /// Process to clean up; may be repeated
    #[arg(
        short = 'p',
        long = "pid",
        value_name = "PID",
        num_args = 1..,
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..),
        required = true
    )]
    pids: Vec<u32>,

    /// How long to wait for threads that are within
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = parse_seconds)]
    attach_timeout: Duration,
}

/// Says what was done; fails if something is left.
pub(super) fn run(args: &CleanupArgs) -> anyhow::Result<ExitCode> {
    for &pid in &args.pids {
        // First: from then on the pid is this process's.
        let process = ExitWatch::open(pid)?;
        let what = || format!("cannot take the prefilter out of process {pid}");
        match find(pid).with_context(what)? {
            None => println!("pid {pid}: no prefilter is in it"),
            Some(leftover) => {
                let deadline = Instant::now() + args.attach_timeout;
                let stopped = with_tracer(|tracer| remove(tracer, &process, &leftover, deadline))
                    .context("cannot make a thread")?
                    .with_context(what)?;
                println!(
                    "pid {pid}: taken out of {} functions; stopped for {:.1} ms",
                    leftover.functions(),
                    stopped.max.as_secs_f64() * 1e3
                );
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
