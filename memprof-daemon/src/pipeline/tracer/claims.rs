//! Processes that turn up by themselves, where every process is traced.

use std::{
    collections::HashMap,
    error::Error,
    time::{Duration, SystemTime},
};

use tracing::{debug, warn};

use super::{Command, Tracer, births::Birth, prefilter::Choice};
use crate::{
    causes::with_causes,
    export::{Numbers, profile::Inherited},
    pipeline::{
        image::Image,
        scan::{Scan, Scanner, Tables, monotonic_ns},
        target::{State, Target, TargetError, Watching},
    },
    process::{
        exit::ExitWatch,
        history::CodeHistory,
        info::{ProcessError, ProcessInfo},
        mapping::MappingTable,
        origin::Origin,
    },
    sample::{Claim, ImageId},
};

impl Tracer {
    /// A process that was not known has taken a slot. Called in the middle of other work:
    /// nothing may be drained here.
    pub(super) fn claimed(&mut self, claim: &Claim) {
        let pid = claim.pid;
        let Ok(slot) = u16::try_from(claim.slot) else {
            return;
        };
        if !self.slots.take_from_stock(slot) {
            warn!(pid, slot, "a process has taken a slot that was not free");
            return;
        }
        // Another process had this pid, and its end is not known yet.
        self.retire(pid);
        let birth = self
            .system
            .as_mut()
            .and_then(|system| system.births.take(pid))
            .unwrap_or_default();
        let parent = birth.parent.and_then(|parent| self.targets.get(&parent));
        let parent = parent.and_then(|parent| Some((parent, parent.images.last()?)));
        let info = who(claim, &birth, parent.map(|(_, image)| &image.info));
        // A copy has its parent's memory and code.
        let parent = parent.filter(|_| birth.is_copy);
        let held = parent.map(|(_, image)| Numbers::of(&self.ledger.sum(image.id)));
        let inherited = parent.zip(held).map(|((_, image), held)| Inherited {
            parent_pid: image.id.pid,
            objects: held.inuse_objects.unsigned_abs(),
            bytes: held.inuse_bytes.unsigned_abs(),
        });
        let (code, tables) = match parent {
            Some((parent, image)) => (image.code.inherit(), parent.tables.clone()),
            None => (self.code_of(&birth), HashMap::new()),
        };
        // It has begun another program than the one that made the call, or makes it late.
        let maps_go = !birth.is_copy && self.is_go(&code);
        // Who was let go, and takes a slot all the same, runs another program.
        if let Some(system) = &mut self.system {
            system.let_go.remove(&pid);
        }
        // Where rules have changed, probes that all share may be going.
        let is_unwanted = !self.is_sharing() || self.is_unwanted(&info);
        if is_unwanted {
            // Where nothing else is under way.
            self.unwanted.push(pid);
        }
        let seed = match self.target_map.get(&claim.slot, 0) {
            Ok(config) => config.sample_seed,
            Err(error) => {
                warn!(pid, %error, "cannot read how a process is sampled");
                0
            }
        };
        let mut target = Target::new(slot, seed, None);
        target.serial = self.next_serial();
        target.is_shared = true;
        target.is_by_rule = true;
        target.is_unwanted = is_unwanted;
        target.choice = Choice::Uprobe(None);
        target.state = State::Tracing;
        // Who it maps is being read.
        let _ = target.may_rescan();
        target.jobs = 1;
        target.tables = tables;
        let mut image = Image::new(ImageId { pid, epoch: 0 }, info, code, [0; _]);
        image.inherited = inherited;
        image.is_copy = birth.is_copy;
        image.maps_go = maps_go;
        target.images.push(image);
        let serial = target.serial;
        self.targets.insert(pid, target);
        self.work.attaching.attached += 1;
        self.publish_live();
        self.compile_missing(pid);
        self.publish_mappings(pid);
        // Not in the job, which may have to wait for its turn.
        self.watch_exit(pid, serial, None);
        let scanner = self.scanner.clone();
        self.spawn_job(move || Command::Met {
            pid,
            serial,
            scan: scanner.rescan(pid, Tables::Later).map(Box::new),
        });
    }

    /// The code that a process has mapped since it began its program.
    fn code_of(&self, birth: &Birth) -> CodeHistory {
        let Some(last) = birth.code.last() else {
            return CodeHistory::default();
        };
        let mut mappings = MappingTable::default();
        for event in &birth.code {
            if let Some(mapping) = self.scanner.mapping_of(event) {
                mappings.insert(mapping);
            }
        }
        CodeHistory::new(mappings, last.timestamp_ns)
    }

    /// Whether something of it was built by Go.
    fn is_go(&self, code: &CodeHistory) -> bool {
        let files = code.now().files();
        files.iter().any(|file| self.scanner.is_go(file))
    }

    /// A process that has turned up was looked at.
    pub(super) fn met(&mut self, pid: u32, serial: u64, scan: Result<Box<Scan>, TargetError>) {
        if self.target_of(pid, serial).is_some() {
            self.rescanned(ImageId { pid, epoch: 0 }, scan);
        }
    }

    /// The target with this pid, if it is still the same.
    pub(super) fn target_of(&mut self, pid: u32, serial: u64) -> Option<&mut Target> {
        self.targets
            .get_mut(&pid)
            .filter(|target| target.serial == serial)
    }

