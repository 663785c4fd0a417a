//! Children of the processes that somebody has named, where those are followed.
//!
//! Who they are, the kernel's records about forks tell, of all processes (`family` picks
//! those that matter), and a look through `/proc` those that were there before. A child is
//! told to BPF before it is read: so each program that it goes over to from then on is told,
//! too, and a child may be taken on at any moment of its life, also before it has mapped an
//! allocator. What it maps later, the records about mappings tell.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use memprof_common::{limits::MAX_TARGETS, totals::TargetTotals};
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::{
    Command, Tracer,
    attaching::Found,
    family::{Birth, Member},
    golang::GoImage,
    prefilter::Choice,
    random_seed,
};
use crate::{
    causes::with_causes,
    export::{
        Numbers,
        profile::{ChildOf, Inherited},
    },
    pipeline::{
        image::Image,
        scan::{Scan, monotonic_ns},
        stats::milliseconds,
        sweep::all_pids,
        target::{Child, State, Target, TargetError},
    },
    prefilter::sharing,
    process::{
        history::CodeHistory,
        info::{ProcessError, parent_of},
    },
    ring::mmap_events::HostEvent,
    sample::ImageId,
};

/// Children that are read at a time, at most: where hundreds are forked at once, those that
/// have ended by their turn cost nothing.
const MAX_SCANNING: usize = 32;

/// From one look through all processes to the next, which heals what records did not tell.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// All processes that there are, each with its parent.
pub(in crate::pipeline) type Parents = HashMap<u32, u32>;

/// Tells how many children are traced, once all that there are have had their turn.
pub(in crate::pipeline) type SettledReply = oneshot::Sender<usize>;

impl Tracer {
    /// Takes notice of processes that were made, have replaced their programs or have ended.
    /// Called in the middle of other work: nothing is taken on here.
    pub(super) fn note_children(&mut self, events: &[HostEvent]) {
        let Some(family) = &mut self.family else {
            return;
        };
        let now = Instant::now();
        let waiting = family.waiting();
        for event in events {
            match *event {
                HostEvent::Fork {
                    timestamp_ns: at_ns,
                    pid,
                    parent,
                } => family.fork(Birth { pid, parent, at_ns }, now),
                HostEvent::Exec { pid, .. } => family.exec(pid, now),
                HostEvent::Exit { pid, .. } => family.exit(pid),
                HostEvent::Mmap(_) => {}
            }
        }
        if family.waiting() != waiting {
            self.publish_live();
        }
    }

    /// When children are to be taken on.
    pub(super) fn next_child(&self) -> Option<Instant> {
        let family = self.family.as_ref()?;
        (family.scanning < MAX_SCANNING).then(|| family.next_due())?
    }

    /// Takes on those children whose time has come.
    pub(super) fn take_on_children(&mut self) {
        // They may have replaced their programs; and what their parents hold is told.
        self.drain_mmap_events();
        self.drain_ring();
        let now = Instant::now();
        while let Some(family) = &mut self.family
            && family.scanning < MAX_SCANNING
            && let Some((pid, member)) = family.take_due(now)
        {
            self.take_on_child(pid, &member);
        }
        self.publish_live();
    }

    fn take_on_child(&mut self, pid: u32, member: &Member) {
        let Some(parent) = member.parent else {
            return;
        };
        if sharing::is_shared_by(pid, parent) {
            // As vfork(2) has it: what it does is its parent's, until it runs a program.
            if let Some(family) = &mut self.family {
                family.is_sharing(pid);
            }
            return;
        }
        self.forget_ended(pid);
        if self.targets.contains_key(&pid) {
            // Of another process, which has ended.
            if let Some(family) = &mut self.family {
                family.try_again(pid, Instant::now());
            }
            return;
        }
        let Some(slot) = self.take_slot() else {
            if let Some(family) = &mut self.family {
                if !family.has_refused {
                    warn!(
                        pid,
                        "{MAX_TARGETS} processes are traced, and no child more can be: told \
                         once, and counted"
                    );
                }
                family.refuse(pid);
            }
            return;
        };
        let mode = self.options.probe_mode;
        let mut target = Target::new(slot, random_seed(), None);
        target.serial = self.next_serial();
        target.mode = mode;
        target.jobs = 1;
        if !mode.may_write() {
            target.choice = Choice::Uprobe(None);
        }
        target.child = Some(Child {
            parent,
            born_ns: member.born_ns,
            inherited: self.held_by(parent).filter(|_| member.is_copy),
            is_traced: false,
        });
        let serial = target.serial;
        self.targets.insert(pid, target);
        if let Err(error) = self.tell_bpf(pid) {
            return self.drop_child(pid, &error);
        }
        if let Some(family) = &mut self.family {
            family.scanning += 1;
        }
        let scanner = self.scanner.clone();
        let clear = mode.may_write().then_some(self.options.attach_timeout);
        self.spawn_job(move || Command::ChildScanned {
            pid,
            serial,
            result: scanner
                .scan_child(pid, clear, mode.may_probe())
                .map(Box::new),
        });
    }

