//! Targets after they are traced: new mappings, exec, exit.

use std::collections::BTreeSet;

use tracing::{debug, info, warn};

use super::{Command, Tracer, attaching::Found, family::Family};
use crate::{
    pipeline::{
        image::Image,
        install::take_out,
        scan::{Scan, Scanner, Tables},
        target::{State, Target, TargetError},
    },
    prefilter::attach::Image as PrefilterImage,
    probe::mode::ProbeMode,
    process::info::{ProcessInfo, first_thread_has_ended},
    ring::mmap_events::{HostEvent, MmapEvent},
    sample::ImageId,
};

/// Processes whose memory is asked for a second.
const MEMORY_TURN: usize = 128;

impl Tracer {
    /// Takes notice of what was mapped since the last time.
    pub(super) fn drain_mmap_events(&mut self) {
        let mut events: Vec<MmapEvent> = Vec::new();
        let mut lives: Vec<HostEvent> = Vec::new();
        let targets = &self.targets;
        let is_system_wide = self.system.is_some();
        let follows_children = self.family.is_some();
        self.mmap_events.drain(|event| {
            if let HostEvent::Mmap(event) = &event
                && targets.get(&event.pid).is_some_and(Target::is_live)
            {
                events.push(event.clone());
            }
            if is_system_wide || follows_children && !matches!(event, HostEvent::Mmap(_)) {
                lives.push(event);
            }
        });
        if !lives.is_empty() {
            self.note_children(&lives);
            self.note_lives(lives);
        }
        // Each CPU has a buffer of its own; the newest mapping of an address wins.
        events.sort_by_key(|event| event.timestamp_ns);
        let mut changed = BTreeSet::new();
        for event in events {
            match self.targets.get_mut(&event.pid) {
                Some(target) if target.images.is_empty() => target.pending_mappings.push(event),
                Some(_) => {
                    self.map_file(&event);
                    changed.insert(event.pid);
                }
                None => {}
            }
        }
        for pid in changed {
            self.compile_missing(pid);
            self.publish_mappings(pid);
        }
        let lost = self.mmap_events.lost();
        if lost != self.mmap_lost_seen {
            self.mmap_lost_seen = lost;
            self.rescan_all();
        }
    }

    /// Adds a mapping to its process, and looks for an allocator in the file.
    pub(super) fn map_file(&mut self, event: &MmapEvent) {
        let pid = event.pid;
        let Some(mapping) = self.scanner.mapping_of(event) else {
            return;
        };
        let Some(target) = self.targets.get_mut(&pid).filter(|target| target.is_live()) else {
            return;
        };
        let file = mapping.file.clone();
        if let Some(image) = target.images.last_mut() {
            image.code.learn(&mapping, event.timestamp_ns);
        }
        let Some(file) = file else {
            return;
        };
        if let Some(image) = target.images.last_mut()
            && !image.maps_go
        {
            image.maps_go = self.scanner.is_go(&file);
        }
        let id = (file.device, file.inode);
        if !target.tables.contains_key(&id) {
            target.mapped_ns.entry(id).or_insert(event.timestamp_ns);
        }
        // Mapped before, or being looked at: a file has several mappings.
        if !target.seen_files.insert(id) {
            return;
        }
        target.jobs += 1;
        let scanner = self.scanner.clone();
        self.spawn_job(move || {
            Command::Found(Found {
                pid,
                modules: scanner.allocators_in(&file),
            })
        });
    }

    /// Reads the mappings of every target again, since records were lost.
    fn rescan_all(&mut self) {
        let images: Vec<ImageId> = self
            .targets
            .values_mut()
            .filter(|target| target.is_live())
            .filter_map(|target| {
                let image = target.current()?.id;
                target.jobs += 1;
                Some(image)
            })
            .collect();
        for image in images {
            self.spawn_rescan(image);
        }
    }

    pub(super) fn spawn_rescan(&self, image: ImageId) {
        self.spawn_rescan_without(image, None);
    }

    /// Reads a process again, which may have a prefilter in it that was another program's:
    /// if the tracer has hooked it between the replacement and the news of it.
    fn spawn_rescan_without(&self, image: ImageId, stale: Option<PrefilterImage>) {
        let scanner = self.scanner.clone();
        let time_limit = self.options.attach_timeout;
        let tables = if self.system.is_some() || self.family.is_some() {
            Tables::Later
        } else {
            Tables::Made
        };
        self.spawn_job(move || {
            if let Some(stale) = stale
                && let Err(error) = take_out(image.pid, &stale, time_limit)
            {
                warn!(pid = image.pid, %error, "cannot take the prefilter out");
            }
            Command::Rescanned {
                image,
                result: scanner.rescan(image.pid, tables).map(Box::new),
            }
        });
    }

