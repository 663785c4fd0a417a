//! The probe programs, loaded for one way of attaching.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::{
    Ebpf,
    programs::{
        ProbeKind, ProgramError, UProbe, loaded_programs,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope},
    },
};
use thiserror::Error;

use super::{
    mode::ProbeMode,
    object::{AttachType, LoadError, Object, map_fd},
    tail_calls,
    uprobe_multi::{self, Place, ProbeOn},
    walker::Walker,
};

/// Which programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramSet {
    /// Those that trace, and walk stacks in this way.
    Tracing(Walker),
    /// Empty ones: what the traps alone cost.
    Empty,
    /// Empty ones that leave returns alone.
    EmptyEntriesOnly,
}

/// Names of the programs, which `memprof-ebpf/src/main.rs` defines. One is
/// missing where a set does not probe such an event.
pub(super) struct Names {
    free_entry: &'static str,
    alloc_entry: &'static str,
    alloc_return: Option<&'static str>,
    site: Option<&'static str>,
    passes_on: Option<&'static str>,
    placed_entry: Option<&'static str>,
    placed_return: Option<&'static str>,
    placed_exit: Option<&'static str>,
    placed_free: Option<&'static str>,
}

impl ProgramSet {
    /// In a session one program does both halves of an allocating call.
    const fn names(self, mode: ProbeMode) -> Names {
        let session = matches!(mode, ProbeMode::Session);
        match self {
            Self::Tracing(walker) => Names {
                free_entry: "free_entry",
                alloc_entry: if session {
                    "alloc_session"
                } else {
                    "alloc_entry"
                },
                alloc_return: match walker {
                    _ if session => None,
                    Walker::TailCalls => Some("alloc_return_tail"),
                    Walker::Loop | Walker::FramePointers => Some("alloc_return"),
                },
                site: Some(match walker {
                    Walker::TailCalls => "prefilter_site_tail",
                    Walker::Loop | Walker::FramePointers => "prefilter_site",
                }),
                passes_on: Some("free_passes_on"),
                placed_entry: Some("placed_entry"),
                placed_return: Some(match walker {
                    Walker::TailCalls => "placed_return_tail",
                    Walker::Loop | Walker::FramePointers => "placed_return",
                }),
                placed_exit: Some(match walker {
                    Walker::TailCalls => "placed_exit_tail",
                    Walker::Loop | Walker::FramePointers => "placed_exit",
                }),
                placed_free: Some("placed_free"),
            },
            Self::Empty => Names {
                free_entry: "empty_entry",
                alloc_entry: if session {
                    "empty_session"
                } else {
                    "empty_entry"
                },
                alloc_return: if session { None } else { Some("empty_return") },
                site: None,
                passes_on: None,
                placed_entry: None,
                placed_return: None,
                placed_exit: None,
                placed_free: None,
            },
            Self::EmptyEntriesOnly => Names {
                free_entry: "empty_entry",
                alloc_entry: if session {
                    "empty_session"
                } else {
                    "empty_entry"
                },
                alloc_return: None,
                site: None,
                passes_on: None,
                placed_entry: None,
                placed_return: None,
                placed_exit: None,
                placed_free: None,
            },
        }
    }
}

/// In the place of a pid, to the kernel too: whatever process maps the file.
pub(super) const EVERY_PROCESS: u32 = 0;

/// An event that a program is run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A function that gives blocks up is called.
    FreeEntry,
    /// A function that hands out blocks is called, in a session also its return.
    AllocEntry,
    /// It returns.
    AllocReturn,
    /// A site of a prefilter's image is passed.
    Site,
    /// A function that gives blocks up passes one on.
    PassesOn,
    /// A function that hands out blocks and may throw is called.
    PlacedEntry,
    /// One of its returns is reached.
    PlacedReturn,
    /// A pool's function returns to its return probe.
    PlacedExit,
    /// A pool's function that gives blocks up is called.
    PlacedFree,
}