    /// What a target holds, and so its copy.
    fn held_by(&self, parent_pid: u32) -> Option<Inherited> {
        let image = self.targets.get(&parent_pid)?.images.last()?;
        let held = Numbers::of(&self.ledger.sum(image.id));
        Some(Inherited {
            parent_pid,
            objects: held.inuse_objects.unsigned_abs(),
            bytes: held.inuse_bytes.unsigned_abs(),
        })
    }

    /// A child was read.
    pub(super) fn child_scanned(
        &mut self,
        pid: u32,
        serial: u64,
        result: Result<Box<Scan>, TargetError>,
    ) {
        if let Some(family) = &mut self.family {
            family.scanning = family.scanning.saturating_sub(1);
        }
        self.drain_mmap_events();
        // If it has replaced its program, that is in the ring.
        self.drain_ring();
        if self.target_of(pid, serial).is_none() {
            return;
        }
        let scan = match result {
            Ok(scan) => *scan,
            Err(error) => return self.drop_child(pid, &error),
        };
        let is_copy = self
            .family
            .as_ref()
            .is_some_and(|family| family.is_copy(pid));
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        let epoch = target.execs_told;
        let image = ImageId { pid, epoch };
        let pending = std::mem::take(&mut target.pending_mappings);
        target.tables.extend(scan.tables);
        let code = CodeHistory::new(scan.mappings, scan.read_ns);
        let mut first = Image::new(image, scan.info, code, [0; _]);
        // Nothing of it has been probed yet.
        first.totals.set_base(Some(TargetTotals::default()));
        first.go = scan.go.map(GoImage::new);
        if let Some(reason) = first.go.as_ref().and_then(GoImage::refusal) {
            warn!(pid, reason, "its Go heap is not profiled");
        }
        let is_go = first.go.as_ref().is_some_and(|go| go.target().is_some());
        if let Some(child) = &target.child {
            first.inherited = child.inherited.filter(|_| is_copy && epoch == 0);
            first.child_of = Some(child.child_of());
        }
        if let Some(reason) = scan.stays_mapped {
            target.choice = Choice::Uprobe(Some(reason));
        }
        target.images.push(first);
        target.state = State::Tracing;
        for event in pending {
            self.map_file(&event);
        }
        self.compile_missing(pid);
        self.publish_mappings(pid);
        self.watch_exit(pid, serial, Some(scan.exit));
        if is_go {
            self.child_is_traced(pid);
        }
        if epoch > 0
            && let Some(target) = self.targets.get_mut(&pid)
        {
            // Before it was read, or after.
            target.jobs += 1;
            self.spawn_rescan(image);
        }
        self.found(Found {
            pid,
            modules: scan.modules,
        });
    }

    /// A child could not be taken on.
    fn drop_child(&mut self, pid: u32, error: &TargetError) {
        if let Some(target) = self.targets.remove(&pid) {
            // It may have been told to BPF, or not.
            let _ = self.slot_map.remove(&pid);
            self.give_back(target.slot, true);
        }
        let Some(family) = &mut self.family else {
            return;
        };
        let is_failed = match error {
            TargetError::Exited(_)
            | TargetError::Process(ProcessError::NotFound { .. } | ProcessError::Zombie { .. }) => {
                family.gone(pid);
                false
            }
            // What an earlier program or the parent has left is gone in a moment.
            TargetError::InUse(_)
            | TargetError::Leftover { .. }
            | TargetError::Process(ProcessError::Io { .. } | ProcessError::Malformed { .. }) => {
                !family.try_again(pid, Instant::now())
            }
            _ => {
                family.fail(pid);
                true
            }
        };
        if is_failed {
            self.work.attaching.failed_to_attach += 1;
            warn!(pid, error = with_causes(error), "a child cannot be traced");
        } else {
            debug!(pid, error = with_causes(error), "a child is not traced");
        }
        self.publish_live();
    }

