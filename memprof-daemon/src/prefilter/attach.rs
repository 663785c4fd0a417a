//! Puts the prefilter into a process: `docs/prefilter.md` has a row for each step.
//!
//! Everything here runs on one thread from start to end, since ptrace wants that, and
//! blocks. Whatever fails, the process is put back to what it was.

use std::{
    fs::File,
    ops::Range,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use memprof_common::prefilter::{PRIVATE_ENABLED, SiteKind};

use super::{
    data::SharedData,
    detach::{self, unmap},
    error::PrefilterError,
    hooks::Hook,
    image::Patch,
    layout::Geometry,
    map::{self, Mapped},
    remote,
    step::{self, Step},
    stop::Stopped,
    stop_error::StopError,
    tracer::Tracer,
};
use crate::{address::FileOffset, process::exit::ExitWatch};

/// From one try to stop the process where nobody is in the way to the next.
const RETRY: Duration = Duration::from_millis(5);

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
    fn one(self, tracer: &Tracer, pid: u32, deadline: Instant) -> Result<Stopped, StopError> {
        match self {
            Self::Seize => Stopped::one(tracer, pid, deadline),
            Self::Held => Stopped::held(tracer, pid, deadline),
        }
    }

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

/// What is wanted.
#[derive(Debug)]
pub struct Order<'a> {
    /// The process.
    pub process: &'a ExitWatch,
    /// How it is stopped.
    pub grip: Grip,
    /// What to hook.
    pub modules: &'a [ModuleHooks],
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

    /// Where its data is, for modules that come later.
    #[must_use]
    pub fn place(&self) -> DataPlace {
        self.data.clone()
    }

    /// Takes over what came later.
    pub fn absorb(&mut self, later: Self) {
        self.code.extend(later.code);
        self.patches.extend(later.patches);
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
    /// How long the process was stopped.
    pub stopped: StoppedTime,
}

/// Puts stubs for `order.modules` into the process and has its functions jump to them.
///
/// # Errors
///
/// [`PrefilterError`]; nothing of it stays in the process.
pub fn attach(
    tracer: &Tracer,
    order: &Order<'_>,
    probes: &mut dyn SiteProbes,
) -> Result<Attached, PrefilterError> {
    let pid = order.process.pid();
    let mut stopped_time = StoppedTime::default();
    step::done(Step::Checked);
    let mapped = {
        let mut stopped = once_set_up(order, || order.grip.one(tracer, pid, order.deadline))?;
        require_alive(order.process)?;
        let mapped = map::map(order, &mut stopped);
        stopped_time.add(stopped.release()?);
        mapped?
    };
    step::done(Step::Mapped);
    let Mapped {
        image,
        file,
        sites,
        data,
    } = mapped;
    let put = match probes.attach(&file, &sites) {
        Ok(()) => {
            step::done(Step::Probed);
            write_jumps(tracer, order, &image, &mut stopped_time)
        }
        Err(error) => Err(PrefilterError::Sites(error)),
    };
    if let Err(error) = put {
        probes.detach();
        // Nobody has been led there: no thread is within.
        if let Err(left) = unmap(tracer, order.process, order.grip, &image) {
            tracing::warn!(pid, error = %left, "memory that was mapped into a process stays there");
        }
        return Err(error);
    }
    let image = Image {
        files: vec![file],
        ..image
    };
    Ok(Attached {
        image,
        data,
        stopped: stopped_time,
    })
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
            files: Vec::new(),
        }
    }
}

/// Stops a process that may just have begun: a thread that its C library has not set up yet
/// is given the time for it.
fn once_set_up(
    order: &Order<'_>,
    stop: impl Fn() -> Result<Stopped, StopError>,
) -> Result<Stopped, StopError> {
    loop {
        match stop() {
            Err(StopError::NoThreadPointer { .. })
                if order.grip == Grip::Seize && Instant::now() + RETRY < order.deadline =>
            {
                thread::sleep(RETRY);
            }
            stopped => return stopped,
        }
    }
}

/// Stopped, it cannot end and give its pid to another.
fn require_alive(process: &ExitWatch) -> Result<(), PrefilterError> {
    if process.is_alive().unwrap_or(true) {
        Ok(())
    } else {
        let pid = process.pid();
        Err(crate::process::info::ProcessError::NotFound { pid }.into())
    }
}

/// With all threads stopped and none in the way, leads the functions to the stubs, and
/// switches those on.
fn write_jumps(
    tracer: &Tracer,
    order: &Order<'_>,
    image: &Image,
    stopped_time: &mut StoppedTime,
) -> Result<(), PrefilterError> {
    let pid = order.process.pid();
    let displaced: Vec<Range<u64>> = image
        .patches
        .iter()
        .map(|patch| patch.address..patch.address + patch.original.len() as u64)
        .collect();
    loop {
        let stopped = once_set_up(order, || order.grip.all(tracer, pid, order.deadline))?;
        let written = require_alive(order.process).and_then(|()| {
            if stopped.is_anyone_within(&displaced)? {
                return Ok(false);
            }
            write_all(&stopped, image).map(|()| true)
        });
        stopped_time.add(stopped.release()?);
        if written? {
            return Ok(());
        }
        if Instant::now() + RETRY >= order.deadline || order.grip == Grip::Held {
            return Err(PrefilterError::Busy);
        }
        thread::sleep(RETRY);
    }
}

/// In the order of the patches: what gives blocks up first. All or none.
fn write_all(stopped: &Stopped, image: &Image) -> Result<(), PrefilterError> {
    let mut written = Ok(());
    for (number, patch) in image.patches.iter().enumerate() {
        written = stopped
            .write_code(patch.address, &patch.original, &patch.jump)
            .map_err(PrefilterError::from);
        if written.is_err() {
            let done = image.patches.get(..number).unwrap_or_default();
            detach::restore(stopped, done)?;
            break;
        }
    }
    written?;
    if image.owns_data {
        let enabled = set_enabled(stopped, &image.data, true);
        if enabled.is_err() {
            detach::restore(stopped, &image.patches)?;
        }
        enabled?;
        step::done(Step::Enabled);
    }
    Ok(())
}

/// Switches the stubs on or off.
pub(super) fn set_enabled(
    stopped: &Stopped,
    data: &DataPlace,
    enabled: bool,
) -> Result<(), StopError> {
    let word = u64::from(enabled).to_ne_bytes();
    let tid = stopped.any_tid();
    remote::write(tid, data.private + PRIVATE_ENABLED as u64, &word)
        .map_err(|error| StopError::trace(stopped.pid(), tid, "write its memory", error))
}