/// One attached program. Dropping it detaches.
pub(super) enum Link {
    Multi(#[expect(dead_code, reason = "held for its Drop")] OwnedFd),
    Perf(#[expect(dead_code, reason = "held for its Drop")] UProbeLink),
}

/// Why a program could not be attached.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The process is gone.
    #[error("no such process")]
    Exited,
    /// The kernel refused a link of many sites.
    #[error(transparent)]
    Multi(io::Error),
    /// The kernel refused a probe.
    #[error(transparent)]
    Perf(Box<ProgramError>),
}

/// The loaded programs.
pub(super) enum Programs {
    /// Attached by links of many sites.
    Multi {
        alloc_type: AttachType,
        free_entry: OwnedFd,
        alloc_entry: OwnedFd,
        alloc_return: Option<OwnedFd>,
        site: Option<OwnedFd>,
        passes_on: Option<OwnedFd>,
        placed_entry: Option<OwnedFd>,
        placed_return: Option<OwnedFd>,
        placed_exit: Option<OwnedFd>,
        placed_free: Option<OwnedFd>,
    },
    /// Attached by perf events.
    Perf(Box<PerfPrograms>),
}

/// Programs that aya attaches.
pub(super) struct PerfPrograms {
    free_entry: UProbe,
    alloc_entry: UProbe,
    alloc_return: Option<UProbe>,
    site: Option<UProbe>,
    passes_on: Option<UProbe>,
    placed_entry: Option<UProbe>,
    placed_return: Option<UProbe>,
    placed_exit: Option<UProbe>,
    placed_free: Option<UProbe>,
}

impl Programs {
    /// Loads the programs of `ebpf`, which was made of `object` and still holds
    /// all of its maps; `others` take the place of some.
    pub(super) fn load(
        mode: ProbeMode,
        set: ProgramSet,
        object: &[u8],
        ebpf: &Ebpf,
        others: &[(&str, BorrowedFd<'_>)],
    ) -> Result<Self, (&'static str, ProgramLoadError)> {
        let names = set.names(mode);
        let alloc_type = match mode {
            ProbeMode::Session => AttachType::Session,
            ProbeMode::Multi => AttachType::Multi,
            ProbeMode::Perf => AttachType::Perf,
        };
        let object = Object::parse(object, ebpf, others)
            .map_err(|error| (names.alloc_entry, error.into()))?;
        let load = |name: &'static str, attach_type| {
            let program = object
                .load(name, attach_type)
                .map_err(|error| (name, ProgramLoadError::from(error)))?;
            if tracing::enabled!(tracing::Level::DEBUG) {
                let instructions = told(&program, VERIFIED).ok();
                tracing::debug!(name, instructions, "the verifier has passed a program");
            }
            Ok(program)
        };
        if set == ProgramSet::Tracing(Walker::TailCalls) {
            let name = tail_calls::WALK_ON;
            let program = load(name, alloc_type)?;
            ebpf.map(tail_calls::ARRAY)
                .and_then(map_fd)
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
                .and_then(|array| tail_calls::fill(array, program.as_fd()))
                .map_err(|error| (name, ProgramLoadError::Array(error)))?;
        }
        if mode == ProbeMode::Perf {
            let load = |name, kind| {
                let program = load(name, AttachType::Perf)?;
                by_perf(&program, name, kind).map_err(|error| (name, error))
            };
            let at_entry = |name: Option<&'static str>| {
                name.map(|name| load(name, ProbeKind::Entry)).transpose()
            };
            let at_return = |name: Option<&'static str>| {
                name.map(|name| load(name, ProbeKind::Return)).transpose()
            };
            return Ok(Self::Perf(Box::new(PerfPrograms {
                free_entry: load(names.free_entry, ProbeKind::Entry)?,
                alloc_entry: load(names.alloc_entry, ProbeKind::Entry)?,
                alloc_return: at_return(names.alloc_return)?,
                site: at_entry(names.site)?,
                passes_on: at_entry(names.passes_on)?,
                placed_entry: at_entry(names.placed_entry)?,
                placed_return: at_entry(names.placed_return)?,
                placed_exit: at_return(names.placed_exit)?,
                placed_free: at_entry(names.placed_free)?,
            })));
        }
        let alone =
            |name: Option<&'static str>| name.map(|name| load(name, AttachType::Multi)).transpose();
        Ok(Self::Multi {
            alloc_type,
            // Frees need no session.
            free_entry: load(names.free_entry, AttachType::Multi)?,
            alloc_entry: load(names.alloc_entry, alloc_type)?,
            alloc_return: alone(names.alloc_return)?,
            // Nor do sites, which stand for no call that returns.
            site: alone(names.site)?,
            passes_on: alone(names.passes_on)?,
            placed_entry: alone(names.placed_entry)?,
            placed_return: alone(names.placed_return)?,
            placed_exit: alone(names.placed_exit)?,
            placed_free: alone(names.placed_free)?,
        })
    }

