//! `memprof daemon`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::Args;

use super::{
    args::{TraceArgs, parse_seconds, parse_wait},
    children::{ChildrenArgs, announce_children},
    descriptors,
    file::Source,
    listen::ListenArgs,
    names::NamesArgs,
    privileges::Kept,
    record::{announce, announce_all},
    rules::RuleArgs,
    signals::Interrupts,
    upkeep::Upkeep,
};
use crate::{
    config::ConfigChange,
    export::{Format, http::router},
    filter::Filters,
    pipeline::{
        dump::{DumpOptions, dump_forever, dump_once},
        service::Service,
        tracer::{Tracer, TracerOptions},
    },
};

/// Trace processes until SIGINT or SIGTERM, and answer on a socket.
#[derive(Debug, Args)]
pub(super) struct DaemonArgs {
    /// Read options from this TOML file, each by its long name; the command line and the
    /// environment are stronger. SIGHUP has it read again
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Process to trace; may be repeated
    #[arg(
        short = 'p',
        long = "pid",
        value_name = "PID",
        num_args = 1..,
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..),
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    pids: Vec<u32>,

    /// Trace every process, present and future, that maps a known allocator or is a Go program,
    /// and that --include and --exclude let pass; none is written to unless a rule says so
    #[arg(short = 'a', long)]
    all: bool,

    #[command(flatten)]
    children: ChildrenArgs,

    #[command(flatten)]
    rules: RuleArgs,

    /// Forget a process so long after its end, and a program so long after its process has
    /// replaced it; what they have counted stays in sums [default: 60 with -a and with
    /// --children, else never]
    #[arg(long, value_name = "SECONDS", value_parser = parse_wait)]
    keep_exited: Option<Duration>,

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

/// How long ended processes are kept if they may be many.
const KEEP_EXITED: Duration = Duration::from_secs(60);

impl DaemonArgs {
    fn options(&self) -> anyhow::Result<TracerOptions> {
        Ok(TracerOptions {
            all: self.all,
            filters: self.filters()?.unwrap_or_default(),
            children: self.children.children,
            keep_exited: self
                .keep_exited
                .or((self.all || self.children.children).then_some(KEEP_EXITED)),
            ..self.trace.options()?
        })
    }

    /// Rules, where all processes could be traced.
    fn filters(&self) -> anyhow::Result<Option<Filters>> {
        if self.all {
            return Ok(Some(self.rules.filters()?));
        }
        anyhow::ensure!(
            self.rules.is_empty(),
            "--include and --exclude choose among all processes: they need -a"
        );
        Ok(None)
    }

    /// The settings that can be changed while it runs.
    ///
    /// # Errors
    ///
    /// They make no sense.
    pub(super) fn change(&self) -> anyhow::Result<ConfigChange> {
        Ok(ConfigChange {
            sample_interval_bytes: Some(self.trace.options()?.sample_interval_bytes),
            filters: self.filters()?,
            ..ConfigChange::default()
        })
    }
}

pub(super) fn run(args: DaemonArgs, source: Option<Source>) -> anyhow::Result<ExitCode> {
    super::require_host()?;
    descriptors::take_all();
    let kept = Kept::of(args.trace.options()?.probe_mode)?;
    let runtime = super::runtime_of({
        let kept = kept.clone();
        // Each thread has capabilities of its own, and these begin before the main one has
        // given its up.
        move || {
            if let Err(error) = kept.give_up_others() {
                tracing::warn!("{error:#}");
            }
        }
    })?;
    runtime.block_on(serve(args, source, &kept))
}

async fn serve(args: DaemonArgs, source: Option<Source>, kept: &Kept) -> anyhow::Result<ExitCode> {
    let options = args.options()?;
    let mut interrupts = Interrupts::new().context("cannot catch signals")?;
    let mut upkeep = Upkeep::new(source).context("cannot catch signals")?;
    let listeners = args.listen.bind().await?;
    // Threads that are started from here on have no more than what is left.
    kept.give_up_others()?;
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
    let tracer = Tracer::start(options, symbolizer.clone())?;
    if args.all {
        let all = tokio::select! {
            all = tracer.trace_all() => all,
            _ = interrupts.next() => {
                tracer.stop().await;
                return Ok(ExitCode::SUCCESS);
            }
        };
        match all {
            Ok(everyone) => announce_all(&everyone),
            Err(error) => {
                tracer.stop().await;
                return Err(error.into());
            }
        }
    }
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
    if args.children.children && !announce_children(&tracer, &mut interrupts).await {
        tracer.stop().await;
        return Ok(ExitCode::SUCCESS);
    }
    let service = Service {
        tracer: tracer.clone(),
        symbolizer,
    };
    let serving = listeners.serve(&router(service.clone(), args.listen.metrics_targets))?;
    let dumper = dump
        .clone()
        .map(|options| tokio::spawn(dump_forever(service.clone(), options)));

    tokio::select! {
        _ = interrupts.next() => {}
        () = upkeep.run(&tracer) => {}
    }
    upkeep.stopping();
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
