//! What the tracer can be asked, and how.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    attaching::{Found, SiteBatch},
    children::{Parents, SettledReply},
    config::ConfigError,
    golang::GoRead,
    marks::Mark,
    prefilter::Hooked,
    rules::{Considered, LetGo},
    system::{Everyone, StartReply},
    targets::{LeaveError, LeaveReply, Left, TakenOut},
};
use crate::{
    config::{Config, ConfigChange},
    pipeline::{
        capture::Capture,
        install::{Holder, Job},
        scan::Scan,
        stats::{ProcessSummary, Stats},
        sweep::{Looked, Swept},
        tables::FileTable,
        target::{AttachReply, Attached, TargetError},
    },
    prefilter::{reclaim::GivenBack, stop_error::StopError},
    probe::attach::{AttachError, FileId},
    sample::ImageId,
};

/// What the tracer is asked or told.
pub(in crate::pipeline) enum Command {
    Attach {
        pid: u32,
        holder: Holder,
        reply: AttachReply,
    },
    Scanned {
        pid: u32,
        result: Result<Box<Scan>, TargetError>,
    },
    Rescanned {
        image: ImageId,
        result: Result<Box<Scan>, TargetError>,
    },
    Found(Found),
    /// Have Go programs' profiles read, of one process or all; `done` is dropped then.
    ReadGo {
        pid: Option<u32>,
        done: mpsc::Sender<()>,
    },
    GoRead(Box<GoRead>),
    AttachDone {
        pid: u32,
        batch: SiteBatch,
        result: Result<Duration, AttachError>,
    },
    Hooked(Box<Hooked>),
    /// Shards of threads that have ended were given back, or could not be.
    ShardsGivenBack {
        pid: u32,
        serial: u64,
        result: Result<GivenBack, StopError>,
    },
    Detached {
        pid: u32,
        serial: u64,
        time: Option<Duration>,
    },
    Exited {
        pid: u32,
        serial: u64,
    },
    /// Trace every process.
    TraceAll {
        reply: StartReply,
    },
    /// A child that is to be traced was read.
    ChildScanned {
        pid: u32,
        serial: u64,
        result: Result<Box<Scan>, TargetError>,
    },
    Parents(Parents),
    /// Tell when all children that there are have had their turn.
    ChildrenSettled {
        reply: SettledReply,
    },
    Considered(Considered),
    /// The probes that all share were taken off a file.
    Unshared,
    /// What has come of taking a process on since a rule wants it.
    RuleAttach {
        pid: u32,
        result: Result<Attached, TargetError>,
    },
    Swept(Swept),
    /// Files that were mapped, by whomever.
    Looked(Looked),
    /// What has come of taking a Go program on, where every process is traced.
    GoAttach {
        pid: u32,
        runs: LetGo,
        result: Result<Attached, TargetError>,
    },
    /// A file was probed for all, or could not be.
    Shared {
        file: FileId,
        result: Result<Duration, AttachError>,
    },
    /// A process that has turned up was looked at.
    Met {
        pid: u32,
        serial: u64,
        scan: Result<Box<Scan>, TargetError>,
    },
    /// The slot of a process that could not be traced is nobody's any more.
    SlotFree {
        slot: u16,
        pid: u32,
    },
    Compiled {
        pid: u32,
        file: (u64, u64),
        table: FileTable,
    },
    /// Let a process go.
    Detach {
        pid: u32,
        reply: LeaveReply,
    },
    TakenOut(Box<TakenOut>),
    /// Its probes are off.
    Left {
        pid: u32,
        serial: u64,
        time: Option<Duration>,
    },
    /// Copy all counters, for windows that begin now.
    Mark {
        reply: oneshot::Sender<Arc<Mark>>,
    },
    Reset {
        reply: oneshot::Sender<SystemTime>,
    },
    Capture {
        pid: Option<u32>,
        since: Option<Arc<Mark>>,
        reply: oneshot::Sender<Capture>,
    },
    Stats {
        reply: oneshot::Sender<Stats>,
    },
    Config {
        reply: oneshot::Sender<Config>,
    },
    SetConfig {
        change: ConfigChange,
        reply: oneshot::Sender<Result<Config, ConfigError>>,
    },
    Processes {
        reply: oneshot::Sender<Vec<ProcessSummary>>,
    },
    Stop {
        reply: oneshot::Sender<Option<Duration>>,
    },
}

/// A process whose memory is busy can keep its reader waiting.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// Talks to the tracer.
#[derive(Clone, Debug)]
pub struct TracerHandle {
    commands: mpsc::Sender<Command>,
    live: watch::Receiver<usize>,
    profiles: Arc<AtomicUsize>,
}

impl TracerHandle {
    pub(super) const fn new(
        commands: mpsc::Sender<Command>,
        live: watch::Receiver<usize>,
        profiles: Arc<AtomicUsize>,
    ) -> Self {
        Self {
            commands,
            live,
            profiles,
        }
    }

    /// How many profiles there is memory for at a time.
    #[must_use]
    pub fn profiles_at_a_time(&self) -> usize {
        self.profiles.load(Ordering::Relaxed)
    }