    /// Attaches something to the return from one place, in the way that returns
    /// are probed in this mode.
    pub(super) fn attach_to_return(
        &mut self,
        path: &Path,
        place: Place,
        pid: u32,
    ) -> Result<Vec<Link>, LinkError> {
        let Self::Multi { alloc_type, .. } = self else {
            return self.attach(Event::AllocReturn, path, &[place], pid);
        };
        // In a session the tracing program would leave the return alone: the
        // place belongs to no target.
        let on = match alloc_type {
            AttachType::Session => ProbeOn::Entry,
            AttachType::Multi | AttachType::Perf => ProbeOn::Return,
        };
        let program = uprobe_multi::load_empty(*alloc_type)
            .map_err(|error| LinkError::Multi(io::Error::other(error)))?;
        uprobe_multi::attach(program.as_fd(), *alloc_type, on, path, &[place], pid)
            .map(|link| vec![Link::Multi(link)])
            .map_err(LinkError::Multi)
    }

    /// Attaches the program for `event` to places of one file, for the process `pid`
    /// alone or, with [`EVERY_PROCESS`], for each; no link if the set has none for it.
    pub(super) fn attach(
        &mut self,
        event: Event,
        path: &Path,
        places: &[Place],
        pid: u32,
    ) -> Result<Vec<Link>, LinkError> {
        match self {
            Self::Multi {
                alloc_type,
                free_entry,
                alloc_entry,
                alloc_return,
                site,
                passes_on,
                placed_entry,
                placed_return,
                placed_exit,
                placed_free,
            } => {
                let (program, attach_type) = match event {
                    Event::FreeEntry => (Some(free_entry.as_fd()), AttachType::Multi),
                    Event::AllocEntry => (Some(alloc_entry.as_fd()), *alloc_type),
                    Event::AllocReturn => alone(alloc_return.as_ref()),
                    Event::Site => alone(site.as_ref()),
                    Event::PassesOn => alone(passes_on.as_ref()),
                    Event::PlacedEntry => alone(placed_entry.as_ref()),
                    Event::PlacedReturn => alone(placed_return.as_ref()),
                    Event::PlacedExit => alone(placed_exit.as_ref()),
                    Event::PlacedFree => alone(placed_free.as_ref()),
                };
                let on = match event {
                    Event::AllocReturn | Event::PlacedExit => ProbeOn::Return,
                    _ => ProbeOn::Entry,
                };
                let Some(program) = program.filter(|_| !places.is_empty()) else {
                    return Ok(Vec::new());
                };
                uprobe_multi::attach(program, attach_type, on, path, places, pid)
                    .map(|link| vec![Link::Multi(link)])
                    .map_err(|error| match error.raw_os_error() {
                        Some(libc::ESRCH) => LinkError::Exited,
                        _ => LinkError::Multi(error),
                    })
            }
            Self::Perf(programs) => {
                let program = match event {
                    Event::FreeEntry => Some(&mut programs.free_entry),
                    Event::AllocEntry => Some(&mut programs.alloc_entry),
                    Event::AllocReturn => programs.alloc_return.as_mut(),
                    Event::Site => programs.site.as_mut(),
                    Event::PassesOn => programs.passes_on.as_mut(),
                    Event::PlacedEntry => programs.placed_entry.as_mut(),
                    Event::PlacedReturn => programs.placed_return.as_mut(),
                    Event::PlacedExit => programs.placed_exit.as_mut(),
                    Event::PlacedFree => programs.placed_free.as_mut(),
                };
                let Some(program) = program else {
                    return Ok(Vec::new());
                };
                places
                    .iter()
                    .map(|place| attach_by_perf(program, path, *place, pid))
                    .collect()
            }
        }
    }
}

