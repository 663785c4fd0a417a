//! What a running daemon does beside tracing: it reads its settings again at SIGHUP, and tells
//! the service manager how it is.

use std::{fmt::Display, io, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Interval, MissedTickBehavior, interval},
};
use tracing::{error, warn};

use super::{Command, config, file::Source, notify::Manager};
use crate::{config::ConfigChange, pipeline::tracer::TracerHandle, process::info::is_ignored};

/// Options that SIGHUP puts in force; the others are of the start.
const CHANGEABLE: [&str; 3] = ["sample-interval", "include", "exclude"];

/// How often a manager without a watchdog is told what goes on.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// Beside a daemon.
#[derive(Debug)]
pub(super) struct Upkeep {
    hangup: Option<Signal>,
    manager: Manager,
    source: Option<Source>,
}

impl Upkeep {
    /// From now on SIGHUP does not kill: it has a daemon with a file read that again, and ends
    /// one without as SIGTERM does, unless it was started to ignore it (nohup(1)).
    ///
    /// # Errors
    ///
    /// The signal cannot be caught.
    pub(super) fn new(source: Option<Source>) -> io::Result<Self> {
        let hangup = if source.is_some() || !is_ignored(libc::SIGHUP) {
            Some(signal(SignalKind::hangup())?)
        } else {
            None
        };
        Ok(Self {
            hangup,
            manager: Manager::from_env(),
            source,
        })
    }

    /// Says that the daemon is ready, and goes on until the daemon is to end.
    pub(super) async fn run(&mut self, tracer: &TracerHandle) {
        if let Some(status) = status(tracer).await {
            self.manager.ready(&status);
        }
        let mut tick = self.ticks();
        loop {
            tokio::select! {
                () = hung_up(&mut self.hangup) => match &self.source {
                    Some(source) => reload(&self.manager, source, tracer).await,
                    None => return,
                },
                () = next(&mut tick) => {
                    // Only a tracer that answers is well.
                    if let Some(status) = status(tracer).await {
                        self.manager.alive(&status);
                    }
                }
            }
        }
    }

    /// The daemon has been told to end.
    pub(super) fn stopping(&self) {
        self.manager.stopping();
    }

    /// When to tell that all is well; twice in the time that is allowed, as
    /// sd_watchdog_enabled(3) has it.
    fn ticks(&self) -> Option<Interval> {
        let period = match self.manager.watchdog() {
            Some(watchdog) => watchdog / 2,
            None => STATUS_EVERY,
        };
        let mut ticks = interval(period.max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.manager.is_there().then_some(ticks)
    }
}

async fn hung_up(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

async fn next(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// What the daemon does, in a line; none if it has ended. It is asked for something that costs
/// it nothing, and has to answer.
async fn status(tracer: &TracerHandle) -> Option<String> {
    tracer.config().await?;
    Some(format!(
        "Tracing {}",
        match tracer.live() {
            0 => "no process".to_owned(),
            1 => "1 process".to_owned(),
            traced => format!("{traced} processes"),
        }
    ))
}

/// Puts what the file says in force, as far as that can be changed. It is stronger than what
/// was set by request meanwhile.
async fn reload(manager: &Manager, source: &Source, tracer: &TracerHandle) {
    manager.reloading();
    let path = source.path().display();
    match source.reread() {
        Ok((cli, changed)) => {
            if let Command::Daemon(args) = cli.command {
                match args.change() {
                    Ok(change) => set_config(&path, change, tracer).await,
                    Err(error) => error!("settings stay as they were: {error}"),
                }
            }
            for name in changed {
                if !CHANGEABLE.contains(&name.as_str()) {
                    warn!("{name} has changed in {path}, which takes a restart of memprof");
                }
            }
        }
        Err(error) => error!("settings stay as they were: {error}"),
    }
    if let Some(status) = status(tracer).await {
        manager.ready(&status);
    }
}

async fn set_config(path: &impl Display, change: ConfigChange, tracer: &TracerHandle) {
    match tracer.set_config(change).await {
        Some(Ok(config)) => {
            let now = config::in_words(&config).join(", ");
            eprintln!("memprof: settings are read again from {path}: {now}");
        }
        Some(Err(error)) => error!("settings stay as they were: {error}"),
        None => {}
    }
}