    /// Traces a process; returns when its probes are in place.
    ///
    /// # Errors
    ///
    /// [`TargetError`]; nothing of the process stays attached.
    pub async fn attach(&self, pid: u32) -> Result<Attached, TargetError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Attach {
                pid,
                holder: Holder::Nobody,
                reply,
            })
            .await
            .map_err(|_| TargetError::Stopped)?;
        answer.await.map_err(|_| TargetError::Stopped)?
    }

    /// Waits until all children that there are of traced processes have had their turn; how
    /// many are traced then. None if children are not followed, or the tracer has ended.
    pub async fn children_settled(&self) -> Option<usize> {
        let (reply, answer) = oneshot::channel();
        let command = Command::ChildrenSettled { reply };
        self.commands.send(command).await.ok()?;
        answer.await.ok()
    }

    /// Traces every process that there is and will be; returns when all allocators that are
    /// mapped now are probed.
    ///
    /// # Errors
    ///
    /// [`TargetError`]; the tracer was not started for it, or it is not safe on this host.
    pub async fn trace_all(&self) -> Result<Everyone, TargetError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::TraceAll { reply })
            .await
            .map_err(|_| TargetError::Stopped)?;
        answer.await.map_err(|_| TargetError::Stopped)?
    }

    /// As [`Self::attach`], for the thread that holds the process by ptrace. With
    /// `at_call_end` that is at the end of a system call, and the thread does what has to be
    /// done by ptrace meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Self::attach`].
    pub fn attach_held(&self, pid: u32, at_call_end: bool) -> Result<Attached, TargetError> {
        let (sender, jobs) = std::sync::mpsc::channel::<Job>();
        let holder = if at_call_end {
            Holder::Thread(sender)
        } else {
            Holder::Unfit
        };
        let (reply, answer) = oneshot::channel();
        self.commands
            .blocking_send(Command::Attach { pid, holder, reply })
            .map_err(|_| TargetError::Stopped)?;
        // Until the tracer drops its end.
        for job in jobs {
            job();
        }
        answer.blocking_recv().map_err(|_| TargetError::Stopped)?
    }

    /// Copies the counters of one process or of all; none if the tracer has
    /// ended.
    pub async fn capture(&self, pid: Option<u32>) -> Option<Capture> {
        self.capture_since(pid, None).await
    }

    /// Copies the counters, and of those that have changed since the mark the changes.
    pub(in crate::pipeline) async fn capture_since(
        &self,
        pid: Option<u32>,
        since: Option<Arc<Mark>>,
    ) -> Option<Capture> {
        self.read_go(pid).await?;
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Capture { pid, since, reply })
            .await
            .ok()?;
        answer.await.ok()
    }

    /// Brings what is known of Go programs to the present; of those that cannot be read in
    /// time, what is known stays. None if the tracer has ended.
    async fn read_go(&self, pid: Option<u32>) -> Option<()> {
        let (done, mut all_done) = mpsc::channel(1);
        self.commands
            .send(Command::ReadGo { pid, done })
            .await
            .ok()?;
        let _ = tokio::time::timeout(READ_LIMIT, all_done.recv()).await;
        Some(())
    }

    /// Marks where a window begins; none if the tracer has ended.
    pub(in crate::pipeline) async fn mark(&self) -> Option<Arc<Mark>> {
        self.read_go(None).await?;
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Mark { reply }).await.ok()?;
        answer.await.ok()
    }

    /// Has profiles count allocations from now on; tells when that is, or none if the tracer
    /// has ended.
    pub async fn reset(&self) -> Option<SystemTime> {
        self.read_go(None).await?;
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Reset { reply }).await.ok()?;
        answer.await.ok()
    }

    /// Lets a process go; returns when nothing of memprof's is in it any more.
    ///
    /// # Errors
    ///
    /// [`LeaveError`]; it is traced as before.
    pub async fn detach(&self, pid: u32) -> Result<Left, LeaveError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Detach { pid, reply })
            .await
            .map_err(|_| LeaveError::Stopped)?;
        answer.await.map_err(|_| LeaveError::Stopped)?
    }

    /// What the tracer tells about itself; none if it has ended.
    pub async fn stats(&self) -> Option<Stats> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Stats { reply }).await.ok()?;
        answer.await.ok()
    }

    /// The settings in force; none if the tracer has ended.
    pub async fn config(&self) -> Option<Config> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Config { reply }).await.ok()?;
        answer.await.ok()
    }

    /// Changes settings, for all processes or for none; none if the tracer has
    /// ended.
    pub async fn set_config(&self, change: ConfigChange) -> Option<Result<Config, ConfigError>> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::SetConfig { change, reply })
            .await
            .ok()?;
        answer.await.ok()
    }

    /// The processes that are or were traced; none if the tracer has ended.
    pub async fn processes(&self) -> Option<Vec<ProcessSummary>> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Processes { reply })
            .await
            .ok()?;
        answer.await.ok()
    }

    /// Takes every probe off and ends the tracer; how long the kernel took.
    pub async fn stop(&self) -> Option<Duration> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Stop { reply }).await.ok()?;
        answer.await.ok()?
    }

    /// How many processes are traced.
    #[must_use]
    pub fn live(&self) -> usize {
        *self.live.borrow()
    }

    /// Waits until no traced process is left.
    pub async fn all_exited(&self) {
        let mut live = self.live.clone();
        // An error means that the tracer is gone, and its processes with it.
        let _ = live.wait_for(|&live| live == 0).await;
    }
}
