//! `memprof record`.

use std::{
    ffi::OsString,
    future::Future,
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::sync::Notify;

use super::{
    args::{TraceArgs, parse_seconds, parse_wait},
    children::{ChildrenArgs, announce_children, untraced_in_words},
    descriptors,
    names::{NamesArgs, Wait, name_last},
    output::{Output, format_for},
    rules::RuleArgs,
    signals::{Interrupt, Interrupts},
};
use crate::{
    export::{Format, losses::losses_in_words},
    pipeline::{
        service::Service,
        target::{Attached, TargetError},
        tracer::{Everyone, Tracer, TracerHandle, TracerOptions},
    },
    probe::launch::{Held, Launched, exit_code, launch},
};

/// Record a profile of running processes, or of a command.
///
/// With -p it ends after -d, on Ctrl-C, or when the last process exits; with -a after -d or
/// on Ctrl-C; with a command it ends with it and has its exit status. The profile is written in
/// every case. Children of a process are followed with --children: then the last of them is the
/// last process.
#[derive(Debug, Args)]
pub(super) struct RecordArgs {
    /// Process to trace; may be repeated
    #[arg(
        short = 'p',
        long = "pid",
        value_name = "PID",
        num_args = 1..,
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..),
        required_unless_present_any = ["command", "all"],
        conflicts_with_all = ["command", "all"]
    )]
    pids: Vec<u32>,

    /// Trace every process that maps a known allocator, and every Go program, until -d or
    /// Ctrl-C; none is written to
    #[arg(short = 'a', long, conflicts_with = "command")]
    all: bool,

    #[command(flatten)]
    children: ChildrenArgs,

    #[command(flatten)]
    rules: RuleArgs,

    /// End after this many seconds
    #[arg(short = 'd', long, value_name = "SECONDS", value_parser = parse_seconds)]
    duration: Option<Duration>,

    /// File to write, `-` for standard output [default: text to the terminal]
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Format of the profile [default: by the file's name, else json]
    #[arg(short = 'f', long)]
    format: Option<Format>,

    #[command(flatten)]
    names: NamesArgs,

    /// At the end, wait that long for what is being downloaded; 0 not at all
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "10",
        requires = "debuginfod",
        value_parser = parse_wait
    )]
    debuginfod_wait: Duration,

    #[command(flatten)]
    trace: TraceArgs,

    /// Command to trace from its first allocation
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(super) fn run(args: RecordArgs) -> anyhow::Result<ExitCode> {
    super::require_host()?;
    if args.command.is_empty() {
        descriptors::take_all();
    }
    // Before anything is traced: a mistake here must cost nothing.
    let output = Output::open(args.output.as_deref(), !args.command.is_empty())?;
    super::runtime()?.block_on(record(args, output))
}

async fn record(args: RecordArgs, output: Output) -> anyhow::Result<ExitCode> {
    let mut interrupts = Interrupts::new().context("cannot catch signals")?;
    anyhow::ensure!(
        args.all || args.rules.is_empty(),
        "--include and --exclude choose among all processes: they need -a"
    );
    let symbolizer = args.names.start()?;
    let options = TracerOptions {
        all: args.all,
        filters: args.rules.filters()?,
        children: args.children.children,
        ..args.trace.options()?
    };
    let tracer = Tracer::start(options, symbolizer.clone())?;
    let service = Service {
        tracer: tracer.clone(),
        symbolizer,
    };

    let started = if args.all {
        attach_everyone(&tracer, &mut interrupts).await
    } else if args.command.is_empty() {
        attach_all(&tracer, &args.pids, args.children, &mut interrupts).await
    } else {
        start_command(&tracer, &args.command).await.map(Some)
    };
    let launched = match started {
        Ok(launched) => launched,
        Err(error) => {
            tracer.stop().await;
            return Err(error);
        }
    };

    let command = launched.map(CommandWait::new);
    match &command {
        None => wait_for_processes(&tracer, args.all, args.duration, &mut interrupts).await,
        Some(command) => command.watch(&tracer, args.duration, &mut interrupts).await,
    }

    let format = format_for(args.format, args.output.as_deref());
    let hurry = Notify::new();
    let wait = Wait {
        limit: args.debuginfod_wait,
        hurry: &hurry,
    };
    let finish = finish(&service, output, format, wait);
    let written = unless_interrupted(finish, &mut interrupts, &hurry).await;
    if let Some(mut command) = command {
        // It goes on untraced if the recording was shorter than its life.
        let code = command.exit_code(&mut interrupts).await;
        // The command's status is the answer, but not over a lost profile.
        written?;
        return code;
    }
    written?;
    Ok(ExitCode::SUCCESS)
}

