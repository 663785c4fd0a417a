//! Samples into the books, and the books to the truth.

use std::collections::{BTreeMap, HashMap};

use memprof_common::{
    config::Unwind,
    counters::{COUNTERS, DropReason},
    live::LiveKey,
    stack::{StackKey, StackRecord},
    unwind::walk::{END_BY_FRAME_POINTER, StackEnd},
};
use tracing::{debug, warn};

use super::Tracer;
use crate::{
    address::{AbsAddr, FrameAddress},
    decode::{alloc_key, alloc_sample, decode, is_unsent},
    ledger::{AllocOutcome, StackTrace},
    pipeline::{image::Image, target::Target},
    sample::{AllocKey, AllocSample, ImageId, Sample, StackId},
};

/// Losses after which the books differ from the live map.
const REPAIRED_BY_SWEEP: [DropReason; 3] = [
    DropReason::AllocRingFull,
    DropReason::AllocUnreported,
    DropReason::FreeRingFull,
];

/// Stacks of which the frames are known, at most: some hundred megabytes. A program that
/// recurses, or makes code at run time, can have as many as it likes.
pub(super) const MAX_STACKS: usize = 1 << 18;

/// Sweeps in a row, at most. Two are enough once the targets are quiet.
const MAX_SWEEPS: u32 = 4;

impl Tracer {
    fn apply(&mut self, sample: &Sample) {
        match sample {
            Sample::Alloc(alloc) => {
                self.meet_image(alloc.key.image, None);
                let alloc = self.with_version(alloc);
                let outcome = self.ledger.alloc(&alloc.0);
                self.note_version(&alloc, outcome);
            }
            Sample::Free(free) => {
                self.meet_image(free.key.image, None);
                self.ledger.free(free);
            }
            Sample::Exec {
                image,
                by_other_thread,
                comm,
            } => {
                if let Some(target) = self.targets.get_mut(&image.pid) {
                    target.execs_told = target.execs_told.saturating_add(1);
                }
                self.meet_image(*image, Some(comm));
                if *by_other_thread {
                    self.probe_again(image.pid);
                }
            }
            Sample::Claim(claim) => self.claimed(claim),
            Sample::UnknownCode { image, address } => self.meet_unknown_code(*image, *address),
        }
    }

    /// Books what the ring has told. Records about the code that the samples ran in were
    /// written before: so they are there to be read by now.
    pub(super) fn apply_all(&mut self, samples: &[Sample]) {
        if !samples.is_empty() {
            self.drain_mmap_events();
        }
        for sample in samples {
            self.apply(sample);
        }
    }

    /// Everything that is in the ring now into the books; whether there were
    /// allocations among it.
    pub(super) fn drain_ring(&mut self) -> bool {
        let mut samples = Vec::new();
        let mut undecodable = 0;
        self.ring.drain_present(|record| match decode(record) {
            Ok(sample) => samples.push(sample),
            Err(_) => undecodable += 1,
        });
        self.undecodable_events += undecodable;
        self.apply_all(&samples);
        self.write_stack_copies();
        samples
            .iter()
            .any(|sample| matches!(sample, Sample::Alloc(_)))
    }

    /// Copies a stack's frames from BPF when its name is first met; whether they are known
    /// then.
    fn learn_stack(&mut self, stack: StackKey) -> bool {
        let is_kept = self.keep_stack(stack);
        // BPF has put it into its map, maybe again.
        if stack != StackKey::UNKNOWN && self.stacks.in_map.insert(stack) {
            self.make_room_for_stacks();
        }
        is_kept
    }

    fn keep_stack(&mut self, stack: StackKey) -> bool {
        if self.ledger.knows_stack(stack) {
            return true;
        }
        if self.ledger.known_stacks() >= MAX_STACKS || !self.ledger.has_room_for_stacks() {
            return false;
        }
        match self.stack_map.get(&stack, 0) {
            Ok(record) => self.ledger.add_stack(stack, trace(&record)),
            Err(error) => {
                // BPF puts a stack into the map before it names it, and only
                // known ones are removed: not to be expected.
                self.missing_stacks += 1;
                debug!(%error, "a stack is not in the BPF map");
                self.ledger.add_stack(stack, StackTrace::default());
            }
        }
        true
    }