    /// A child's calls are looked at from now on, if that is what it is.
    pub(super) fn child_is_traced(&mut self, pid: u32) {
        let Some(target) = self.targets.get_mut(&pid).filter(|target| target.is_live()) else {
            return;
        };
        let Some(child) = target.child.as_mut().filter(|child| !child.is_traced) else {
            return;
        };
        child.is_traced = true;
        let parent = child.parent;
        let late_ns = child
            .born_ns
            .map(|born| monotonic_ns().saturating_sub(born));
        let late = late_ns.map(Duration::from_nanos);
        let mut of_child = child.child_of();
        of_child.untraced_s = late.map(|late| late.as_secs_f64());
        let attach_time = target.attach_time;
        let sites = target.sites.len();
        let Some(image) = target.current() else {
            return;
        };
        image.child_of = Some(of_child);
        info!(
            pid,
            parent,
            comm = image.info.comm,
            sites,
            ?late,
            "tracing a child"
        );
        self.work.attaching.attached += 1;
        self.work.attaching.attached_ms += milliseconds(attach_time);
        if let Some(family) = &mut self.family {
            family.tally.traced += 1;
        }
    }

    /// A target has ended, or was let go: if it is a child that was never traced, nothing of it
    /// is shown.
    pub(super) fn end_member(&mut self, pid: u32) {
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        let is_untraced = target.is_untraced_child();
        let image = target.images.last();
        // Word that it is probed may come after word that it has ended.
        let has_called = image.is_some_and(|image| {
            let exact = image.totals.exact();
            exact.is_some_and(|exact| exact.calls.alloc_calls + exact.calls.free_calls > 0)
                || self.ledger.tally(image.id).alloc_events > 0
        });
        let mut is_missed = false;
        if is_untraced && has_called {
            if let Some(child) = &mut target.child {
                child.is_traced = true;
            }
        } else if is_untraced && !target.is_unwanted {
            target.is_unwanted = true;
            is_missed = true;
        }
        if let Some(family) = &mut self.family {
            family.end_taken(pid);
            family.tally.traced += u64::from(is_untraced && has_called);
            family.tally.missed += u64::from(is_missed);
        }
    }

    /// Looks through all processes for children, elsewhere.
    pub(super) fn look_for_children(&mut self) {
        let Some(family) = self.family.as_mut().filter(|family| !family.is_looking) else {
            return;
        };
        family.is_looking = true;
        self.spawn_job(|| {
            let parents = all_pids()
                .into_iter()
                .filter_map(|pid| Some((pid, parent_of(pid)?)));
            Command::Parents(parents.collect())
        });
    }

    /// All processes were looked through.
    pub(super) fn parents_looked(&mut self, parents: &Parents) {
        // Who has been forked or has ended meanwhile.
        self.drain_mmap_events();
        let now = Instant::now();
        let Some(family) = &mut self.family else {
            return;
        };
        family.is_looking = false;
        family.looked = now;
        let has_found = family.look(parents, now, |pid| parent_of(pid).is_some());
        if has_found {
            // What those had forked before they were known; from now on that is told.
            self.look_for_children();
        }
        self.publish_live();
    }

    /// Has it told when all children that there are have had their turn.
    pub(super) fn when_settled(&mut self, reply: SettledReply) {
        if let Some(family) = &mut self.family {
            family.settled = Some(reply);
        }
    }

    /// What is to be done now and then.
    pub(super) fn look_after_children(&mut self, slow: bool) {
        let has_lost = self.mmap_events.lost();
        let Some(family) = &mut self.family else {
            return;
        };
        let is_behind = std::mem::replace(&mut family.lost_seen, has_lost) != has_lost;
        if is_behind || slow && family.looked.elapsed() >= LOOK_EVERY {
            family.try_failed(Instant::now());
            self.look_for_children();
        }
        self.tell_settled();
    }

    fn tell_settled(&mut self) {
        let is_child = |target: &&Target| target.is_live() && target.child.is_some();
        let children = || self.targets.values().filter(is_child);
        let is_under_way =
            |target: &Target| target.is_untraced_child() && (target.jobs > 0 || target.is_hooking);
        let Some(family) = &mut self.family else {
            return;
        };
        let is_settled = !family.is_looking && family.waiting() == 0 && family.scanning == 0;
        if !is_settled || children().any(is_under_way) {
            return;
        }
        if let Some(reply) = family.settled.take() {
            let traced = children().filter(|target| !target.is_untraced_child());
            let _ = reply.send(traced.count());
        }
    }
}

impl Child {
    /// As it is told.
    pub(super) const fn child_of(&self) -> ChildOf {
        ChildOf {
            parent_pid: self.parent,
            untraced_s: None,
        }
    }
}

impl Target {
    /// Whether it is a child of which no call has been looked at yet.
    pub(super) fn is_untraced_child(&self) -> bool {
        self.child.as_ref().is_some_and(|child| !child.is_traced)
    }
}