/// Captures, names and writes the profile, and takes the probes off.
async fn finish(
    service: &Service,
    output: Output,
    format: Format,
    wait: Wait<'_>,
) -> anyhow::Result<()> {
    let capture = service
        .tracer
        .capture(None)
        .await
        .context("the tracer has ended")?;
    let stats = service.tracer.stats().await;
    let untraced = stats.and_then(|stats| untraced_in_words(&stats.children));
    // Naming may take a while; the targets should not pay for it.
    service.tracer.stop().await;
    let samples = capture.samples();
    let profile = name_last(capture, &service.symbolizer, wait).await?;
    let shown = output.is_standard();
    let losses = losses_in_words(&profile);
    let name = output.name();
    tokio::task::spawn_blocking(move || output.write(format, &profile))
        .await
        .context("writing the profile failed")??;
    if !shown {
        eprintln!("memprof: {samples} samples written to {name}");
        for loss in losses {
            eprintln!("memprof: {loss}");
        }
    }
    if let Some(untraced) = untraced {
        eprintln!("memprof: {untraced}");
    }
    Ok(())
}

/// Traces every process, or none.
async fn attach_all(
    tracer: &TracerHandle,
    pids: &[u32],
    children: ChildrenArgs,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Option<Launched>> {
    let mut all = Vec::with_capacity(pids.len());
    for &pid in pids {
        all.push(tokio::select! {
            attached = tracer.attach(pid) => attached?,
            _ = interrupts.next() => anyhow::bail!("interrupted while attaching"),
        });
    }
    // Who waits for these lines may rely on all of them.
    all.iter().for_each(announce);
    if children.children && !announce_children(tracer, interrupts).await {
        anyhow::bail!("interrupted while attaching");
    }
    Ok(None)
}

/// Traces every process.
async fn attach_everyone(
    tracer: &TracerHandle,
    interrupts: &mut Interrupts,
) -> anyhow::Result<Option<Launched>> {
    let everyone = tokio::select! {
        everyone = tracer.trace_all() => everyone?,
        _ = interrupts.next() => anyhow::bail!("interrupted while attaching"),
    };
    announce_all(&everyone);
    Ok(None)
}

/// Says what is probed in all processes. Scripts wait for this line.
pub(super) fn announce_all(everyone: &Everyone) {
    if let Some(named) = everyone.named {
        eprintln!("memprof: recording processes that rules name, {named} of them by now");
        return;
    }
    eprintln!(
        "memprof: recording all processes: {} probe sites in {}",
        everyone.sites,
        everyone.modules.join(", ")
    );
}

/// Says what is being traced. Scripts wait for this line.
pub(super) fn announce(attached: &Attached) {
    let Attached { pid, comm, .. } = attached;
    if let Some(version) = &attached.go {
        eprintln!(
            "memprof: recording pid {pid} ({comm}): the heap profile of its Go runtime, {version}"
        );
    }
    if attached.sites > 0 || attached.go.is_none() {
        eprintln!(
            "memprof: recording pid {pid} ({comm}): {} probe sites in {}",
            attached.sites,
            attached.modules.join(", ")
        );
    }
}

/// Starts the command, traced from its first allocation.
async fn start_command(tracer: &TracerHandle, command: &[OsString]) -> anyhow::Result<Launched> {
    let (name, arguments) = command.split_first().context("a command is needed")?;
    let mut builder = Command::new(name);
    builder.args(arguments);
    let tracer = tracer.clone();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // A thread of its own: ptrace ties the command to the thread that starts it.
    std::thread::Builder::new()
        .name("memprof-launch".to_owned())
        .spawn(move || {
            let mut attached = None;
            let launched = launch(builder, |pid, held| {
                attached = Some(tracer.attach_held(pid, held == Held::Loaded)?);
                Ok::<_, TargetError>(())
            });
            // Nobody waits only if we are ending.
            let _ = sender.send((launched, attached));
        })
        .context("cannot start a thread")?;
    let (launched, attached) = receiver.await.context("the launching thread failed")?;
    if let Some(attached) = attached.filter(|_| std::io::stderr().is_terminal()) {
        announce(&attached);
    }
    Ok(launched?)
}

/// Until the time is up, a signal comes, or the last process has exited.
async fn wait_for_processes(
    tracer: &TracerHandle,
    all: bool,
    duration: Option<Duration>,
    interrupts: &mut Interrupts,
) {
    let mut progress = Progress::new();
    let deadline = sleep(duration);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            () = &mut deadline => break,
            _ = interrupts.next() => break,
            // Where all are traced, others come.
            () = tracer.all_exited(), if !all => break,
            () = progress.tick(tracer) => {}
        }
    }
    progress.clear();
}

