//! The books: which sampled blocks are live, and what each stack has allocated
//! and freed.
//!
//! Plain state behind plain functions: no aya, no tokio, no files, no clock. One
//! task owns a [`Ledger`]; everyone else gets a [`Snapshot`].
//!
//! # The state, worked through
//!
//! Two processes, interval 1000 bytes. Process 7 allocates 500 bytes at `a` from
//! stack X: sampled, weight 500 / (1 - exp(-0.5)) = 1270.7 bytes, 2.54 objects.
//! Process 8 allocates 4000 bytes at the same address from the same stack: weight
//! 4074.6 bytes, 1.02 objects. The books:
//!
//! ```text
//!              live                          stacks
//! image 7.0    a ─► (t1, 1270.7 B, X)        X: alloc 1270.7 B, free 0
//! image 8.0    a ─► (t2, 4074.6 B, X)        X: alloc 4074.6 B, free 0
//! ```
//!
//! Process 7 frees `a`. The weight that was stored is subtracted, whatever the
//! interval is by now; process 8 is untouched:
//!
//! ```text
//! image 7.0                                  X: alloc 1270.7 B, free 1270.7 B
//! image 8.0    a ─► (t2, 4074.6 B, X)        X: alloc 4074.6 B, free 0
//! ```
//!
//! `alloc - free = live` holds for each image and stack: 0 = 0 and 4074.6 =
//! 4074.6. And in events, for each image: `alloc_events = live + free_events +
//! purged`, 1 = 0 + 1 + 0 and 1 = 1 + 0 + 0. Process 8 ends: its live blocks are
//! purged (1 = 0 + 0 + 1), and the counters stay as they are, so that the profile
//! of an ended process shows what it held at its end.
//!
//! # When events were lost
//!
//! The BPF live map is the truth. [`Ledger::begin_sweep`] and
//! [`Ledger::finish_sweep`] bring the books to its state; see there.

pub mod baseline;
mod image;
pub mod room;
pub mod snapshot;

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::Arc,
};

use memprof_common::stack::StackKey;

pub use self::{
    image::{EventTally, LiveAllocation},
    snapshot::{ImageSnapshot, Snapshot, StackCounters, StackSnapshot, StackTrace},
};
use self::{
    image::{ImageBooks, Size},
    room::Room,
};
use crate::sample::{AllocKey, AllocSample, FreeSample, ImageId};

/// What became of an alloc sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocOutcome {
    /// Booked.
    Recorded,
    /// Booked, and the block that the books held at this address is booked as
    /// freed: its free was missed.
    Replaced,
    /// The free that a failed `realloc` had announced is taken back.
    Restored,
    /// Booked as allocated and freed: the books hold a newer block at this
    /// address.
    Stale,
    /// Known already.
    Duplicate,
    /// Its image has ended.
    Late,
}

/// What became of a free sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreeOutcome {
    /// Booked.
    Freed,
    /// No such block in the books.
    Unmatched,
}

/// All images and their stacks.
#[derive(Debug, Default)]
pub struct Ledger {
    images: HashMap<ImageId, ImageBooks>,
    traces: HashMap<StackKey, Arc<StackTrace>>,
    /// Counts sweeps; a live block remembers the one it came after.
    generation: u32,
    room: Room,
}

impl Ledger {
    /// Empty books.
    #[must_use]
    pub fn new() -> Self {
        let mut ledger = Self::default();
        ledger
            .traces
            .insert(StackKey::UNKNOWN, Arc::new(StackTrace::default()));
        ledger
    }

    /// Whether the frames of this stack are known.
    #[must_use]
    pub fn knows_stack(&self, stack: StackKey) -> bool {
        self.traces.contains_key(&stack)
    }

    /// The frames of a stack.
    #[must_use]
    pub fn trace(&self, stack: StackKey) -> Option<&Arc<StackTrace>> {
        self.traces.get(&stack)
    }

    /// Tells the frames of a stack. The first to tell wins: a name stands for
    /// one stack for ever.
    pub fn add_stack(&mut self, stack: StackKey, trace: StackTrace) {
        if let Entry::Vacant(place) = self.traces.entry(stack) {
            self.room.learnt(&trace);
            place.insert(Arc::new(trace));
        }
    }

    /// How many distinct stacks are known.
    #[must_use]
    pub fn known_stacks(&self) -> usize {
        self.traces.len()
    }

    /// Books an allocation.
    pub fn alloc(&mut self, sample: &AllocSample) -> AllocOutcome {
        let generation = self.generation;
        self.book(sample, |books, sample| books.alloc(sample, generation))
    }

    /// Books a free, with the weight that was stored with the allocation.
    pub fn free(&mut self, sample: &FreeSample) -> FreeOutcome {
        self.change(sample.key.image, |books| {
            books.free(sample.key.addr, sample.alloc_timestamp_ns)
        })
        .unwrap_or(FreeOutcome::Unmatched)
    }

    /// Begins a sweep; to be preceded and followed, in this order and by the
    /// owner of the ledger alone, by
    ///
    /// 0. reading the counters of losses, then draining the ring,
    /// 1. (this) reading the whole BPF live map,
    /// 2. [`Self::recover`] for each block in it that is marked unsent,
    /// 3. draining the ring of everything that was in it when the reading ended,
    /// 4. [`Self::finish_sweep`] with what was read.
    ///
    /// Why it is right: a block that is in the books before the sweep was put
    /// into the map before its event was sent, so if the reading did not meet it,
    /// it was freed; and after step 3, every free that could be told has been.
    /// What is in the books still and not in the map is a free that was lost.
    /// Blocks booked since the sweep began are left alone: the reading may have
    /// passed their place before they came. A block recovered in step 2 and freed
    /// since is freed again in step 3, by its event.
    ///
    /// A free that was lost before step 0 is of a block whose own event was in
    /// the ring by then, so step 0 has booked it and the sweep finds it; one that
    /// was lost later shows in the counters, and is for the next sweep. One
    /// exception: a record that a preempted program has reserved and not filled
    /// hides those behind it from step 0. They are booked in step 3, which tells
    /// that another sweep is needed.
    pub fn begin_sweep(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        for books in self.images.values_mut() {
            books.begin_sweep(self.generation);
        }
    }

