//! What a user types: one file a subcommand.

mod args;
mod check;
mod children;
mod cleanup;
mod client;
mod config;
mod daemon;
mod descriptors;
mod dump;
mod file;
mod generate;
mod listen;
mod log;
mod names;
mod notify;
mod output;
mod pools;
mod privileges;
mod ps;
mod record;
mod rules;
mod signals;
mod socket;
mod upkeep;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::file::{ParseError, Parsed};
use crate::{
    pipeline::target::TargetError,
    probe::{heap::give_back_large, launch::LaunchError},
};

/// Exit status when something went wrong.
const FAILURE: u8 = 1;

/// Exit status of wrong usage, as of clap.
const USAGE: u8 = 2;

/// Heap profiles of unmodified, running processes, by eBPF.
///
/// Which call stacks allocated the memory, and which of them still hold it? No
/// rebuild, no restart, no preload.
#[derive(Debug, Parser)]
#[command(
    name = "memprof",
    version,
    // With what is known of the BPF object that is in it.
    long_version = include_str!(env!("MEMPROF_LONG_VERSION")),
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Record a profile of running processes, or of a command
    Record(record::RecordArgs),
    /// Trace processes until stopped, and answer on a socket
    Daemon(daemon::DaemonArgs),
    /// Ask a running daemon for a profile
    Dump(dump::DumpArgs),
    /// List what a running daemon traces
    Ps(ps::PsArgs),
    /// Show or change the settings of a running daemon
    Config(config::ConfigArgs),
    Check(check::CheckArgs),
    Cleanup(cleanup::CleanupArgs),
    Completions(generate::CompletionsArgs),
    Man(generate::ManArgs),
}

/// Parses the command line and does what it says: the one exit point.
#[must_use]
pub fn main() -> ExitCode {
    give_back_large();
    log::init();
    let Parsed { cli, source } = match file::parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(ParseError::Usage(error)) => error.exit(),
        Err(error) => {
            log::say_fatal(&anyhow::anyhow!("{error}"));
            return ExitCode::from(USAGE);
        }
    };
    let result = match cli.command {
        Command::Record(args) => record::run(args),
        Command::Daemon(args) => daemon::run(args, source),
        Command::Dump(args) => dump::run(args),
        Command::Ps(args) => ps::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Cleanup(args) => cleanup::run(&args),
        Command::Config(args) => config::run(args),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            log::say_fatal(&error);
            ExitCode::from(exit_status(&error))
        }
    }
}

/// The status for an error; a shell's for commands that cannot be started.
fn exit_status(error: &anyhow::Error) -> u8 {
    error
        .downcast_ref::<LaunchError<TargetError>>()
        .map_or(FAILURE, LaunchError::exit_code)
}

/// The runtime that everything asynchronous runs in.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    runtime_of(|| {})
}

/// As [`runtime`], each of whose threads does something first.
fn runtime_of(
    begin_thread: impl Fn() + Send + Sync + 'static,
) -> anyhow::Result<tokio::runtime::Runtime> {
    use anyhow::Context as _;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("memprof-worker")
        .on_thread_start(begin_thread)
        // A worker looks for signals and requests between tasks, not after the usual 61:
        // while events flow, a turn of the tracer's is long.
        .event_interval(1)
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

/// Fails with all unmet requirements of the host, if there are any.
fn require_host() -> anyhow::Result<()> {
    use crate::probe::requirements::{State, check_before_start};
    let unmet: Vec<String> = check_before_start()
        .into_iter()
        .filter_map(|requirement| match requirement.state {
            State::Met(_) => None,
            State::Unmet { problem, mend } => {
                Some(format!("{}: {problem}\n  mend: {mend}", requirement.name))
            }
        })
        .collect();
    if unmet.is_empty() {
        return Ok(());
    }
    anyhow::bail!("this host cannot do it:\n{}", unmet.join("\n"))
}
