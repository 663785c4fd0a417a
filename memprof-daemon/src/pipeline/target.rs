//! What the pipeline knows of one traced process.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::{Duration, Instant},
};

use memprof_common::{counters::COUNTERS, totals::TargetTotals, unwind::table::MappingList};
use thiserror::Error;
use tokio::{sync::oneshot, task::AbortHandle};

use super::{
    image::Image,
    install::Holder,
    stats::Counted,
    tables::{FileTable, LoadedList},
    tracer::golang::GoTarget,
    tracer::prefilter::Choice,
    tracer::targets::Leaving,
};
use crate::{
    export::profile::{Inherited, ProbeSite},
    golang::GoError,
    prefilter::{
        attach::StoppedTime,
        error::{DetachError, PrefilterError},
    },
    probe::{
        attach::{AttachError, Site},
        find::{AllocatorModule, FindError, FoundSite},
        mode::ModeChoice,
    },
    process::info::ProcessError,
    ring::mmap_events::MmapEvent,
};

/// Why a process could not be traced. Nothing of it stays attached.
#[derive(Debug, Error)]
pub enum TargetError {
    /// It is not there, or not one that can be traced.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// No allocator was found in it.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It is a Go program without `malloc`, and its own profile cannot be read.
    #[error(
        "pid {pid} has no malloc, being a Go program, and its Go heap cannot be profiled: {error}"
    )]
    Go {
        /// The process.
        pid: u32,
        /// Why.
        error: GoError,
    },
    /// Its allocator could not be probed.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// It cannot have the prefilter, and nothing else is wanted.
    #[error("no prefilter for it: {0}")]
    Prefilter(#[source] Box<PrefilterError>),
    /// Another daemon's prefilter is in it.
    #[error("process {0} is traced by another memprof, by its prefilter")]
    InUse(u32),
    /// An earlier daemon has left its prefilter, and nothing may be written.
    #[error(
        "the prefilter of an earlier memprof, or of the parent's, is in process {0}: \
         `memprof cleanup -p {0}` takes it out"
    )]
    HasLeftover(u32),
    /// Such a one could not be taken out.
    #[error("cannot take the prefilter of an earlier memprof out of process {pid}: {error}")]
    Leftover {
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        error: DetachError,
    },
    /// It is being traced already, by this daemon.
    #[error("process {0} is traced already")]
    Already(u32),
    /// The table of targets is full.
    #[error("{0} processes are traced already, which is as many as one memprof can")]
    TooMany(u32),
    /// There is no memory for it.
    #[error("process {0} is not taken on: memory is short, raise --max-memory or -i")]
    OverLimit(u32),
    /// It ended before all was set up.
    #[error("process {0} exited while probes were being attached")]
    Exited(u32),
    /// A BPF map could not be written.
    #[error("cannot tell the BPF programs about process {pid}")]
    Map {
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        source: Box<aya::maps::MapError>,
    },
    /// The tracer has ended.
    #[error("the tracer has ended")]
    Stopped,
}

/// What came of attaching.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// The version of Go whose heap profile is read, if it is a Go program.
    pub go: Option<String>,
    /// How many sites are probed.
    pub sites: usize,
    /// Modules that they are in.
    pub modules: Vec<String>,
    /// How long the kernel took to attach.
    pub attach_time: Duration,
}

/// The answer to a request to trace a process.
pub type AttachReply = oneshot::Sender<Result<Attached, TargetError>>;

/// Where a target is in its life.
#[derive(Debug)]
pub(super) enum State {
    /// Its mappings are being read and its allocators sought.
    Scanning,
    /// Its first probes are being attached.
    Attaching,
    /// Traced.
    Tracing,
    /// Gone.
    Ended,
}

impl State {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Scanning => "scanning",
            Self::Attaching => "attaching",
            Self::Tracing => "tracing",
            Self::Ended => "ended",
        }
    }
}

/// A target that is traced since it is another's child.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    pub(super) parent: u32,
    /// When it was made, if that was told.
    pub(super) born_ns: Option<u64>,
    /// What it has from its parent, if it is its copy.
    pub(super) inherited: Option<Inherited>,
    /// Something in it is probed.
    pub(super) is_traced: bool,
}

