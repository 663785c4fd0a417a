//! Attaches the programs to sites and takes them off again.
//!
//! Links cost milliseconds to make and tens of milliseconds to undo (the kernel
//! waits until no CPU runs the program), so a [`Prober`] lives on a thread of its
//! own, links carry as many sites as the kernel lets them, and those that go
//! together are closed by several threads at once.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    thread,
};

use aya::Ebpf;
use memprof_common::{
    config::{AttachCookie, Places},
    function::Function,
    prefilter::SiteKind,
};
use thiserror::Error;

use super::{
    mode::ProbeMode,
    programs::{EVERY_PROCESS, Event, Link, LinkError, Programs},
    seccomp::{self, SeccompError},
    uprobe_multi::Place,
};
use crate::address::FileOffset;

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
    /// Its name.
    pub symbol: &'static str,
    /// Number of the site within its target.
    pub number: u16,
    /// Where its arguments are, if it is probed by that.
    pub places: Option<Places>,
    /// Of a function that may throw, and of a pool's: where in the file it returns. If a pool's
    /// has none, it has a return probe.
    pub returns: Vec<FileOffset>,
    /// Of a function that gives blocks up: where it passes one on to another.
    pub passes_on: Vec<FileOffset>,
}

impl Site {
    fn place_at(&self, owner: Owner, file_offset: FileOffset) -> Place {
        let cookie = match owner {
            Owner::Target { slot, .. } => AttachCookie::new(slot, self.number, self.function),
            Owner::Everyone => AttachCookie::shared(self.number, self.function),
        };
        let cookie = match self.places {
            Some(places) => cookie.with_places(places),
            None => cookie,
        };
        let cookie = match self.has_return_probe() {
            true => cookie.with_return_probe(),
            false => cookie,
        };
        Place {
            file_offset: file_offset.0,
            cookie: cookie.0,
        }
    }

    /// Whether it is a pool's whose returns are not known.
    const fn has_return_probe(&self) -> bool {
        self.function.is_pool() && self.returns.is_empty()
    }

    /// Where in the file the probes for an event go.
    fn offsets(&self, event: Event) -> Vec<FileOffset> {
        match event {
            Event::PassesOn => self.passes_on.clone(),
            Event::PlacedReturn => self.returns.clone(),
            Event::PlacedExit if !self.has_return_probe() => Vec::new(),
            _ => vec![self.file_offset],
        }
    }

    /// `realloc` and its kin give blocks up too.
    const fn reallocates(&self) -> bool {
        self.function.reallocates()
    }
}

/// Whose calls a probe is for.
#[derive(Clone, Copy, Debug)]
enum Owner {
    /// Those of the target in a slot, a process.
    Target { slot: u16, pid: u32 },
    /// Those of every process that maps the file.
    Everyone,
}

impl Owner {
    const fn pid(self) -> u32 {
        match self {
            Self::Target { pid, .. } => pid,
            Self::Everyone => EVERY_PROCESS,
        }
    }
}

/// A file: `st_dev` and `st_ino`.
pub type FileId = (u64, u64);

/// A site of a prefilter's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSite {
    /// Where in the file that the image is mapped from.
    pub file_offset: FileOffset,
    /// What passes there.
    pub kind: SiteKind,
}

impl ImageSite {
    const fn place(&self, slot: u16) -> Place {
        Place {
            file_offset: self.file_offset.0,
            cookie: AttachCookie::of_site(slot, self.kind).0,
        }
    }
}