    /// A rescan has come back.
    pub(super) fn rescanned(&mut self, image: ImageId, result: Result<Box<Scan>, TargetError>) {
        // What was read may be another program's: then its event was in the ring by then.
        self.drain_ring();
        let Some(target) = self.targets.get_mut(&image.pid) else {
            return;
        };
        target.jobs = target.jobs.saturating_sub(1);
        target.is_clearing = false;
        let waiting = std::mem::take(&mut target.waiting_modules);
        if !waiting.is_empty() {
            self.attach_modules(image.pid, &waiting);
        }
        self.leave_if_asked(image.pid);
        let Some(target) = self.targets.get_mut(&image.pid) else {
            return;
        };
        let scan = match result {
            Ok(scan) => *scan,
            // It is gone, or going; what was known of it stays.
            Err(error) => {
                debug!(pid = image.pid, %error, "cannot scan again");
                return;
            }
        };
        // The books may be closed by now; who it was is known all the same. The
        // pid may even be another process's by now: then so is the start time.
        if let Some(current) = target.current()
            && current.id == image
            && current.info.start_ticks == scan.info.start_ticks
        {
            current.info = scan.info;
            if current.go.is_none() {
                current.set_go(scan.go);
            }
            current.code.learn_all(&scan.mappings, scan.read_ns);
            target.tables.extend(scan.tables);
            self.compile_missing(image.pid);
            self.publish_mappings(image.pid);
        }
        self.found_late(image.pid, scan.modules);
    }

    fn found_late(&mut self, pid: u32, modules: Vec<crate::probe::find::AllocatorModule>) {
        if let Some(target) = self.targets.get_mut(&pid) {
            // `found` takes one off.
            target.jobs += 1;
        }
        self.found(Found { pid, modules });
    }

    /// A sample of an image: if it is a newer one than known, the process has
    /// replaced its program. The exec event says so, and if that was lost the
    /// first sample does.
    pub(super) fn meet_image(&mut self, image: ImageId, comm: Option<&str>) {
        let Some(target) = self.targets.get_mut(&image.pid) else {
            return;
        };
        let slot = target.slot;
        let Some(current) = target.images.last() else {
            return;
        };
        if image.epoch <= current.id.epoch {
            return;
        }
        let old = current.id;
        let before = &current.info;
        if target.is_shared && !target.is_live() {
            // It was let go for the program before, and was told so by then.
            self.look_again(image.pid);
            return;
        }
        // At once, not in the job: a short-lived program may be gone by then.
        let birth = self
            .system
            .as_mut()
            .and_then(|system| system.births.take(image.pid));
        let info = Scanner::info(image.pid)
            .filter(|now| now.start_ticks == before.start_ticks || before.start_ticks == 0)
            .unwrap_or_else(|| ProcessInfo {
                comm: comm.unwrap_or(&before.comm).to_owned(),
                exe: birth.and_then(|birth| birth.exe()).unwrap_or_default(),
                ..before.clone()
            });
        let code = current.code.inherit();
        let (pid, epoch) = (image.pid, image.epoch);
        if target.is_shared {
            // One of many.
            debug!(pid, epoch, "the process has replaced its program");
        } else {
            info!(pid, epoch, "the process has replaced its program");
        }
        let losses = self.losses(slot);
        let totals_base = self.turn_totals(image);
        let Some(target) = self.targets.get_mut(&image.pid) else {
            return;
        };
        let is_unseen = target.is_untraced_child();
        let child_of = target.child.map(|child| child.child_of());
        target.stale_plans = 0;
        let stale = target.end_stubs();
        if stale.is_some() {
            // They were in the old program's memory.
            target.probed.clear();
            target.sites.clear();
            target.image_bytes = 0;
            target.is_clearing = true;
            self.prober.detach_soon(slot);
        }
        let mut next = Image::new(image, info, code, losses);
        if let Some(current) = target.images.last_mut() {
            current.end(losses);
            Self::end_go(current);
            // Records about what the next one maps have come before the news of it.
            next.maps_go = current.has_missed_go();
            current.is_unseen = is_unseen;
        }
        next.child_of = child_of;
        next.totals.set_base(totals_base);
        let is_unwanted = self
            .targets
            .get(&image.pid)
            .is_some_and(|target| target.is_by_rule && !self.is_as_wanted(target, &next.info));
        let Some(target) = self.targets.get_mut(&image.pid) else {
            return;
        };
        target.images.push(next);
        target.seen_files.clear();
        target.jobs += 1;
        if is_unwanted {
            self.unwanted.push(image.pid);
        }
        self.replaced.push(old);
        self.spawn_rescan_without(image, stale);
        self.publish_mappings(image.pid);
    }

