//! Files with allocators that are probed once for all processes that map them.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use memprof_common::function::Function;
use tracing::{info, warn};

use super::{Command, Tracer, system::System};
use crate::{
    causes::with_causes,
    export::profile::ProbeSite,
    pipeline::target::{probed_site, shown_site},
    probe::{
        attach::{AttachError, FileId, Site},
        find::AllocatorModule,
    },
};

/// A file that nobody maps any more is probed so long: holding it keeps its file system
/// busy, and to probe it anew costs milliseconds in which calls are missed.
const KEEP_UNUSED: Duration = Duration::from_secs(30);

/// A file that is probed for all.
struct SharedFile {
    /// Holds the file, and so its inode.
    module: AllocatorModule,
    shown: Vec<ProbeSite>,
    state: FileState,
    /// When some process was last known to map it.
    used: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FileState {
    Attaching,
    Probed,
    /// The kernel has refused; it is not asked again while the file is in use.
    Refused,
}

/// The files, and what is under way with them.
#[derive(Default)]
pub(super) struct SharedFiles {
    by_id: HashMap<FileId, SharedFile>,
    next_site: u16,
    /// Files of which the probes are being taken off.
    unsharing: usize,
}

impl SharedFiles {
    /// Whether none is probed, refused or about to be.
    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Whether probes are being put on.
    pub(super) fn is_attaching(&self) -> bool {
        let is_attaching = |file: &SharedFile| file.state == FileState::Attaching;
        self.by_id.values().any(is_attaching)
    }

    /// Where all processes are probed.
    pub(super) fn sites(&self) -> impl Iterator<Item = &ProbeSite> {
        let probed = |file: &&SharedFile| file.state == FileState::Probed;
        self.by_id
            .values()
            .filter(probed)
            .flat_map(|file| &file.shown)
    }

    /// Files with these inodes are mapped by some process.
    pub(super) fn note_mapped(&mut self, inodes: &HashSet<u64>, now: Instant) {
        for file in self.by_id.values_mut() {
            if inodes.contains(&file.module.file.inode) {
                file.used = now;
            }
        }
    }

    /// Takes those out that nobody has mapped for long.
    fn take_unused(&mut self, now: Instant) -> Vec<(FileId, SharedFile)> {
        let unused = self.by_id.extract_if(|_, file| {
            file.state != FileState::Attaching && now.duration_since(file.used) > KEEP_UNUSED
        });
        unused.collect()
    }

    /// Takes all out but those that are being probed.
    fn take_settled(&mut self) -> Vec<(FileId, SharedFile)> {
        let settled = self
            .by_id
            .extract_if(|_, file| file.state != FileState::Attaching);
        settled.collect()
    }

    /// A file that is to be probed now, and its sites; none if it is known.
    fn admit(&mut self, module: &AllocatorModule) -> Option<(FileId, Vec<Site>)> {
        let id = (module.file.device, module.file.inode);
        if let Some(known) = self.by_id.get_mut(&id) {
            known.used = Instant::now();
            return None;
        }
        let mut sites = Vec::new();
        for found in &module.sites {
            sites.push(probed_site(module, found, self.next_site));
            self.next_site = self.next_site.wrapping_add(1);
        }
        let shown = module.sites.iter().map(|found| shown_site(module, found));
        let file = SharedFile {
            module: module.clone(),
            shown: shown.collect(),
            state: FileState::Attaching,
            used: Instant::now(),
        };
        self.by_id.insert(id, file);
        Some((id, sites))
    }
}

impl Tracer {
    /// Probes what is not probed yet of `modules`, for every process.
    pub(super) fn share_modules(&mut self, modules: &[AllocatorModule]) {
        let is_shared = self.is_shared();
        let Some(system) = &mut self.system else {
            return;
        };
        // What was found before a change of rules.
        if !is_shared || system.is_changing {
            return;
        }
        for module in modules {
            let Some((id, sites)) = system.files.admit(module) else {
                continue;
            };
            let prober = self.prober.clone();
            let myself = self.myself.clone();
            // What keeps the file open must outlive the attaching.
            let keep = module.clone();
            tokio::spawn(async move {
                let result = prober.attach_shared(id, sites).await;
                drop(keep);
                if let Some(sender) = myself.upgrade() {
                    let _ = sender.send(Command::Shared { file: id, result }).await;
                }
            });
        }
    }