    /// Books a block that was found in the live map and never announced.
    pub fn recover(&mut self, sample: &AllocSample) -> AllocOutcome {
        let generation = self.generation;
        self.book(sample, |books, sample| books.recover(sample, generation))
    }

    /// Ends a sweep: books as freed what was live before it and is not in the
    /// map. `is_in_map` tells whether the map held this allocation of the block.
    /// Returns how many frees were found.
    pub fn finish_sweep(&mut self, is_in_map: impl Fn(&AllocKey, u64) -> bool) -> u64 {
        let generation = self.generation;
        let room = &mut self.room;
        self.images
            .iter_mut()
            .map(|(&image, books)| {
                let before = books.size();
                let found = books.sweep(generation, |addr, timestamp_ns| {
                    is_in_map(&AllocKey { image, addr }, timestamp_ns)
                });
                room.changed(before, books.size());
                found
            })
            .sum()
    }

    /// The image has ended: its live blocks are purged, its counters stay.
    /// Returns how many blocks there were.
    pub fn close(&mut self, image: ImageId) -> u64 {
        let _ = self.images.entry(image).or_default();
        self.change(image, ImageBooks::close).unwrap_or_default()
    }

    /// Forgets the books of all images of a process.
    pub fn forget(&mut self, pid: u32) {
        let room = &mut self.room;
        self.images.retain(|image, books| {
            let stays = image.pid != pid;
            if !stays {
                room.changed(books.size(), Size::default());
            }
            stays
        });
    }

    /// Forgets the books of one image.
    pub fn forget_image(&mut self, image: ImageId) {
        if let Some(books) = self.images.remove(&image) {
            self.room.changed(books.size(), Size::default());
        }
    }

    /// The sampled blocks that are live in the images that `wanted` accepts.
    pub fn live_blocks(&self, wanted: impl Fn(ImageId) -> bool) -> Vec<AllocKey> {
        self.images
            .iter()
            .filter(|&(&image, _)| wanted(image))
            .flat_map(|(&image, books)| books.live_addresses().map(move |addr| (image, addr)))
            .map(|(image, addr)| AllocKey { image, addr })
            .collect()
    }

    /// The stacks that are in nobody's books any more.
    #[must_use]
    pub fn unused_stacks(&self) -> HashSet<StackKey> {
        let used = self.used_stacks();
        let known = self.traces.keys().copied();
        known.filter(|stack| !used.contains(stack)).collect()
    }

    /// Forgets the frames of those of `stacks` that are in nobody's books; returns the others.
    pub fn forget_unused_stacks(&mut self, stacks: &HashSet<StackKey>) -> Vec<StackKey> {
        let used = self.used_stacks();
        let (used, unused): (Vec<StackKey>, Vec<StackKey>) =
            stacks.iter().partition(|stack| used.contains(stack));
        for stack in unused {
            if let Some(trace) = self.traces.remove(&stack) {
                self.room.forgotten(&trace);
            }
        }
        self.shrink_stacks();
        used
    }

    fn used_stacks(&self) -> HashSet<StackKey> {
        self.images
            .values()
            .flat_map(ImageBooks::stacks)
            .map(|(stack, _)| stack.key)
            .chain([StackKey::UNKNOWN])
            .collect()
    }

    /// Whether [`Self::close`] was called for it.
    #[must_use]
    pub fn is_closed(&self, image: ImageId) -> bool {
        self.images.get(&image).is_some_and(ImageBooks::is_closed)
    }

    /// What happened to an image's events.
    #[must_use]
    pub fn tally(&self, image: ImageId) -> EventTally {
        self.images
            .get(&image)
            .map(|books| books.tally)
            .unwrap_or_default()
    }

    /// How many sampled blocks of an image are live.
    #[must_use]
    pub fn live(&self, image: ImageId) -> u64 {
        self.images.get(&image).map_or(0, ImageBooks::live)
    }

    /// The sum over the stacks of an image.
    #[must_use]
    pub fn sum(&self, image: ImageId) -> StackCounters {
        let mut sum = StackCounters::default();
        if let Some(books) = self.images.get(&image) {
            for (_, counters) in books.stacks() {
                sum += counters;
            }
        }
        sum
    }

    /// Every image in the books, in no order.
    pub fn images(&self) -> impl Iterator<Item = ImageId> + '_ {
        self.images.keys().copied()
    }

    /// A copy of the counters of the images that `wanted` accepts.
    #[must_use]
    pub fn snapshot(&self, wanted: impl Fn(ImageId) -> bool) -> Snapshot {
        Snapshot {
            images: self
                .images
                .iter()
                .filter(|&(&image, _)| wanted(image))
                .map(|(&image, books)| ImageSnapshot {
                    image,
                    stacks: books
                        .stacks()
                        .filter_map(|(stack, counters)| {
                            let trace = Arc::clone(self.traces.get(&stack.key)?);
                            Some((stack, StackSnapshot { trace, counters }))
                        })
                        .collect(),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests;