    /// Has the probes of a process attached anew: the kernel binds them to the
    /// task of the first thread (`uprobe_multi_link_filter` in
    /// `kernel/trace/bpf_trace.c`), which is gone when another thread has replaced
    /// the program. The look through the new image's mappings, on its way by now,
    /// finds the sites.
    pub(super) fn probe_again(&mut self, pid: u32) {
        let is_its_own = |target: &&mut Target| target.is_live() && !target.is_shared;
        let Some(target) = self.targets.get_mut(&pid).filter(is_its_own) else {
            return;
        };
        target.is_probed_anew = true;
        target.probed.clear();
        target.sites.clear();
        self.prober.detach_soon(target.slot);
    }

    /// Asks the kernel what every process holds now.
    pub(super) fn refresh_memory(&mut self) {
        self.refresh_memory_from(0, usize::MAX);
    }

    /// Asks the kernel what one process holds.
    pub(super) fn refresh_memory_of(&mut self, pid: u32) {
        self.refresh_memory_from(pid, 1);
    }

    /// Asks for some of the processes, in turn: where all are traced, they are many.
    pub(super) fn refresh_memory_in_turn(&mut self) {
        self.memory_turn = self.refresh_memory_from(self.memory_turn, MEMORY_TURN);
    }

    /// Asks for so many processes from a pid on; returns where to go on.
    fn refresh_memory_from(&mut self, first: u32, count: usize) -> u32 {
        let loses_first_threads = self.probe_mode == ProbeMode::Perf;
        let from_there = self.targets.range_mut(first..);
        let live = from_there.filter(|(_, target)| target.is_live());
        for (asked, (&pid, target)) in live.enumerate() {
            if asked == count {
                return pid;
            }
            if let Some(image) = target.current() {
                image.find_perf_map();
            }
            let is_known = target.current().is_none_or(Image::refresh_memory);
            // A process whose first thread has ended shows none.
            if loses_first_threads && !is_known && !target.is_lost && first_thread_has_ended(pid) {
                target.is_lost = true;
                warn!(
                    pid,
                    "the process's first thread has ended, and in probe mode perf nothing of the \
                     others is recorded from then on"
                );
            }
        }
        0
    }

    /// Closes the books of replaced images, and their totals. Not where the replacement is
    /// noticed: that may be in the middle of a sweep.
    pub(super) fn close_replaced(&mut self) {
        self.confirm_totals();
        for image in std::mem::take(&mut self.replaced) {
            self.settle_of(image.pid);
            self.close_books(image);
        }
    }

    pub(super) fn exited(&mut self, pid: u32, serial: u64) {
        let Some(target) = self.target_of(pid, serial) else {
            return;
        };
        target.exit_seen = true;
        match target.state {
            // The job under way comes back and finds `exit_seen`.
            State::Scanning | State::Attaching | State::Ended => {}
            State::Tracing => self.end_target(pid),
        }
    }

    /// The last act for a process that is gone.
    pub(super) fn end_target(&mut self, pid: u32) {
        let Some(target) = self.targets.get(&pid) else {
            return;
        };
        let (slot, serial, is_shared) = (target.slot, target.serial, target.is_shared);
        self.close_target(pid);
        if is_shared {
            debug!(pid, "the process has exited");
            return;
        }
        info!(pid, "the process has exited");
        let prober = self.prober.clone();
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let time = prober.detach(slot).await;
            if let Some(sender) = myself.upgrade() {
                let _ = sender.send(Command::Detached { pid, serial, time }).await;
            }
        });
    }

    /// Closes the books of a process of which nothing more is to come.
    pub(super) fn close_target(&mut self, pid: u32) {
        self.drain_mmap_events();
        // All of its events are in the ring by now.
        self.drain_ring();
        self.close_replaced();
        self.settle_of(pid);
        self.refresh_totals_of(pid);
        let Some(target) = self.targets.get(&pid) else {
            return;
        };
        let losses = self.losses(target.slot);
        self.end_member(pid);
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        target.end(losses);
        let Some(image) = target.images.last_mut() else {
            return;
        };
        Self::end_go(image);
        let (image, has_missed_go) = (image.id, image.has_missed_go());
        if has_missed_go {
            self.miss_go(pid);
        }
        self.close_books(image);
        if !self.is_left_alone(pid)
            && let Err(error) = self.slot_map.remove(&pid)
        {
            warn!(pid, %error, "cannot forget the slot of an ended process");
        }
        self.publish_live();
    }

    /// Tells how many targets are left.
    pub(super) fn publish_live(&self) {
        let targets = self.targets.values();
        let live = targets.filter(|target| target.is_live()).count();
        // Children that are on their way are not the end of it.
        let waiting = self.family.as_ref().map_or(0, Family::waiting);
        self.live.send_replace(live + waiting);
    }
}
