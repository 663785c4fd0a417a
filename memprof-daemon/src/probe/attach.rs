//! Attaches the programs to sites and takes them off again.
//!
//! Links cost milliseconds to make and tens of milliseconds to undo (the kernel
//! waits until no CPU runs the program), so a [`Prober`] lives on a thread of its
//! own, and links that go together are closed by several threads at once.
//!
//! One single uprobe by perf event for each site. aya 0.16 attaches uprobe_multi
//! itself; until then everything that knows about the way of attaching is here.

use std::{collections::HashMap, num::NonZeroU32, path::PathBuf, thread};

use aya::{
    Ebpf,
    programs::{
        ProgramError, UProbe,
        uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope},
    },
};
use memprof_common::{config::AttachCookie, function::Function};
use thiserror::Error;

use super::loader::{ALLOC_ENTRY, ALLOC_RETURN, FREE_ENTRY};
use crate::address::FileOffset;

/// How probes are attached: the name of the only mode so far.
pub const MODE: &str = "perf";

/// One place to probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// A path that leads to the very file the target maps, whatever its name by
    /// now: `/proc/self/fd/N`.
    pub path: PathBuf,
    /// Where in the file.
    pub file_offset: FileOffset,
    /// What is there.
    pub function: Function,
    /// Number of the site within its target.
    pub number: u16,
}

/// Why a site could not be probed. No probe of the request stays behind.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The process is gone.
    #[error("the process exited while probes were being attached")]
    Exited,
    /// The kernel refused.
    #[error("cannot probe {} at file offset {file_offset} of {path}", function.symbol())]
    Refused {
        /// The function.
        function: Function,
        /// The place.
        file_offset: FileOffset,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: Box<ProgramError>,
    },
    /// The thread that attaches is gone.
    #[error("the thread that attaches probes has ended")]
    Gone,
}

/// The links of one target.
#[derive(Default)]
struct Links {
    entries: Vec<UProbeLink>,
    returns: Vec<UProbeLink>,
}

/// The loaded programs and their links.
pub struct Prober {
    ebpf: Ebpf,
    targets: HashMap<u16, Links>,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober")
            .field("targets", &self.targets.len())
            .finish_non_exhaustive()
    }
}

impl Prober {
    pub(super) fn new(ebpf: Ebpf) -> Self {
        Self {
            ebpf,
            targets: HashMap::new(),
        }
    }

    /// Probes `sites` of process `pid`, the target in `slot`; all of them or
    /// none.
    ///
    /// A function's return is probed before its entry: a call whose entry was
    /// seen must not return unseen.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach(&mut self, slot: u16, pid: u32, sites: &[Site]) -> Result<(), AttachError> {
        let mut links = Links::default();
        for site in sites {
            if let Err(error) = self.attach_site(slot, pid, site, &mut links) {
                detach_links(links);
                return Err(error);
            }
        }
        let held = self.targets.entry(slot).or_default();
        held.entries.extend(links.entries);
        held.returns.extend(links.returns);
        Ok(())
    }

    fn attach_site(
        &mut self,
        slot: u16,
        pid: u32,
        site: &Site,
        links: &mut Links,
    ) -> Result<(), AttachError> {
        if site.function.is_free() {
            links
                .entries
                .push(self.attach_program(FREE_ENTRY, slot, pid, site)?);
        } else {
            links
                .returns
                .push(self.attach_program(ALLOC_RETURN, slot, pid, site)?);
            links
                .entries
                .push(self.attach_program(ALLOC_ENTRY, slot, pid, site)?);
        }
        Ok(())
    }

    fn attach_program(
        &mut self,
        name: &str,
        slot: u16,
        pid: u32,
        site: &Site,
    ) -> Result<UProbeLink, AttachError> {
        let pid = NonZeroU32::new(pid).ok_or(AttachError::Exited)?;
        let refused = |source: ProgramError| {
            if is_no_such_process(&source) {
                AttachError::Exited
            } else {
                AttachError::Refused {
                    function: site.function,
                    file_offset: site.file_offset,
                    path: site.path.clone(),
                    source: Box::new(source),
                }
            }
        };
        let program: &mut UProbe = self
            .ebpf
            .program_mut(name)
            .ok_or(AttachError::Gone)?
            .try_into()
            .map_err(refused)?;
        let point = UProbeAttachPoint {
            location: UProbeAttachLocation::AbsoluteOffset(site.file_offset.0),
            cookie: Some(AttachCookie::new(slot, site.number, site.function).0),
        };
        program
            .attach(point, &site.path, UProbeScope::OneProcess(pid))
            .and_then(|link| program.take_link(link))
            .map_err(refused)
    }

    /// Takes every probe of the target in `slot` off; returns when the last is
    /// gone.
    pub fn detach(&mut self, slot: u16) {
        if let Some(links) = self.targets.remove(&slot) {
            detach_links(links);
        }
    }

    /// Takes every probe of every target off.
    pub fn detach_all(&mut self) {
        let mut all = Links::default();
        for (_, links) in self.targets.drain() {
            all.entries.extend(links.entries);
            all.returns.extend(links.returns);
        }
        detach_links(all);
    }
}

/// Whether the error is the kernel's ESRCH, however deep aya wraps it.
fn is_no_such_process(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.raw_os_error() == Some(libc::ESRCH)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// How many links are closed at the same time. The kernel makes each wait for
/// the same grace periods, so they may as well wait together.
const DETACH_THREADS: usize = 16;

/// Entries first: no call begins that would miss its return.
fn detach_links(links: Links) {
    detach_batch(links.entries);
    detach_batch(links.returns);
}

fn detach_batch(mut links: Vec<UProbeLink>) {
    thread::scope(|scope| {
        let share = links.len().div_ceil(DETACH_THREADS).max(1);
        while !links.is_empty() {
            let batch = links.split_off(links.len().saturating_sub(share));
            scope.spawn(move || drop(batch));
        }
    });
}
