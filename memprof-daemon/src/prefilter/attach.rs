//! Puts the prefilter into a process: `docs/prefilter.md` has a row for each step.
//!
//! Everything here runs on one thread from start to end, since ptrace wants that, and
//! blocks. Whatever fails, the process is put back to what it was.

use std::{
    fmt,
    fs::File,
    ops::Range,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use memprof_common::prefilter::{PRIVATE_FLAG_BYTES, PRIVATE_OWNER, SHARD_BYTES, SiteKind};

use super::{
    data::SharedData,
    detach::unmap,
    error::PrefilterError,
    hooks::Hook,
    image::Patch,
    jumps::{RETRY, once_set_up, require_alive, write_jumps},
    layout::Geometry,
    map,
    moves::Move,
    plan::{self, Plan},
    stack_rows::FileRows,
    step::{self, Step},
    stop::Stopped,
    stop_error::StopError,
    tracer::Tracer,
};
use crate::{address::FileOffset, process::exit::ExitWatch};

/// How often a plan is made: one may be out of date before it is carried out.
const PLANS: u32 = 5;

/// How the process is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grip {
    /// By us, each time for as long as it takes.
    Seize,
    /// It is stopped: the calling thread holds its only thread by ptrace, at the end of a
    /// system call.
    Held,
}

impl Grip {
    pub(super) fn all(
        self,
        tracer: &Tracer,
        pid: u32,
        deadline: Instant,
    ) -> Result<Stopped, StopError> {
        match self {
            Self::Seize => Stopped::all(tracer, pid, deadline),
            Self::Held => Stopped::held(tracer, pid, deadline),
        }
    }
}

/// The functions of one file that are to be hooked.
#[derive(Debug)]
pub struct ModuleHooks {
    /// The file.
    pub path: PathBuf,
    /// Its functions.
    pub hooks: Vec<Hook>,
}

/// Who finds what to hook.
pub trait FindHooks: fmt::Debug + Sync {
    /// What to hook in the program that is there now.
    ///
    /// # Errors
    ///
    /// Why it cannot be hooked.
    fn find(&self) -> Result<Vec<ModuleHooks>, PrefilterError>;
}

/// What is wanted.
#[derive(Debug)]
pub struct Order<'a> {
    /// The process.
    pub process: &'a ExitWatch,
    /// How it is stopped.
    pub grip: Grip,
    /// What to hook, in the program that is there now. Asked again if that was replaced.
    pub find: &'a dyn FindHooks,
    /// The image that is in it already, if these modules come later.
    pub image: Option<DataPlace>,
    /// How large the shared data is to be, if there is none yet.
    pub geometry: Geometry,
    /// Mean sampling gap.
    pub interval_bytes: u64,
    /// Of the gaps' random numbers.
    pub seed: u64,
    /// When to give up.
    pub deadline: Instant,
}

/// Where the data is in the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPlace {
    /// All of it.
    pub range: Range<u64>,
    /// The private part.
    pub private: u64,
    /// How large its tables are.
    pub geometry: Geometry,
}

impl DataPlace {
    /// Where the thread pointer of a shard's owner is; the word behind it is the owner's call.
    pub(super) const fn owner_at(&self, shard: usize) -> u64 {
        self.private + (PRIVATE_FLAG_BYTES + shard * SHARD_BYTES + PRIVATE_OWNER) as u64
    }
}

/// Who probes the sites of an image.
pub trait SiteProbes {
    /// Probes the places of `file`.
    ///
    /// # Errors
    ///
    /// If not all could be probed; then none is.
    fn attach(
        &mut self,
        file: &File,
        sites: &[(SiteKind, FileOffset)],
    ) -> Result<(), crate::probe::attach::AttachError>;

    /// Takes the probes of the last `attach` off.
    fn detach(&mut self);
}

/// What of us is in a process.
#[derive(Debug)]
pub struct Image {
    /// The data.
    pub(super) data: DataPlace,
    /// The data was mapped with this image, not with an earlier one.
    pub(super) owns_data: bool,
    /// The private part may have been set to zeros since the stubs ran, or is not there.
    pub(super) is_wiped: bool,
    /// The stubs.
    pub(super) code: Vec<Range<u64>>,
    /// What was changed of the process's own.
    pub(super) patches: Vec<Patch>,
    /// Places in functions and in the code that mean the same; none if another daemon made it.
    pub(super) moves: Vec<Move>,
    /// The memory files: their uprobes need them, and a lock on them says that we live.
    files: Vec<File>,
}

impl Image {
    /// Bytes that are mapped into the process.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let length = |range: &Range<u64>| range.end - range.start;
        let data = if self.owns_data {
            length(&self.data.range)
        } else {
            0
        };
        data + self.code.iter().map(length).sum::<u64>()
    }

    /// Whether an address is of its code.
    pub(super) fn has_code_at(&self, address: u64) -> bool {
        self.code.iter().any(|range| range.contains(&address))
    }

    /// The same, to be looked at while it is in use elsewhere: what was changed is not in it.
    #[must_use]
    pub fn outline(&self) -> Self {
        let (data, code) = (self.data.clone(), self.code.clone());
        Self {
            is_wiped: self.is_wiped,
            ..Self::new(data, self.owns_data, code, Vec::new())
        }
    }

    /// Where its data is, for modules that come later.
    #[must_use]
    pub fn place(&self) -> DataPlace {
        self.data.clone()
    }

    /// Takes over what came later.
    pub fn absorb(&mut self, later: Self) {
        self.code.extend(later.code);
        self.patches.extend(later.patches);
        self.moves.extend(later.moves);
        self.files.extend(later.files);
    }
}

