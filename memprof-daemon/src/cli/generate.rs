//! `memprof completions` and `memprof man`: what packages install beside the binary.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::Cli;

/// Print completions for a shell, to be sourced by it or installed
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write manual pages, one a subcommand: `memprof.1`, `memprof-record.1` and so on
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct ManArgs {
    /// Directory for them; it must be there
    dir: PathBuf,
}

pub(super) fn completions(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "memprof", &mut script);
    match io::stdout().write_all(&script) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write the completions")
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

pub(super) fn man(args: &ManArgs) -> anyhow::Result<ExitCode> {
    let dir = &args.dir;
    // Of the version a page needs the number alone.
    let command = Cli::command().long_version(env!("CARGO_PKG_VERSION"));
    clap_mangen::generate_to(command, dir)
        .with_context(|| format!("cannot write manual pages to {}", dir.display()))?;
    Ok(ExitCode::SUCCESS)
}
