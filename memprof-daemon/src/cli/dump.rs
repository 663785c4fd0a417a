//! `memprof dump`.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;

use super::{
    client::ClientArgs,
    output::{Output, format_for},
};
use crate::export::Format;

/// Ask a running daemon for a profile.
#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// Process to show [default: all that the daemon traces]
    #[arg(short = 'p', long = "pid", value_name = "PID")]
    pid: Option<u32>,

    /// Ask for what happens in so many seconds from now on, not for all since the attach
    #[arg(short = 's', long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: Option<u32>,

    /// Format of the profile [default: by the file's name, else json; text to
    /// the terminal]
    #[arg(short = 'f', long)]
    format: Option<Format>,

    /// File to write, `-` for standard output
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(args: DumpArgs) -> anyhow::Result<ExitCode> {
    let output = Output::open(args.output.as_deref(), false)?;
    let format = format_for(args.format, args.output.as_deref());
    let mut query = format!("/v1/profile?format={format}");
    if let Some(pid) = args.pid {
        query.push_str(&format!("&pid={pid}"));
    }
    if let Some(seconds) = args.seconds {
        query.push_str(&format!("&seconds={seconds}"));
    }
    let client = args.client.client()?;
    let body = super::runtime()?.block_on(client.get(&query))?;
    output.write_with(|sink| sink.write_all(&body))?;
    io::stdout().flush().ok();
    Ok(ExitCode::SUCCESS)
}