/// For how long threads of a process stood still because of us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoppedTime {
    /// The last time.
    pub last: Duration,
    /// The longest.
    pub max: Duration,
}

impl StoppedTime {
    pub(super) fn add(&mut self, time: Duration) {
        self.last = time;
        self.max = self.max.max(time);
    }

    /// Takes what came later into account.
    pub fn join(&mut self, later: Self) {
        self.last = later.last;
        self.max = self.max.max(later.max);
    }
}

/// What has come of it.
#[derive(Debug)]
pub struct Attached {
    /// What is in the process.
    pub image: Image,
    /// The daemon's view of the data; none if it was there before.
    pub data: Option<SharedData>,
    /// How stacks are walked through it.
    pub rows: FileRows,
    /// How long the process was stopped.
    pub stopped: StoppedTime,
}

/// Puts stubs for what is to be hooked into the process and has its functions jump to them. If
/// the program is replaced meanwhile, the new one gets them.
///
/// # Errors
///
/// [`PrefilterError`]; nothing of it stays in the process.
pub fn attach(
    tracer: &Tracer,
    order: &Order<'_>,
    probes: &mut dyn SiteProbes,
) -> Result<Attached, PrefilterError> {
    let mut time = StoppedTime::default();
    for _ in 1..PLANS {
        match attach_as_planned(tracer, order, probes, &mut time) {
            Err(PrefilterError::Stale) if Instant::now() + RETRY < order.deadline => {
                thread::sleep(RETRY);
            }
            outcome => return outcome,
        }
    }
    attach_as_planned(tracer, order, probes, &mut time)
}

fn attach_as_planned(
    tracer: &Tracer,
    order: &Order<'_>,
    probes: &mut dyn SiteProbes,
    time: &mut StoppedTime,
) -> Result<Attached, PrefilterError> {
    let pid = order.process.pid();
    let modules = order.find.find()?;
    let mut plan = plan::plan(order, &modules)?;
    step::done(Step::Checked);
    let file = {
        // All threads: beside others that run, those that make calls would wait for a processor
        // at each.
        let mut stopped = once_set_up(order, || order.grip.all(tracer, pid, order.deadline))?;
        let mapped = require_alive(order.process).and_then(|()| {
            if !plan.is_right_for(&stopped)? {
                return Err(PrefilterError::Stale);
            }
            map::map(order, &plan, &mut stopped)
        });
        time.add(stopped.release()?);
        mapped?
    };
    step::done(Step::Mapped);
    let image = plan.image();
    let code = plan.rows();
    let put = make_data(order, &plan, &file).and_then(|data| {
        let metadata = file
            .metadata()
            .map_err(PrefilterError::io("look at the memory file"))?;
        probes
            .attach(&file, &plan.sites)
            .map_err(PrefilterError::Sites)?;
        step::done(Step::Probed);
        let written = write_jumps(tracer, order, &image, time);
        if written.is_err() {
            probes.detach();
        }
        let rows = FileRows {
            device: metadata.dev(),
            inode: metadata.ino(),
            code,
        };
        written.map(|()| (data, rows))
    });
    match put {
        Ok((data, rows)) => Ok(Attached {
            image: Image {
                files: vec![file],
                ..image
            },
            data,
            rows,
            stopped: *time,
        }),
        Err(error) => {
            // Nobody has been led there: no thread is within.
            if let Err(left) = unmap(tracer, order.process, order.grip, &image) {
                tracing::warn!(pid, error = %left, "memory that was mapped into a process stays there");
            }
            Err(error)
        }
    }
}

/// The daemon's view of the data that the process has mapped, filled: nothing uses it yet.
fn make_data(
    order: &Order<'_>,
    plan: &Plan,
    file: &File,
) -> Result<Option<SharedData>, PrefilterError> {
    if !plan.owns_data {
        return Ok(None);
    }
    let mut data = SharedData::new(file, 0, plan.place.geometry)
        .map_err(PrefilterError::io("map the memory file"))?;
    data.start(order.interval_bytes, order.seed);
    Ok(Some(data))
}

impl Image {
    pub(super) const fn new(
        data: DataPlace,
        owns_data: bool,
        code: Vec<Range<u64>>,
        patches: Vec<Patch>,
    ) -> Self {
        Self {
            data,
            owns_data,
            is_wiped: false,
            code,
            patches,
            moves: Vec::new(),
            files: Vec::new(),
        }
    }

    pub(super) fn with_moves(self, moves: Vec<Move>) -> Self {
        Self { moves, ..self }
    }
}
