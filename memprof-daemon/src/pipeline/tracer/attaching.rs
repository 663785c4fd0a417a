//! Taking a process on: scan, tell BPF, attach.

use std::{collections::BTreeSet, time::Duration};

use memprof_common::{
    config::TargetConfig, function::Function, limits::MAX_TARGETS, unwind::table::MappingList,
};
use tracing::{debug, info, warn};

use super::{Command, Tracer, golang::GoImage, prefilter::Choice, random_seed};
use crate::{
    export::profile::ProbeSite,
    pipeline::{
        image::Image,
        install::Holder,
        scan::{PoolsWanted, Scan, Wish},
        stats::milliseconds,
        target::{AttachReply, Attached, State, Target, TargetError, probed_site, shown_site},
    },
    prefilter::error::PrefilterError,
    probe::{
        attach::AttachError,
        find::{AllocatorModule, FindError},
        mode::ModeChoice,
    },
    process::history::CodeHistory,
    sample::ImageId,
};

/// Allocators found in a file that a target mapped while it was traced.
pub(in crate::pipeline) struct Found {
    pub(in crate::pipeline) pid: u32,
    pub(in crate::pipeline) modules: Vec<AllocatorModule>,
}

/// Sites that are attached together.
#[derive(Debug, Default)]
pub(in crate::pipeline) struct SiteBatch {
    pub(super) places: Vec<(u64, u64, u64)>,
    pub(super) shown: Vec<ProbeSite>,
}

impl Tracer {
    /// Takes a process on since somebody has asked for it.
    pub(super) fn begin_attach(&mut self, pid: u32, holder: Holder, reply: AttachReply) {
        let mode = self.options.probe_mode;
        if let Some(system) = &mut self.system {
            system.let_go.remove(&pid);
        }
        if let Some(family) = &mut self.family {
            family.name(pid);
        }
        self.take_on(pid, mode, holder, Wish::Request, reply);
        if !self.targets.contains_key(&pid)
            && let Some(family) = &mut self.family
        {
            family.end_taken(pid);
        }
    }

    /// Takes a process on, to be looked at in that way.
    pub(super) fn take_on(
        &mut self,
        pid: u32,
        mode: ModeChoice,
        holder: Holder,
        wish: Wish,
        reply: AttachReply,
    ) {
        self.forget_ended(pid);
        if self.targets.contains_key(&pid) {
            let _ = reply.send(Err(TargetError::Already(pid)));
            return;
        }
        // Why it does not get the prefilter.
        let pools = &self.options.pools;
        let has_pools = !pools.is_empty() && mode.may_write();
        let by_uprobes = has_pools.then(|| PrefilterError::Pools(pools.to_string()));
        if !mode.may_probe()
            && let Some(error) = by_uprobes
        {
            let _ = reply.send(Err(TargetError::Prefilter(Box::new(error))));
            return;
        }
        if self.memory.refuses_targets() {
            self.count_refused_target();
            let _ = reply.send(Err(TargetError::OverLimit(pid)));
            return;
        }
        let Some(slot) = self.take_slot() else {
            let _ = reply.send(Err(TargetError::TooMany(MAX_TARGETS)));
            return;
        };
        let is_shared = self.is_shared();
        self.no_longer_left_alone(pid);
        if is_shared && let Err(error) = self.claim_for(pid, slot) {
            self.give_back(slot, false);
            let _ = reply.send(Err(error));
            return;
        }
        // Records about this pid from now on are kept for it.
        self.drain_mmap_events();
        let mut target = Target::new(slot, random_seed(), Some(reply));
        target.serial = self.next_serial();
        target.is_shared = is_shared;
        target.is_by_rule = wish == Wish::Rule;
        target.mode = mode;
        target.jobs = 1;
        target.holder = holder;
        if !mode.may_write() {
            target.choice = Choice::Uprobe(None);
        } else if let Some(reason) = by_uprobes {
            target.choice = Choice::Uprobe(Some(reason.to_string()));
        }
        self.targets.insert(pid, target);
        self.publish_live();
        let scanner = self.scanner.clone();
        let clear = mode.may_write().then_some(self.options.attach_timeout);
        // Of all processes, some have them.
        let wanted = match self.options.all {
            true => PoolsWanted::Any,
            false => PoolsWanted::All,
        };
        self.spawn_job(move || Command::Scanned {
            pid,
            result: scanner.scan(pid, clear, wish, wanted).map(Box::new),
        });
    }