    /// The sample, with the version of its stack: what code its addresses were at its time.
    /// And whether its stack is kept.
    fn with_version(&mut self, sample: &AllocSample) -> (AllocSample, bool) {
        let mut sample = *sample;
        if !self.learn_stack(sample.stack.key) {
            sample.stack = StackId::first(StackKey::UNKNOWN);
            return (sample, false);
        }
        let by_tables = self.options.unwind != Unwind::FramePointers;
        if let Some(trace) = self.ledger.trace(sample.stack.key)
            && let Some(image) = image_of(&mut self.targets, sample.key.image)
        {
            let stack = (sample.stack.key, &**trace);
            let time_ns = sample.timestamp_ns;
            sample.stack.version = image
                .versions
                .version(&image.code, stack, time_ns, by_tables);
        }
        (sample, true)
    }

    /// Counts a sample that was booked, if its walk took code for what was there before, or
    /// if it is not known any more what was; and if its stack is not kept.
    fn note_version(&mut self, (sample, is_kept): &(AllocSample, bool), outcome: AllocOutcome) {
        let is_new = matches!(
            outcome,
            AllocOutcome::Recorded | AllocOutcome::Replaced | AllocOutcome::Stale
        );
        if is_new && let Some(image) = image_of(&mut self.targets, sample.key.image) {
            if image.versions.is_stale(sample.stack) {
                image.versions.stale_samples += 1;
            }
            if image.code.is_forgotten(sample.timestamp_ns) {
                image.versions.late_samples += 1;
            }
            if !is_kept {
                image.unkept_stacks += 1;
            }
        }
    }

    /// Once the BPF map is three quarters full of stacks that the ledger has, or has no room
    /// for, they make room. BPF puts one back when it is captured again, under the
    /// same name, since the name is a hash of the frames.
    fn make_room_for_stacks(&mut self) {
        let limit = self.memory.budget.sizes.stack_entries as usize / 4 * 3;
        if self.stacks.in_map.len() < limit.max(1) {
            return;
        }
        for stack in self.stacks.in_map.drain() {
            if let Err(error) = self.stack_map.remove(&stack) {
                debug!(%error, "cannot remove a stack from the BPF map");
            }
        }
    }

    /// Sweeps until the books agree with the live map, or as often as makes
    /// sense while the targets go on.
    pub(super) fn settle(&mut self) {
        for _ in 0..MAX_SWEEPS {
            if !self.sweep_if_lossy() {
                return;
            }
        }
    }

    /// As [`Self::settle`], for the books of one process that end: not if nothing of it was
    /// lost.
    pub(super) fn settle_of(&mut self, pid: u32) {
        let Some(target) = self.targets.get(&pid) else {
            return;
        };
        let losses = self.losses(target.slot);
        if self.sweep_again || has_lost(&losses, &target.swept_losses) {
            self.settle();
        }
    }

    /// Whether the books of a process may ever have differed from the live map.
    pub(super) fn is_lossy(&self, pid: u32) -> bool {
        let lost = |target: &Target| has_lost(&self.losses(target.slot), &[0; COUNTERS]);
        self.targets.get(&pid).is_none_or(lost)
    }

    /// Sweeps if events were lost since the last sweep, or if that asked for
    /// another; whether it did.
    pub(super) fn sweep_if_lossy(&mut self) -> bool {
        let mut needed = std::mem::take(&mut self.sweep_again);
        let losses: Vec<_> = self
            .targets
            .iter()
            .filter(|(_, target)| target.is_live())
            .map(|(&pid, target)| (pid, self.losses(target.slot)))
            .collect();
        for (pid, losses) in losses {
            if let Some(target) = self.targets.get_mut(&pid) {
                needed |= has_lost(&losses, &target.swept_losses);
                target.swept_losses = losses;
            }
        }
        if needed {
            self.sweep();
        }
        needed
    }

