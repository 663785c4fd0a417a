//! What puts the prefilter into a process and takes it out: blocking work, each piece on
//! one thread, since ptrace is one thread's.

use std::{
    fs,
    fs::File,
    os::fd::AsRawFd as _,
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use memprof_common::prefilter::SiteKind;
use tokio::sync::oneshot;

use super::{prober::ProberHandle, scan::Scanner, tables::FileTable};
use crate::{
    address::FileOffset,
    prefilter::{
        attach::{
            self, Attached, DataPlace, FindHooks, Grip, Image, ModuleHooks, Order, SiteProbes,
            StoppedTime,
        },
        check::{check, require_untraced},
        detach::detach,
        error::{DetachError, PrefilterError},
        layout::Geometry,
        reclaim::{self, GivenBack},
        stop_error::StopError,
        tracer::{Tracer, with_tracer},
        turn::Turn,
    },
    probe::{
        attach::{AttachError, ImageSite},
        find::AllocatorModule,
    },
    process::{exit::ExitWatch, info::read_memory},
};

/// What comes of an installation.
pub(super) type Outcome = oneshot::Receiver<Result<Installed, PrefilterError>>;

/// What has been put into a process.
#[derive(Debug)]
pub(super) struct Installed {
    pub(super) attached: Attached,
    /// How stacks are walked through it.
    pub(super) table: FileTable,
}

/// Work for the thread that holds a process.
pub type Job = Box<dyn FnOnce() + Send>;

/// Who has the process that is to be traced.
#[derive(Debug, Default)]
pub enum Holder {
    /// Nobody.
    #[default]
    Nobody,
    /// A thread of ours, by ptrace, at the end of a system call. It does work that it is
    /// sent until this is dropped.
    Thread(mpsc::Sender<Job>),
    /// A thread of ours, where the process cannot be made to do calls.
    Unfit,
}

/// The prefilter for some modules of a process.
#[derive(Debug)]
pub(super) struct Installation {
    pub(super) pid: u32,
    pub(super) slot: u16,
    pub(super) scanner: Arc<Scanner>,
    pub(super) modules: Vec<AllocatorModule>,
    /// Where the data is, if modules were hooked before.
    pub(super) data: Option<DataPlace>,
    pub(super) interval_bytes: u64,
    pub(super) seed: u64,
    pub(super) time_limit: Duration,
    pub(super) prober: ProberHandle,
}

impl Installation {
    /// Does it where it can be done. The outcome does not come if there is no thread for
    /// it, or if the one that holds the process has ended with it.
    pub(super) fn start(self, holder: &Holder) -> Outcome {
        let (sender, outcome) = oneshot::channel();
        let grip = match holder {
            Holder::Nobody => Grip::Seize,
            Holder::Thread(_) => Grip::Held,
            Holder::Unfit => {
                let _ = sender.send(Err(PrefilterError::UnknownStart));
                return outcome;
            }
        };
        let job: Job = Box::new(move || {
            let installed = self.run(grip).map(|attached| Installed {
                table: self.scanner.table_of_stubs(&attached.rows),
                attached,
            });
            let _ = sender.send(installed);
        });
        if let Holder::Thread(thread) = holder {
            let _ = thread.send(job);
        } else {
            on_a_thread(job);
        }
        outcome
    }

    fn run(&self, grip: Grip) -> Result<Attached, PrefilterError> {
        // Those before may have had to stop it, too.
        let _turn = Turn::wait(self.pid);
        // First of all: from then on the pid is this process's.
        let process = ExitWatch::open(self.pid)?;
        if grip == Grip::Seize {
            require_untraced(self.pid)?;
        }
        let geometry = geometry(self.pid, self.interval_bytes);
        let order = Order {
            process: &process,
            grip,
            find: self,
            image: self.data.clone(),
            geometry,
            interval_bytes: self.interval_bytes,
            seed: self.seed,
            deadline: Instant::now() + self.time_limit,
        };
        let mut probes = Probes {
            prober: &self.prober,
            slot: self.slot,
            pid: self.pid,
            is_first: order.image.is_none(),
        };
        match grip {
            Grip::Held => attach::attach(&Tracer::that_holds(), &order, &mut probes),
            Grip::Seize => with_tracer(|tracer| attach::attach(tracer, &order, &mut probes))
                .unwrap_or(Err(PrefilterError::NoThread)),
        }
    }
}

impl FindHooks for Installation {
    fn find(&self) -> Result<Vec<ModuleHooks>, PrefilterError> {
        // Where they are now: what the tracer knows has the program before, too.
        let mappings = self.scanner.mappings(self.pid)?;
        check(self.pid, &mappings, &self.modules)
    }
}

/// Runs `job` on a thread of its own; drops it if there is none left.
pub(super) fn on_a_thread(job: Job) {
    let spawned = thread::Builder::new()
        .name("memprof-ptrace".to_owned())
        .spawn(job);
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread is left to stop a process");
    }
}

/// Takes an image out of a process; done with if that has ended.
pub(super) fn take_out(
    pid: u32,
    image: &Image,
    time_limit: Duration,
) -> Result<StoppedTime, DetachError> {
    let _turn = Turn::wait(pid);
    let Ok(process) = ExitWatch::open(pid) else {
        return Ok(StoppedTime::default());
    };
    let deadline = Instant::now() + time_limit;
    with_tracer(|tracer| detach(tracer, &process, image, deadline)).unwrap_or_else(|source| {
        Err(DetachError::Io {
            what: "make a thread",
            source,
        })
    })
}

/// Gives back the shards of threads of a process that have ended.
pub(super) fn give_back(pid: u32, image: &Image) -> Result<GivenBack, StopError> {
    let _turn = Turn::wait(pid);
    let Ok(process) = ExitWatch::open(pid) else {
        return Err(StopError::Ended { pid });
    };
    // Without a thread there is another time.
    with_tracer(|tracer| reclaim::give_back(tracer, &process, image))
        .unwrap_or_else(|_| Ok(GivenBack::default()))
}

/// Has the thread that owns the programs probe the sites.
struct Probes<'a> {
    prober: &'a ProberHandle,
    slot: u16,
    pid: u32,
    is_first: bool,
}

impl SiteProbes for Probes<'_> {
    fn attach(&mut self, file: &File, sites: &[(SiteKind, FileOffset)]) -> Result<(), AttachError> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let sites = sites
            .iter()
            .map(|&(kind, file_offset)| ImageSite { file_offset, kind })
            .collect();
        self.prober.attach_image(self.slot, self.pid, path, sites)
    }

    fn detach(&mut self) {
        // Those of later modules go with the first's: on memory that is not mapped any more
        // they cost nothing.
        if self.is_first {
            self.prober.detach_soon(self.slot);
        }
    }
}

/// Blocks are rarely smaller on average.
const SMALL_BLOCK_BYTES: u64 = 64;

/// Tables that are large enough for as much memory as the process has now, and as many
/// threads.
fn geometry(pid: u32, interval_bytes: u64) -> Geometry {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(1, Iterator::count);
    let resident = read_memory(pid).map_or(0, |memory| memory.rss_anon_bytes);
    Geometry::for_process(threads, resident / interval_bytes.max(SMALL_BLOCK_BYTES))
}
