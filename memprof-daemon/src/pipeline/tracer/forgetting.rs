//! Forgetting what is not traced any more: processes that have ended, programs that have been
//! replaced, and the stacks that only those had. What they have counted stays in sums.
//!
//! Where every process is traced, a host starts a million of them a day: what is kept of each
//! has to end.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use memprof_common::{counters::COUNTERS, stack::StackKey};
use tracing::debug;

use super::{Tracer, booking::MAX_STACKS, golang::GoImage};
use crate::{
    pipeline::{
        image::Image,
        stats::{Counted, Sums},
        target::Target,
    },
    sample::ImageId,
};

/// As many stacks are kept, whoever's they were: to find out costs a look at all books.
const MANY_STACKS: usize = 1 << 11;

/// From one such look to the next.
const LOOK_AT_STACKS: Duration = Duration::from_secs(10);

/// Stacks that BPF and the ledger know.
pub(super) struct Stacks {
    /// Those that the BPF map has, as far as events have named them.
    pub(super) in_map: HashSet<StackKey>,
    /// How many have to be known for it to be looked which of them nobody has.
    wanted: usize,
    looked_at: Instant,
    /// That is to be looked at the next round.
    is_urgent: bool,
    /// Those that nobody had then.
    unused: HashSet<StackKey>,
}

impl Default for Stacks {
    fn default() -> Self {
        Self {
            in_map: HashSet::new(),
            wanted: MANY_STACKS,
            looked_at: Instant::now(),
            is_urgent: false,
            unused: HashSet::new(),
        }
    }
}

impl Tracer {
    /// Forgets what is known of a process that is not traced any more, if nothing of it is
    /// under way; what it has counted stays in the sums over all.
    pub(super) fn forget_ended(&mut self, pid: u32) {
        if !self.targets.get(&pid).is_some_and(Target::is_over) {
            return;
        }
        if let Some(target) = self.targets.remove(&pid) {
            self.forget(pid, &target);
            if target.has_slot {
                self.give_back(target.slot, target.is_leaving());
            }
        }
    }

    /// Forgets what ended long enough ago.
    pub(super) fn forget_kept(&mut self) {
        self.forget_strays();
        self.forget_ended_long_ago();
        if self.options.keep_exited.is_some() {
            self.forget_replaced();
        }
        self.forget_stacks();
    }

    /// Forgets the processes that ended long enough ago.
    fn forget_ended_long_ago(&mut self) {
        let keep = self.options.keep_exited;
        let is_long_ago = |target: &Target| {
            let ended = target.ended().map(|ended| ended.elapsed());
            ended.zip(keep).is_some_and(|(ended, keep)| ended >= keep)
        };
        let due: Vec<u32> = self
            .targets
            .iter()
            .filter(|(_, target)| !target.is_live())
            .filter(|(_, target)| target.is_unwanted || is_long_ago(target))
            .map(|(&pid, _)| pid)
            .collect();
        for pid in due {
            self.forget_ended(pid);
        }
    }

    /// Forgets the programs that were replaced long enough ago, of processes that go on: one
    /// may run the next for ever.
    fn forget_replaced(&mut self) {
        let Some(keep) = self.options.keep_exited else {
            return;
        };
        let is_due = |image: &Image| image.until().is_some_and(|until| until.elapsed() >= keep);
        let mut due: Vec<ImageId> = Vec::new();
        for target in self.targets.values() {
            let replaced = target.images.len().saturating_sub(1);
            let images = target.images.iter().take(replaced);
            due.extend(images.filter(|image| is_due(image)).map(|image| image.id));
        }
        // What is not closed is so at the end of this round, and its totals are read then.
        let is_read = |image: &ImageId| self.unconfirmed_totals.iter().all(|m| m.pid != image.pid);
        due.retain(|image| self.ledger.is_closed(*image) && is_read(image));
        for image in due {
            self.forget_image(image);
        }
    }

    /// Moves what a program has counted to the sums of its process.
    fn forget_image(&mut self, id: ImageId) {
        let Some(target) = self.targets.get(&id.pid) else {
            return;
        };
        let Some(place) = target.images.iter().position(|image| image.id == id) else {
            return;
        };
        let losses = self.losses(target.slot);
        let counted = target
            .images
            .get(place)
            .map(|image| self.counted(image, losses));
        if let Some(target) = self.targets.get_mut(&id.pid)
            && let Some(counted) = counted
        {
            target.replaced.add(&counted);
            target.images.remove(place);
            self.ledger.forget_image(id);
        }
    }

