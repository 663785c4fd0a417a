//! `memprof daemon`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::Args;

use super::{
    args::{TraceArgs, parse_seconds},
    listen::ListenArgs,
    names::NamesArgs,
    record::announce,
    signals::Interrupts,
};
use crate::{
    export::{Format, http::router},
    pipeline::{
        dump::{DumpOptions, dump_forever, dump_once},
        service::Service,
        tracer::Tracer,
    },
};

/// Trace processes until SIGINT or SIGTERM, and answer on a socket.
#[derive(Debug, Args)]
pub(super) struct DaemonArgs {
    /// Process to trace; may be repeated
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

    #[command(flatten)]
    listen: ListenArgs,

    /// Write a profile each time so many seconds have passed, and one at the end
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, requires = "dump_dir")]
    dump_every: Option<Duration>,

    /// Directory for them; `-` for standard output
    #[arg(long, value_name = "DIR", requires = "dump_every")]
    dump_dir: Option<PathBuf>,

    /// How many of them to keep, the newest [default: all]
    #[arg(long, value_name = "N", requires = "dump_every", value_parser = clap::value_parser!(u32).range(1..))]
    dump_keep: Option<u32>,

    /// Their format
    #[arg(
        long,
        value_name = "FORMAT",
        requires = "dump_every",
        default_value = "json"
    )]
    dump_format: Format,

    #[command(flatten)]
    names: NamesArgs,

    #[command(flatten)]
    trace: TraceArgs,
}

pub(super) fn run(args: DaemonArgs) -> anyhow::Result<ExitCode> {
    super::require_host()?;
    super::runtime()?.block_on(serve(args))
}

async fn serve(args: DaemonArgs) -> anyhow::Result<ExitCode> {
    let mut interrupts = Interrupts::new().context("cannot catch signals")?;
    let dump = match (args.dump_every, args.dump_dir) {
        (Some(every), Some(dir)) => {
            let options = DumpOptions {
                every,
                dir,
                keep: args.dump_keep.map(|keep| keep as usize),
                format: args.dump_format,
            };
            options.require_writable()?;
            Some(options)
        }
        _ => None,
    };
    let symbolizer = args.names.start()?;
    let listeners = args.listen.bind().await?;
    let tracer = Tracer::start(args.trace.options())?;
    for &pid in &args.pids {
        let attached = tokio::select! {
            attached = tracer.attach(pid) => attached,
            _ = interrupts.next() => {
                tracer.stop().await;
                return Ok(ExitCode::SUCCESS);
            }
        };
        match attached {
            Ok(attached) => announce(&attached),
            Err(error) => {
                tracer.stop().await;
                return Err(error.into());
            }
        }
    }
    let service = Service {
        tracer: tracer.clone(),
        symbolizer,
    };
    let serving = listeners.serve(&router(service.clone(), args.listen.metrics_targets))?;
    let dumper = dump
        .clone()
        .map(|options| tokio::spawn(dump_forever(service.clone(), options)));

    interrupts.next().await;
    if let Some(dumper) = dumper {
        dumper.abort();
    }
    if let Some(options) = dump {
        dump_once(&service, &options).await;
    }
    serving.stop();
    tracer.stop().await;
    Ok(ExitCode::SUCCESS)
}