    /// Brings the books to the state of the live map; the order of the steps is
    /// [`crate::ledger::Ledger::begin_sweep`]'s.
    pub(super) fn sweep(&mut self) {
        self.drain_ring();
        self.ledger.begin_sweep();
        let entries = match self.live_map.read_all() {
            Ok(entries) => entries,
            Err(error) => {
                self.failed_sweeps += 1;
                self.sweep_again = true;
                warn!(%error, "cannot read the live map: in-use may be off until the next sweep");
                return;
            }
        };
        self.drain_mmap_events();
        for (key, value) in entries.iter().filter(|(_, value)| is_unsent(value)) {
            if let Ok(sample) = alloc_sample(key, value) {
                self.meet_image(sample.key.image, None);
                let sample = self.with_version(&sample);
                let outcome = self.ledger.recover(&sample.0);
                self.note_version(&sample, outcome);
            }
        }
        self.sweep_again = self.drain_ring();
        let in_map: HashMap<AllocKey, u64> = entries
            .iter()
            .map(|(key, value)| (alloc_key(key), value.timestamp_ns))
            .collect();
        let frees = self
            .ledger
            .finish_sweep(|key, timestamp_ns| in_map.get(key) == Some(&timestamp_ns));
        self.sweeps += 1;
        debug!(live = entries.len(), frees, "swept the live map");
    }

    /// Closes an image's books and takes its blocks out of the live map.
    pub(super) fn close_books(&mut self, image: ImageId) {
        let is_lossy = match self.targets.get(&image.pid) {
            Some(target) if target.is_shared => self.is_lossy(image.pid),
            _ => true,
        };
        self.empty_books(image.pid, image.epoch, is_lossy);
        self.ledger.close(image);
    }

    /// Takes the blocks of a process, up to a program, out of the live map. They are those in
    /// the books, unless events were lost: then the map is read, and it is large.
    pub(super) fn empty_books(&mut self, pid: u32, epoch: u32, is_lossy: bool) {
        let is_its = |image: ImageId| image.pid == pid && image.epoch <= epoch;
        if !is_lossy {
            for key in self.ledger.live_blocks(is_its) {
                self.live_map.remove(&LiveKey {
                    pid: key.image.pid,
                    epoch: key.image.epoch,
                    addr: key.addr,
                });
            }
            return;
        }
        match self.live_map.read_all() {
            Ok(entries) => {
                for (key, _) in entries {
                    if key.pid == pid && key.epoch <= epoch {
                        self.live_map.remove(&key);
                    }
                }
            }
            Err(error) => {
                warn!(%error, pid, "cannot clear the live map of an ended process");
            }
        }
    }
}

/// Whether something was lost between two readings that a sweep repairs.
fn has_lost(now: &[u64; COUNTERS], before: &[u64; COUNTERS]) -> bool {
    REPAIRED_BY_SWEEP
        .iter()
        .any(|&reason| now.get(reason as usize) != before.get(reason as usize))
}

fn image_of(targets: &mut BTreeMap<u32, Target>, id: ImageId) -> Option<&mut Image> {
    let images = &mut targets.get_mut(&id.pid)?.images;
    images.iter_mut().rev().find(|image| image.id == id)
}

fn trace(record: &StackRecord) -> StackTrace {
    StackTrace {
        frames: record
            .frames
            .iter()
            .take(record.depth as usize)
            .map(|&address| FrameAddress(AbsAddr(address)))
            .collect(),
        end: StackEnd::from_code(record.end).unwrap_or(StackEnd::Unverified),
        by_frame_pointer: record.end & END_BY_FRAME_POINTER != 0,
    }
}