/// A task that ends when nobody has this any more.
#[derive(Debug)]
pub(super) struct Watching(pub(super) AbortHandle);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A site as it is probed.
pub(super) fn probed_site(module: &AllocatorModule, found: &FoundSite, number: u16) -> Site {
    Site {
        path: module.attach_path.clone(),
        file_offset: found.probe_offset(),
        function: found.function,
        symbol: found.symbol,
        number,
        places: found.places,
        returns: found.returns.clone(),
        passes_on: found.passes_on.clone(),
    }
}

/// A site as it is shown.
pub(super) fn shown_site(module: &AllocatorModule, found: &FoundSite) -> ProbeSite {
    ProbeSite {
        module: module.file.path.to_string_lossy().into_owned(),
        function: found.symbol.to_owned(),
        file_offset: found.probe_offset().0,
        offset: found.point.offset,
        instruction: found.point.instruction.clone(),
        emulated: found.point.emulated,
    }
}

/// From one reading of a process's mappings, because of unknown code, to the next.
const RESCAN_EVERY: Duration = Duration::from_millis(50);

/// A traced process.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) slot: u16,
    /// The slot is still its own.
    pub(super) has_slot: bool,
    /// Tells it from others that had its pid.
    pub(super) serial: u64,
    /// It is traced with all others, and no probe is its own.
    pub(super) is_shared: bool,
    /// It is traced since rules say so, and as long as they do.
    pub(super) is_by_rule: bool,
    /// Whose child it is, if it is traced for that.
    pub(super) child: Option<Child>,
    /// How it may be looked at.
    pub(super) mode: ModeChoice,
    /// It has turned up and is not to be traced: nothing of it is shown.
    pub(super) is_unwanted: bool,
    /// Where the random bits of its sampling decisions start.
    pub(super) sample_seed: u64,
    pub(super) state: State,
    /// Who has it until it is traced.
    pub(super) holder: Holder,
    /// How its calls are looked at.
    pub(super) choice: Choice,
    /// Modules are being hooked.
    pub(super) is_hooking: bool,
    /// The last program's prefilter is being taken out, if it is still there.
    pub(super) is_clearing: bool,
    /// How often what was planned for the present program did not fit.
    pub(super) stale_plans: u8,
    /// Modules that were found meanwhile.
    pub(super) waiting_modules: Vec<AllocatorModule>,
    /// For how long it stood still.
    pub(super) stopped: StoppedTime,
    /// Shards of threads that have ended, which other threads may have.
    pub(super) shards_given_back: u64,
    /// Bytes that are mapped into it.
    pub(super) image_bytes: u64,
    /// Who waits to hear that it is traced.
    pub(super) reply: Option<AttachReply>,
    /// It is let go, or has been.
    pub(super) leaving: Leaving,
    /// In the order of their epochs; the last is the present one. Empty until
    /// scanned. Those that were replaced long ago are forgotten.
    pub(super) images: Vec<Image>,
    /// What those have counted that are forgotten.
    pub(super) replaced: Counted,
    /// Its probes have been lost for good, and that was told.
    pub(super) is_lost: bool,
    /// Its probes have been lost and are being attached anew.
    pub(super) is_probed_anew: bool,
    /// Places that are probed, by (device, inode, file offset): a place is
    /// probed once however many names or mappings it has.
    pub(super) probed: HashSet<(u64, u64, u64)>,
    /// Records about mappings that came before the scan did.
    pub(super) pending_mappings: Vec<MmapEvent>,
    /// Files of the present image that were looked through for allocators.
    pub(super) seen_files: HashSet<(u64, u64)>,
    /// Files that define `malloc`.
    pub(super) malloc_files: HashSet<(u64, u64)>,
    /// The same places as they are shown.
    pub(super) sites: BTreeSet<ProbeSite>,
    /// Modules among them.
    pub(super) modules: BTreeSet<String>,
    /// Number of the next site.
    pub(super) next_site: u16,
    /// Jobs under way for it.
    pub(super) jobs: usize,
    /// It has exited while jobs were under way.
    pub(super) exit_seen: bool,
    /// Who waits for the exit, with descriptors of the process.
    pub(super) exit_watch: Option<Watching>,
    pub(super) since: Instant,
    pub(super) attach_time: Duration,
    pub(super) detach_time: Option<Duration>,
    /// Losses when it was last swept for.
    pub(super) swept_losses: [u64; COUNTERS],
    /// How many `execve`s BPF has told of.
    pub(super) execs_told: u32,
    /// The unwind tables of its files, by (device, inode).
    pub(super) tables: HashMap<(u64, u64), FileTable>,
    /// Files whose tables are being compiled.
    pub(super) compiling: HashSet<(u64, u64)>,
    /// Files without a table yet, and when they were mapped first.
    pub(super) mapped_ns: HashMap<(u64, u64), u64>,
    /// What BPF was told of its mappings: the list, how it is told, and whose.
    pub(super) list: Option<(LoadedList, MappingList, u32)>,
    /// When its mappings were last read again since BPF met unknown code.
    pub(super) rescanned: Option<Instant>,
    /// What the exact totals of the next image begin with; none if that is not
    /// known.
    pub(super) next_totals_base: Option<TargetTotals>,
}