/// A program that needs no session.
fn alone(program: Option<&OwnedFd>) -> (Option<BorrowedFd<'_>>, AttachType) {
    (program.map(|program| program.as_fd()), AttachType::Multi)
}

/// Why a program could not be loaded.
#[derive(Debug, Error)]
pub enum ProgramLoadError {
    /// By aya.
    #[error(transparent)]
    Aya(Box<ProgramError>),
    /// By us.
    #[error(transparent)]
    Multi(#[from] LoadError),
    /// It is loaded, and no tail call will find it.
    #[error("cannot put it into an array of programs")]
    Array(#[source] io::Error),
}

/// A line of what the kernel says of a program's descriptor
/// (kernel/bpf/syscall.c, `bpf_prog_show_fdinfo`): which of all programs it is ...
const ID: &str = "prog_id:";
/// ... and how many instructions the verifier has looked at, since Linux 5.16.
const VERIFIED: &str = "verified_insns:";

fn told(program: &OwnedFd, line: &str) -> io::Result<u32> {
    let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
    fs::read_to_string(path)?
        .lines()
        .find_map(|text| text.strip_prefix(line)?.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("no `{line}`")))
}

/// Hands a loaded program to aya, which attaches by perf event. aya knows programs by
/// what the kernel says of them.
fn by_perf(
    program: &OwnedFd,
    name: &'static str,
    kind: ProbeKind,
) -> Result<UProbe, ProgramLoadError> {
    let lost = |what: String| {
        ProgramLoadError::from(LoadError::Object(format!("`{name}` is loaded, but {what}")))
    };
    let id = told(program, ID).map_err(|error| lost(error.to_string()))?;
    let info = loaded_programs()
        .filter_map(Result::ok)
        .find(|info| info.id() == id)
        .ok_or_else(|| lost("the kernel does not know it".to_owned()))?;
    // SAFETY: the object has it as a uprobe's or a uretprobe's program, as `kind` says.
    unsafe { UProbe::from_program_info(info, name.into(), kind) }
        .map_err(|error| ProgramLoadError::Aya(Box::new(error)))
}

fn attach_by_perf(
    program: &mut UProbe,
    path: &Path,
    place: Place,
    pid: u32,
) -> Result<Link, LinkError> {
    let scope =
        std::num::NonZeroU32::new(pid).map_or(UProbeScope::AllProcesses, UProbeScope::OneProcess);
    let point = UProbeAttachPoint {
        location: UProbeAttachLocation::AbsoluteOffset(place.file_offset),
        cookie: Some(place.cookie),
    };
    program
        .attach(point, path, scope)
        .and_then(|link| program.take_link(link))
        .map(Link::Perf)
        .map_err(|error| {
            if is_no_such_process(&error) {
                LinkError::Exited
            } else {
                LinkError::Perf(Box::new(error))
            }
        })
}

/// Whether the error is the kernel's ESRCH, however deep aya wraps it.
fn is_no_such_process(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.raw_os_error() == Some(libc::ESRCH)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
#[path = "programs_tests.rs"]
mod tests;