    /// Has the exit of a process told; without a watch, it may be gone already.
    /// The watch ends with what is known of the target: a process that was let go lives on.
    pub(super) fn watch_exit(&mut self, pid: u32, serial: u64, exit: Option<ExitWatch>) {
        let myself = self.myself.clone();
        let watch = tokio::spawn(async move {
            while let Err(error) = wait_for_exit(pid, exit.as_ref()).await {
                // Out of descriptors: look again, as long as it takes.
                warn!(
                    pid,
                    error = with_causes(&*error),
                    "cannot watch for the exit"
                );
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            if let Some(sender) = myself.upgrade() {
                // The tracer may have ended first.
                let _ = sender.send(Command::Exited { pid, serial }).await;
            }
        });
        if let Some(target) = self.target_of(pid, serial) {
            target.exit_watch = Some(Watching(watch.abort_handle()));
        }
    }

    /// Whether a process is not to be traced with all others.
    pub(super) fn is_unwanted(&self, info: &ProcessInfo) -> bool {
        self.admit(info).is_none()
    }

    /// Forgets whatever had this pid: another process has it now. Called in the middle of
    /// other work: nothing may be drained here. All events of the one before were in the
    /// ring before those of the next.
    fn retire(&mut self, pid: u32) {
        let Some(target) = self.targets.get(&pid) else {
            return;
        };
        if target.is_live() {
            debug!(pid, "the pid is another process's by now");
            let losses = self.losses(target.slot);
            let is_lossy = self.is_lossy(pid);
            if let Some(target) = self.targets.get_mut(&pid) {
                target.end(losses);
            }
            self.empty_books(pid, u32::MAX, is_lossy);
        }
        self.replaced.retain(|image| image.pid != pid);
        self.unconfirmed_totals.retain(|image| image.pid != pid);
        let Some(target) = self.targets.remove(&pid) else {
            return;
        };
        if !target.is_shared {
            self.prober.detach_soon(target.slot);
        }
        self.forget(pid, &target);
        if target.has_slot {
            // None of its threads is left to run a program.
            self.give_back(target.slot, false);
        }
    }

    /// Whether a process has its parent's memory, as far as is known; only asked where every
    /// process is traced.
    pub(super) fn is_copy(&self, pid: u32) -> bool {
        self.system
            .as_ref()
            .is_some_and(|system| system.births.is_copy(pid))
    }

    /// Has BPF let a process go that is traced with all others.
    pub(super) fn stop_sharing(&mut self, pid: u32) {
        if let Err(error) = self.set_left_alone(pid) {
            warn!(pid, %error, "cannot leave a process alone");
        }
    }

    /// Whether BPF leaves the process alone.
    pub(super) fn is_left_alone(&self, pid: u32) -> bool {
        self.system
            .as_ref()
            .is_some_and(|system| system.left_alone.contains(&pid))
    }

    /// Has BPF look at a process again that it was told to leave alone, from its next call
    /// on.
    pub(super) fn no_longer_left_alone(&mut self, pid: u32) {
        if let Some(system) = &mut self.system
            && system.left_alone.remove(&pid)
        {
            // BPF may have done it.
            let _ = self.slot_map.remove(&pid);
        }
    }

    /// Gives a process a slot before it takes one itself.
    ///
    /// # Errors
    ///
    /// It has done so; or BPF cannot be told.
    pub(super) fn claim_for(&mut self, pid: u32, slot: u16) -> Result<(), TargetError> {
        let failed = |source| {
            let source = Box::new(source);
            TargetError::Map { pid, source }
        };
        let slot = u32::from(slot);
        self.target_map
            .set(slot, self.config_of_nobody(), 0)
            .map_err(failed)?;
        self.slot_map
            .insert(pid, slot, BPF_NOEXIST)
            .map_err(|error| match self.slot_map.get(&pid, 0) {
                Ok(_) => TargetError::Already(pid),
                Err(_) => failed(error),
            })
    }
}

/// `include/uapi/linux/bpf.h`.
const BPF_NOEXIST: u64 = 1;

/// Waits until a process has ended. Its pid cannot be another's: that one would have been
/// told of before.
async fn wait_for_exit(
    pid: u32,
    watch: Option<&ExitWatch>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let opened;
    let watch = match watch {
        Some(watch) => watch,
        None => match ExitWatch::open(pid) {
            Ok(watch) => {
                opened = watch;
                &opened
            }
            Err(ProcessError::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        },
    };
    Ok(watch.exited().await?)
}

/// Who a process is that has taken a slot: as it says itself, if it still is who it was, else
/// as records and its parent tell.
fn who(claim: &Claim, birth: &Birth, parent: Option<&ProcessInfo>) -> ProcessInfo {
    let pid = claim.pid;
    let parent = parent.filter(|_| birth.is_copy);
    let comm = claim.comm.clone().or_else(|| birth.comm.clone());
    let exe = || {
        let of_parent = || parent.map(|parent| parent.exe.clone());
        birth.exe().or_else(of_parent).unwrap_or_default()
    };
    match Scanner::info(pid) {
        Some(mut info) => {
            // If it is called otherwise by now, it runs another program by now: its name
            // will be told, and that one's path is not this one's.
            if let Some(comm) = comm.filter(|comm| *comm != info.comm) {
                info.comm = comm;
                info.exe = exe();
            }
            info
        }
        None => {
            let since_ns = match birth.since_ns {
                0 => claim.timestamp_ns,
                since_ns => since_ns,
            };
            let age = monotonic_ns().saturating_sub(since_ns);
            ProcessInfo {
                pid,
                comm: comm.unwrap_or_default(),
                exe: exe(),
                start_time: SystemTime::now() - Duration::from_nanos(age),
                start_ticks: 0,
                origin: parent.map_or_else(
                    || Origin::unknown(pid),
                    |parent| Origin {
                        namespace_pids: vec![pid],
                        ..parent.origin.clone()
                    },
                ),
            }
        }
    }
}