    pub(super) fn scanned(&mut self, pid: u32, result: Result<Box<Scan>, TargetError>) {
        let scan = match result {
            Ok(scan) => *scan,
            Err(error) => return self.give_up(pid, error),
        };
        self.drain_mmap_events();
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        target.jobs = target.jobs.saturating_sub(1);
        // Told by BPF of one that shares probes: what was read may be another program's.
        let execs = target.execs_told;
        let is_copy = self.is_copy(pid);
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        if is_copy && target.is_by_rule && scan.modules.is_empty() {
            // A child between its fork and its program: the heap is its parent's.
            let searched = Vec::new();
            return self.give_up(pid, FindError::NoAllocator { pid, searched }.into());
        }
        let image = ImageId { pid, epoch: 0 };
        let pending = std::mem::take(&mut target.pending_mappings);
        target.tables.extend(scan.tables);
        let mut first = Image::new(
            image,
            scan.info,
            CodeHistory::new(scan.mappings, scan.read_ns),
            [0; _],
        );
        first.is_copy = is_copy && target.is_by_rule;
        first.set_go(scan.go.filter(|_| execs == 0));
        if let Some(reason) = first.go.as_ref().and_then(GoImage::refusal) {
            if target.is_by_rule {
                info!(pid, reason, "its Go heap is not profiled");
            } else {
                warn!(pid, reason, "its Go heap is not profiled");
            }
        }
        target.images.push(first);
        for event in pending {
            self.map_file(&event);
        }
        self.compile_missing(pid);
        self.publish_mappings(pid);
        self.refresh_memory_of(pid);
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        target.state = State::Attaching;
        let serial = target.serial;
        self.watch_exit(pid, serial, Some(scan.exit));
        if scan.modules.is_empty() {
            // A Go program: there is nothing to probe.
            self.nothing_to_attach(pid);
        } else {
            self.attach_modules(pid, &scan.modules);
        }
        if execs > 0 {
            self.meet_image(ImageId { pid, epoch: execs }, None);
        }
    }

    /// Has BPF tell of a process in which nothing is probed: of its `execve`s.
    fn nothing_to_attach(&mut self, pid: u32) {
        if let Err(error) = self.tell_bpf(pid) {
            return self.give_up(pid, error);
        }
        if let Some(target) = self.targets.get_mut(&pid) {
            target.jobs += 1;
        }
        self.attach_done(pid, SiteBatch::default(), Ok(Duration::ZERO));
    }

    /// Hooks or probes what is not yet of `modules`.
    pub(super) fn attach_modules(&mut self, pid: u32, modules: &[AllocatorModule]) {
        self.note_modules(pid, modules);
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        match target.choice {
            _ if target.is_leaving() => {}
            _ if target.is_shared => self.attach_shared(pid, modules),
            _ if target.is_hooking || target.is_clearing => {
                target.waiting_modules.extend_from_slice(modules)
            }
            Choice::Open | Choice::Prefilter(_) => self.hook_modules(pid, modules),
            Choice::Uprobe(_) => self.probe_modules(pid, modules),
        }
    }

    /// Notes that the present program of a process has allocators: then its stacks are walked.
    fn note_modules(&mut self, pid: u32, modules: &[AllocatorModule]) {
        let image = self.targets.get_mut(&pid).and_then(Target::current);
        let image = image.filter(|image| !modules.is_empty() && !image.has_allocator);
        if let Some(image) = image {
            image.has_allocator = true;
            if image.go.is_some() {
                self.compile_missing(pid);
            }
        }
    }

    /// Traces a process with all others: its modules are probed, or will be, for everyone.
    fn attach_shared(&mut self, pid: u32, modules: &[AllocatorModule]) {
        self.join_modules(pid, modules);
        let is_first = |target: &Target| matches!(target.state, State::Attaching);
        if self.targets.get(&pid).is_some_and(is_first) {
            if let Some(target) = self.targets.get_mut(&pid) {
                target.jobs += 1;
            }
            self.attach_done(pid, SiteBatch::default(), Ok(Duration::ZERO));
        }
    }

    /// Probes what is not probed yet of `modules`.
    pub(super) fn probe_modules(&mut self, pid: u32, modules: &[AllocatorModule]) {
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        let slot = target.slot;
        let mut sites = Vec::new();
        let mut batch = SiteBatch::default();
        for module in modules {
            let file = &module.file;
            for found in &module.sites {
                let file_offset = found.probe_offset();
                let place = (file.device, file.inode, file_offset.0);
                if !target.probed.insert(place) {
                    continue;
                }
                if found.is_called(Function::Malloc.symbol()) {
                    target.malloc_files.insert((file.device, file.inode));
                }
                let number = target.next_site;
                target.next_site = target.next_site.wrapping_add(1);
                sites.push(probed_site(module, found, number));
                batch.places.push(place);
                batch.shown.push(shown_site(module, found));
            }
        }
        if let Err(error) = self.tell_bpf(pid) {
            return self.give_up(pid, error);
        }
        let first = matches!(
            self.targets.get(&pid).map(|target| &target.state),
            Some(State::Attaching)
        );
        if sites.is_empty() && !first {
            return;
        }
        if let Some(target) = self.targets.get_mut(&pid) {
            target.jobs += 1;
        }
        let prober = self.prober.clone();
        let myself = self.myself.clone();
        // What keeps the files open must outlive the attaching.
        let keep = modules.to_vec();
        tokio::spawn(async move {
            let result = prober.attach(slot, pid, sites).await;
            drop(keep);
            if let Some(sender) = myself.upgrade() {
                let _ = sender
                    .send(Command::AttachDone { pid, batch, result })
                    .await;
            }
        });
    }