async fn sleep(duration: Option<Duration>) {
    match duration {
        Some(duration) => tokio::time::sleep(duration).await,
        None => std::future::pending().await,
    }
}

/// Lets `work` end, and tells it to hurry at the next signal; from the third on it may be
/// given up.
async fn unless_interrupted<T>(
    work: impl Future<Output = anyhow::Result<T>>,
    interrupts: &mut Interrupts,
    hurry: &Notify,
) -> anyhow::Result<T> {
    tokio::pin!(work);
    let mut warned = false;
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = interrupts.next() => {
                if warned {
                    anyhow::bail!("given up; no profile was written");
                }
                warned = true;
                hurry.notify_one();
                eprintln!("memprof: writing the profile; interrupt again to give it up");
            }
        }
    }
}

/// A command under way.
struct CommandWait {
    pid: Pid,
    exit: tokio::task::JoinHandle<std::io::Result<ExitStatus>>,
}

impl CommandWait {
    fn new(mut command: Launched) -> Self {
        Self {
            pid: Pid::from_raw(command.pid().cast_signed()),
            exit: tokio::task::spawn_blocking(move || command.wait()),
        }
    }

    /// Until the command has ended or the time is up. Signals end the command,
    /// not the recording.
    async fn watch(
        &self,
        tracer: &TracerHandle,
        duration: Option<Duration>,
        interrupts: &mut Interrupts,
    ) {
        let deadline = sleep(duration);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                () = &mut deadline => return,
                // Seen by the tracer, so that every sample is in the books.
                () = tracer.all_exited() => return,
                interrupt = interrupts.next() => self.forward(interrupt),
            }
        }
    }

    /// Passes a signal on, unless the terminal has sent it to the command too.
    fn forward(&self, interrupt: Interrupt) {
        if self.exit.is_finished() {
            return;
        }
        let signal = match interrupt {
            Interrupt::Int if std::io::stdin().is_terminal() => return,
            Interrupt::Int => Signal::SIGINT,
            Interrupt::Term => Signal::SIGTERM,
        };
        // It may be gone by now.
        let _ = kill(self.pid, signal);
    }

    /// Waits for the end and turns the status into one for us, as a shell does.
    async fn exit_code(&mut self, interrupts: &mut Interrupts) -> anyhow::Result<ExitCode> {
        let status = loop {
            tokio::select! {
                status = &mut self.exit => break status,
                interrupt = interrupts.next() => self.forward(interrupt),
            }
        };
        let status = status
            .context("waiting for the command failed")?
            .context("cannot wait for the command")?;
        Ok(ExitCode::from(exit_code(status)))
    }
}

/// A line on the terminal that says how it goes.
struct Progress {
    shown: bool,
    start: Instant,
    tick: tokio::time::Interval,
}

impl Progress {
    fn new() -> Self {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        Self {
            shown: std::io::stderr().is_terminal(),
            start: Instant::now(),
            tick,
        }
    }

    async fn tick(&mut self, tracer: &TracerHandle) {
        if !self.shown {
            return std::future::pending().await;
        }
        self.tick.tick().await;
        let Some(stats) = tracer.stats().await else {
            return;
        };
        let images = stats.processes.iter().flat_map(|process| &process.images);
        let (samples, live) = images.fold((0, 0), |(samples, live), image| {
            (samples + image.alloc_events, live + image.live)
        });
        eprint!(
            "\r\x1b[Kmemprof: {} s, {samples} samples, {live} of them live; Ctrl-C ends it",
            self.start.elapsed().as_secs()
        );
        // A terminal that is gone takes no progress.
        let _ = std::io::stderr().flush();
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