/// Why sites could not be probed. No probe of the request stays behind.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The process is gone.
    #[error("the process exited while probes were being attached")]
    Exited,
    /// The kernel refused.
    #[error("cannot probe {functions} in {}", path.display())]
    Refused {
        /// The functions, each with its file offset.
        functions: String,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: LinkError,
    },
    /// The kernel refused to probe a prefilter's image.
    #[error("cannot probe the image that was put into the process")]
    Image(#[source] LinkError),
    /// Probing would or might kill the process.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// Probing every process would or might kill some.
    #[error("probes in all processes are not safe on this host")]
    SeccompOfAny(#[source] SeccompError),
    /// The thread that attaches is gone.
    #[error("the thread that attaches probes has ended")]
    Gone,
}

/// The links of one target, in the order in which they are taken off: no call
/// begins that would miss its return, and no block is handed out whose free would
/// be missed.
#[derive(Default)]
struct Links {
    alloc_entries: Vec<Link>,
    alloc_returns: Vec<Link>,
    free_entries: Vec<Link>,
    free_returns: Vec<Link>,
}

impl Links {
    fn extend(&mut self, more: Self) {
        self.alloc_entries.extend(more.alloc_entries);
        self.alloc_returns.extend(more.alloc_returns);
        self.free_entries.extend(more.free_entries);
        self.free_returns.extend(more.free_returns);
    }

    /// Those for an event of functions that give blocks up and hand none out, or of others.
    const fn of(&mut self, event: Event, gives_up: bool) -> &mut Vec<Link> {
        let is_return = matches!(
            event,
            Event::AllocReturn | Event::PlacedReturn | Event::PlacedExit
        );
        match (gives_up, is_return) {
            (true, true) => &mut self.free_returns,
            (true, false) => &mut self.free_entries,
            (false, true) => &mut self.alloc_returns,
            (false, false) => &mut self.alloc_entries,
        }
    }
}

/// The loaded programs and their links.
pub struct Prober {
    /// Holds the tracepoints.
    _ebpf: Ebpf,
    programs: Programs,
    mode: ProbeMode,
    targets: HashMap<u16, Links>,
    /// What is every process's, by file.
    shared: HashMap<FileId, Links>,
    /// Whether return probes kill processes under a seccomp filter, once tried.
    seccomp_trial: Option<Result<(), SeccompError>>,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober")
            .field("mode", &self.mode)
            .field("targets", &self.targets.len())
            .finish_non_exhaustive()
    }
}

impl Prober {
    pub(super) fn new(ebpf: Ebpf, programs: Programs, mode: ProbeMode) -> Self {
        Self {
            _ebpf: ebpf,
            programs,
            mode,
            targets: HashMap::new(),
            shared: HashMap::new(),
            seccomp_trial: None,
        }
    }

    /// How it attaches.
    #[must_use]
    pub const fn mode(&self) -> ProbeMode {
        self.mode
    }