impl Target {
    pub(super) fn new(slot: u16, sample_seed: u64, reply: Option<AttachReply>) -> Self {
        Self {
            slot,
            has_slot: true,
            serial: 0,
            is_shared: false,
            is_by_rule: false,
            child: None,
            mode: ModeChoice::default(),
            is_unwanted: false,
            sample_seed,
            state: State::Scanning,
            holder: Holder::Nobody,
            choice: Choice::Open,
            is_hooking: false,
            is_clearing: false,
            stale_plans: 0,
            waiting_modules: Vec::new(),
            stopped: StoppedTime::default(),
            shards_given_back: 0,
            image_bytes: 0,
            reply,
            leaving: Leaving::default(),
            images: Vec::new(),
            replaced: Counted::default(),
            is_lost: false,
            is_probed_anew: false,
            probed: HashSet::new(),
            pending_mappings: Vec::new(),
            seen_files: HashSet::new(),
            malloc_files: HashSet::new(),
            sites: BTreeSet::new(),
            modules: BTreeSet::new(),
            next_site: 0,
            jobs: 0,
            exit_seen: false,
            exit_watch: None,
            since: Instant::now(),
            attach_time: Duration::ZERO,
            detach_time: None,
            swept_losses: [0; COUNTERS],
            execs_told: 0,
            tables: HashMap::new(),
            compiling: HashSet::new(),
            mapped_ns: HashMap::new(),
            list: None,
            rescanned: None,
            next_totals_base: Some(TargetTotals::default()),
        }
    }

    /// Whether its mappings may be read again: that costs, and code that no mapping
    /// holds would have it done all the time.
    pub(super) fn may_rescan(&mut self) -> bool {
        let may = self
            .rescanned
            .is_none_or(|last| last.elapsed() >= RESCAN_EVERY);
        if may {
            self.rescanned = Some(Instant::now());
        }
        may
    }

    /// The Go program that it is now, if it is one that is read.
    fn go(&self) -> Option<&GoTarget> {
        self.images.last()?.go.as_ref()?.target()
    }

    /// The version of Go that built it.
    pub(super) fn go_version(&self) -> Option<String> {
        Some(self.go()?.source().program().version().to_owned())
    }

    /// The files that its profiles come from: those that are probed, and a Go program's.
    pub(super) fn modules_read(&self) -> Vec<String> {
        let mut modules = self.modules.clone();
        modules.extend(self.go().map(|go| {
            let file = go.source().program().file();
            file.path.to_string_lossy().into_owned()
        }));
        modules.into_iter().collect()
    }

    /// Nothing more is to come of it.
    pub(super) fn end(&mut self, losses: [u64; COUNTERS]) {
        self.state = State::Ended;
        self.exit_watch = None;
        drop(self.end_stubs());
        self.image_bytes = 0;
        // BPF walks no stack of it any more.
        self.list = None;
        self.tables.clear();
        if let Some(image) = self.images.last_mut() {
            image.end(losses);
        }
    }

    /// When it ended; none if it has not.
    pub(super) fn ended(&self) -> Option<Instant> {
        self.images.last().and_then(Image::until)
    }

    pub(super) fn current(&mut self) -> Option<&mut Image> {
        self.images.last_mut()
    }

    /// Whether it is alive and traced.
    pub(super) const fn is_live(&self) -> bool {
        !matches!(self.state, State::Ended)
    }
}