    /// Forgets books that are nobody's: of samples that were told after the process, or the
    /// program, had been forgotten or let go.
    fn forget_strays(&mut self) {
        let is_known = |id: ImageId| {
            self.targets.get(&id.pid).is_some_and(|target| {
                // Of one that is being scanned, the first is not known yet.
                target.images.is_empty() || target.images.iter().any(|image| image.id == id)
            })
        };
        let strays: Vec<ImageId> = self
            .ledger
            .images()
            .filter(|image| !is_known(*image))
            .collect();
        for image in strays {
            debug!(
                pid = image.pid,
                epoch = image.epoch,
                "samples came too late"
            );
            self.empty_books(image.pid, image.epoch, false);
            self.ledger.forget_image(image);
        }
    }

    /// Forgets stacks that are in nobody's books, once there may be as many of them as of
    /// others. BPF names a stack that it has in its map, and its frames are read there when
    /// that name is met first. So they are taken out of the map in one round, and forgotten in
    /// the next, if no program of BPF's has named one of them meanwhile.
    fn forget_stacks(&mut self) {
        // What was captured is to be booked before.
        self.drain_ring();
        if !self.stacks.unused.is_empty() {
            let mut unused = std::mem::take(&mut self.stacks.unused);
            for used_again in self.ledger.forget_unused_stacks(&unused) {
                unused.remove(&used_again);
            }
            for image in self.targets.values_mut().flat_map(|t| &mut t.images) {
                image.versions.forget(&unused);
            }
        } else if self.ledger.known_stacks() >= self.stacks.wanted
            && (self.stacks.is_urgent || self.stacks.looked_at.elapsed() >= LOOK_AT_STACKS)
        {
            let unused = self.ledger.unused_stacks();
            for stack in &unused {
                // It may be gone already, to make room.
                let _ = self.stack_map.remove(stack);
                self.stacks.in_map.remove(stack);
            }
            let used = self.ledger.known_stacks().saturating_sub(unused.len());
            self.stacks.wanted = (2 * used).clamp(MANY_STACKS, MAX_STACKS);
            self.stacks.looked_at = Instant::now();
            self.stacks.is_urgent = false;
            self.stacks.unused = unused;
        }
    }

    /// Has stacks that are in nobody's books looked for at the next round, however few there are.
    pub(super) fn forget_stacks_soon(&mut self) {
        self.stacks.wanted = 0;
        self.stacks.is_urgent = true;
    }

    /// Moves what a target has counted to the sums over those that are forgotten.
    pub(super) fn forget(&mut self, pid: u32, target: &Target) {
        let sums = self.sums_of(target);
        self.forgotten.add(&sums);
        // Of a child that was never traced nothing was shown either.
        self.forgotten_targets += u64::from(!target.is_untraced_child());
        self.ledger.forget(pid);
    }

    /// What the images of a target have counted.
    pub(super) fn sums_of(&self, target: &Target) -> Sums {
        let losses = self.losses(target.slot);
        let mut sums = target.replaced.sums.clone();
        for image in &target.images {
            sums.add(&self.sums_of_image(image, losses));
        }
        sums
    }

    fn sums_of_image(&self, image: &Image, losses: [u64; COUNTERS]) -> Sums {
        let tally = self.ledger.tally(image.id);
        Sums {
            alloc_events: tally.alloc_events,
            free_events: tally.free_events,
            losses: image.losses(losses, &tally),
        }
    }

    /// What a program has counted.
    pub(super) fn counted(&self, image: &Image, losses: [u64; COUNTERS]) -> Counted {
        let sums = self.sums_of_image(image, losses);
        let mut allocated = self.ledger.sum(image.id);
        let mut samples = sums.alloc_events;
        let exact = image.totals.exact();
        let mut exact_bytes = exact.map(|exact| exact.calls.alloc_bytes);
        if let Some(go) = image.go.as_ref().and_then(GoImage::target) {
            allocated += *go.sum();
            samples += go.sum().samples;
            // The rate is of the time since the attach.
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "it saturates, and is not negative"
            )]
            let since_found = go.bytes_since_found() as u64;
            exact_bytes = exact_bytes.map(|bytes| bytes + since_found);
        }
        Counted {
            sums,
            samples,
            allocated,
            exact_bytes,
            since: Some(image.since()),
        }
    }
}