    /// Probes `sites` of process `pid`, the target in `slot`; all of them or
    /// none.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach(&mut self, slot: u16, pid: u32, sites: &[Site]) -> Result<(), AttachError> {
        self.require_harmless(pid)?;
        let mut links = Links::default();
        if let Err(error) = self.attach_sites(Owner::Target { slot, pid }, sites, &mut links) {
            detach_links(links);
            return Err(error);
        }
        self.targets.entry(slot).or_default().extend(links);
        Ok(())
    }

    /// Probes `sites` of a file for every process that maps it, now or later; all of them
    /// or none.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach_shared(&mut self, file: FileId, sites: &[Site]) -> Result<(), AttachError> {
        // Nobody is asked whether a filter confines it, and anyone may be.
        self.try_out_seccomp().map_err(AttachError::SeccompOfAny)?;
        let mut links = Links::default();
        if let Err(error) = self.attach_sites(Owner::Everyone, sites, &mut links) {
            detach_links(links);
            return Err(error);
        }
        self.shared.entry(file).or_default().extend(links);
        Ok(())
    }

    /// Takes the probes off that are every process's in a file.
    pub fn detach_shared(&mut self, file: FileId) {
        if let Some(links) = self.shared.remove(&file) {
            detach_links(links);
        }
    }

    /// In an order in which nothing is missed that matters: a block that is
    /// sampled must not be freed unseen, and a call whose entry was seen must not
    /// return unseen. So frees come first, then returns, then entries, those that
    /// give blocks up too before the others.
    fn attach_sites(
        &mut self,
        owner: Owner,
        sites: &[Site],
        links: &mut Links,
    ) -> Result<(), AttachError> {
        let (frees, mut allocs): (Vec<&Site>, Vec<&Site>) =
            sites.iter().partition(|site| site.function.is_free());
        allocs.sort_by_key(|site| !site.reallocates());
        let is_placed = |site: &&Site| site.places.is_some();
        let (placed_frees, frees): (Vec<&Site>, Vec<&Site>) =
            frees.into_iter().partition(is_placed);
        let (placed, allocs): (Vec<&Site>, Vec<&Site>) = allocs.into_iter().partition(is_placed);
        for (event, sites, gives_up) in [
            (Event::FreeEntry, &frees, true),
            (Event::PassesOn, &frees, true),
            (Event::PlacedReturn, &placed_frees, true),
            (Event::PlacedExit, &placed_frees, true),
            (Event::PlacedFree, &placed_frees, true),
            (Event::AllocReturn, &allocs, false),
            (Event::PlacedReturn, &placed, false),
            (Event::PlacedExit, &placed, false),
            (Event::AllocEntry, &allocs, false),
            (Event::PlacedEntry, &placed, false),
        ] {
            let links = links.of(event, gives_up);
            let mut files: BTreeMap<&Path, Vec<&Site>> = BTreeMap::new();
            for &site in sites {
                files.entry(&site.path).or_default().push(site);
            }
            for (path, sites) in files {
                let mut places: Vec<Place> = sites
                    .iter()
                    .flat_map(|site| {
                        let offsets = site.offsets(event).into_iter();
                        offsets.map(|offset| site.place_at(owner, offset))
                    })
                    .collect();
                // Functions have returns in common, where they end by a jump to the same one.
                places.sort_by_key(|place| place.file_offset);
                places.dedup_by_key(|place| place.file_offset);
                let attached = self
                    .programs
                    .attach(event, path, &places, owner.pid())
                    .map_err(|error| refused(path, &sites, error))?;
                links.extend(attached);
            }
        }
        Ok(())
    }

    /// Probes `sites` of a prefilter's image in process `pid`, the target in `slot`; all of
    /// them or none. `path` leads to the file that the image is mapped from:
    /// `/proc/self/fd/N`.
    ///
    /// No process is too confined for it. What may kill one is a system call that it does
    /// not make itself: the one that probed returns make, and no return is probed here; and
    /// since Linux 6.18 the one that a probe on a 5-byte `nop` makes, which a site is not
    /// (`can_optimize` in arch/x86/kernel/uprobes.c), and which filters do not see.
    ///
    /// # Errors
    ///
    /// [`AttachError`].
    pub fn attach_image(
        &mut self,
        slot: u16,
        pid: u32,
        path: &Path,
        sites: &[ImageSite],
    ) -> Result<(), AttachError> {
        let (allocs, frees): (Vec<&ImageSite>, Vec<&ImageSite>) =
            sites.iter().partition(|site| site.kind == SiteKind::Alloc);
        let mut attach = |sites: &[&ImageSite]| {
            let places: Vec<Place> = sites.iter().map(|site| site.place(slot)).collect();
            self.programs
                .attach(Event::Site, path, &places, pid)
                .map_err(|error| match error {
                    LinkError::Exited => AttachError::Exited,
                    error => AttachError::Image(error),
                })
        };
        // In the order of `attach_sites`, for the same reason.
        let frees = attach(&frees)?;
        let allocs = attach(&allocs)?;
        let held = self.targets.entry(slot).or_default();
        held.free_entries.extend(frees);
        held.alloc_entries.extend(allocs);
        Ok(())
    }

    /// Some kernels kill a process under a seccomp filter when a probed function
    /// returns.
    fn require_harmless(&mut self, pid: u32) -> Result<(), AttachError> {
        if !seccomp::is_confined(pid) {
            return Ok(());
        }
        Ok(self.try_out_seccomp()?)
    }

    /// Tries once what a probed return does to a confined process.
    fn try_out_seccomp(&mut self) -> Result<(), SeccompError> {
        if self.seccomp_trial.is_none() {
            let programs = &mut self.programs;
            let trial = seccomp::try_out(|path, file_offset, child| {
                let place = Place {
                    file_offset,
                    // A slot that belongs to nobody: nothing is recorded.
                    cookie: AttachCookie::new(u16::MAX, 0, Function::Malloc).0,
                };
                programs.attach_to_return(path, place, child)
            });
            self.seccomp_trial = Some(trial);
        }
        match &self.seccomp_trial {
            Some(Err(error)) => Err(error.clone()),
            _ => Ok(()),
        }
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
        let shared = self.shared.drain().map(|(_, links)| links);
        for links in self.targets.drain().map(|(_, links)| links).chain(shared) {
            all.extend(links);
        }
        detach_links(all);
    }
}

fn refused(path: &Path, sites: &[&Site], error: LinkError) -> AttachError {
    if matches!(error, LinkError::Exited) {
        return AttachError::Exited;
    }
    let functions: Vec<String> = sites
        .iter()
        .map(|site| format!("{} at file offset {}", site.symbol, site.file_offset))
        .collect();
    AttachError::Refused {
        functions: functions.join(", "),
        path: path.to_owned(),
        source: error,
    }
}

/// How many links are closed at the same time. The kernel makes each wait for
/// the same grace periods, so they may as well wait together.
const DETACH_THREADS: usize = 16;

fn detach_links(links: Links) {
    detach_batch(links.alloc_entries);
    detach_batch(links.alloc_returns);
    detach_batch(links.free_entries);
    detach_batch(links.free_returns);
}

fn detach_batch(mut links: Vec<Link>) {
    thread::scope(|scope| {
        let share = links.len().div_ceil(DETACH_THREADS).max(1);
        while !links.is_empty() {
            let batch = links.split_off(links.len().saturating_sub(share));
            scope.spawn(move || drop(batch));
        }
    });
}

#[cfg(test)]
#[path = "sites_tests.rs"]
mod tests;