    /// Fills the target's slot, before the first probe of it can be hit.
    pub(super) fn tell_bpf(&mut self, pid: u32) -> Result<(), TargetError> {
        let Some(target) = self.targets.get(&pid) else {
            return Ok(());
        };
        let (mappings, mappings_epoch) = target
            .list
            .as_ref()
            .map_or((MappingList::default(), 0), |(_, list, epoch)| {
                (*list, *epoch)
            });
        let config = TargetConfig {
            pid,
            stack_depth: self.options.stack_depth,
            sample_interval_bytes: self.config().interval_in_force(),
            stack_seed: self.stack_seed,
            sample_seed: target.sample_seed,
            malloc_nests: u32::from(target.malloc_files.len() > 1),
            unwind: self.options.unwind as u32,
            mappings: mappings.0,
            mappings_epoch,
            pools: u32::from(!self.options.pools.is_empty()),
        };
        let slot = u32::from(target.slot);
        let is_known = target.is_shared;
        self.target_map
            .set(slot, config, 0)
            .and_then(|()| match is_known {
                // It has the slot; or it was let go since, and has none.
                true => Ok(()),
                false => self.slot_map.insert(pid, slot, 0),
            })
            .map_err(|source| TargetError::Map {
                pid,
                source: Box::new(source),
            })
    }

    pub(super) fn attach_done(
        &mut self,
        pid: u32,
        batch: SiteBatch,
        result: Result<Duration, AttachError>,
    ) {
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        target.jobs = target.jobs.saturating_sub(1);
        let first = matches!(target.state, State::Attaching);
        match result {
            Ok(time) => {
                target.attach_time += time;
                target
                    .modules
                    .extend(batch.shown.iter().map(|site| site.module.clone()));
                target.sites.extend(batch.shown);
                if std::mem::take(&mut target.is_probed_anew) {
                    info!(pid, "a thread had replaced the program: probed anew");
                }
            }
            Err(_) if target.exit_seen && first => {
                return self.give_up(pid, TargetError::Exited(pid));
            }
            Err(error) if first => return self.give_up(pid, error.into()),
            Err(AttachError::Exited) => {
                debug!(pid, "the process ended before an allocator was probed");
            }
            Err(error) => {
                warn!(pid, %error, "cannot probe an allocator that was mapped later");
                for place in batch.places {
                    target.probed.remove(&place);
                }
            }
        }
        if target.exit_seen {
            if first {
                return self.give_up(pid, TargetError::Exited(pid));
            }
            return self.end_target(pid);
        }
        if first {
            target.state = State::Tracing;
            self.work.attaching.attached += 1;
            self.work.attaching.attached_ms += milliseconds(target.attach_time);
            let comm = target
                .images
                .last()
                .map(|image| image.info.comm.clone())
                .unwrap_or_default();
            let sites = target.sites.len();
            if target.is_shared && target.is_by_rule {
                // One of many.
                debug!(pid, comm, sites, "tracing");
            } else {
                info!(pid, comm, sites, "tracing");
            }
            let attached = Attached {
                pid,
                comm,
                go: target.go_version(),
                sites: target.sites.len(),
                modules: target.modules_read(),
                attach_time: target.attach_time,
            };
            // Before the answer: who waits for it lets the process go.
            target.holder = Holder::Nobody;
            let reply = target.reply.take();
            // Before the answer: who has it may ask when those there are are traced.
            self.look_for_children();
            if let Some(reply) = reply {
                let _ = reply.send(Ok(attached));
            }
        } else if !target.sites.is_empty() {
            self.child_is_traced(pid);
        }
    }

    /// Forgets a process that could not be traced, and tells who asked for it.
    pub(super) fn give_up(&mut self, pid: u32, error: TargetError) {
        let Some(mut target) = self.targets.remove(&pid) else {
            return;
        };
        self.work.attaching.failed_to_attach += 1;
        if let Some(family) = &mut self.family {
            if target.child.is_some() {
                family.fail(pid);
            } else {
                family.end_taken(pid);
            }
        }
        // It may have been told to BPF, or not.
        let _ = self.slot_map.remove(&pid);
        let prober = self.prober.clone();
        let slot = target.slot;
        let reply = target.reply.take();
        let myself = self.myself.clone();
        self.publish_live();
        tokio::spawn(async move {
            // The answer comes when nothing is attached any more.
            prober.detach(slot).await;
            if let Some(sender) = myself.upgrade() {
                let _ = sender.send(Command::SlotFree { slot, pid }).await;
            }
            if let Some(reply) = reply {
                let _ = reply.send(Err(error));
            }
        });
    }

    pub(super) fn found(&mut self, found: Found) {
        if let Some(target) = self.targets.get_mut(&found.pid) {
            target.jobs = target.jobs.saturating_sub(1);
            if target.is_live() && !target.exit_seen {
                if !target.is_shared {
                    let modules: BTreeSet<_> = found.modules.iter().map(|m| &m.file.path).collect();
                    info!(pid = found.pid, ?modules, "an allocator was mapped");
                }
                self.attach_modules(found.pid, &found.modules);
            }
        }
    }
}