    /// A file was probed for all, or could not be.
    pub(super) fn shared(&mut self, id: FileId, result: Result<Duration, AttachError>) {
        let Some(system) = &mut self.system else {
            return;
        };
        let Some(file) = system.files.by_id.get_mut(&id) else {
            return;
        };
        let path = file.module.file.path.display();
        match result {
            Ok(time) => {
                info!(%path, sites = file.shown.len(), ?time, "probed for all processes");
                file.state = FileState::Probed;
            }
            Err(error @ AttachError::SeccompOfAny(_)) if system.starting.is_some() => {
                // It is the same for every file.
                if let Some(reply) = system.starting.take() {
                    let _ = reply.send(Err(error.into()));
                }
                return;
            }
            Err(error) => {
                warn!(%path, error = with_causes(&error), "cannot probe an allocator");
                file.state = FileState::Refused;
            }
        }
        self.tell_started();
    }

    /// Takes the probes off files that nobody has mapped for long.
    pub(super) fn forget_unused_files(&mut self, now: Instant) {
        let Some(system) = &mut self.system else {
            return;
        };
        for (id, file) in system.files.take_unused(now) {
            info!(path = %file.module.file.path.display(), "nobody maps an allocator any more");
            let prober = self.prober.clone();
            tokio::spawn(async move {
                prober.detach_shared(id).await;
                drop(file);
            });
        }
    }

    /// Takes the probes off that all processes share; but not those that are being put on,
    /// for which it has to be called again.
    pub(super) fn share_no_files(&mut self) {
        let Some(system) = &mut self.system else {
            return;
        };
        for (id, file) in system.files.take_settled() {
            system.files.unsharing += 1;
            let prober = self.prober.clone();
            let myself = self.myself.clone();
            tokio::spawn(async move {
                prober.detach_shared(id).await;
                drop(file);
                if let Some(sender) = myself.upgrade() {
                    let _ = sender.send(Command::Unshared).await;
                }
            });
        }
    }

    /// Whether no file has probes any more that all processes share.
    pub(super) fn shares_nothing(&self) -> bool {
        let shares_nothing =
            |system: &System| system.files.is_empty() && system.files.unsharing == 0;
        self.system.as_ref().is_none_or(shares_nothing)
    }

    /// The probes of a file are off.
    pub(super) fn unshared(&mut self) {
        if let Some(system) = &mut self.system {
            system.files.unsharing = system.files.unsharing.saturating_sub(1);
        }
    }

    /// Notes what a target's modules mean for it: where it is probed with all others, and
    /// whether one allocator may call another.
    pub(super) fn join_modules(&mut self, pid: u32, modules: &[AllocatorModule]) {
        self.share_modules(modules);
        let Some(target) = self.targets.get_mut(&pid).filter(|target| target.is_live()) else {
            return;
        };
        let nested = target.malloc_files.len() > 1;
        for module in modules {
            let file = &module.file;
            let shown = module.sites.iter().map(|found| shown_site(module, found));
            target.sites.extend(shown);
            target
                .modules
                .insert(file.path.to_string_lossy().into_owned());
            let malloc = Function::Malloc.symbol();
            if module.sites.iter().any(|found| found.is_called(malloc)) {
                target.malloc_files.insert((file.device, file.inode));
            }
        }
        if !nested
            && target.malloc_files.len() > 1
            && let Err(error) = self.tell_bpf(pid)
        {
            warn!(pid, %error, "calls of one allocator by another are counted twice");
        }
    }
}
