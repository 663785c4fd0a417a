//! How much memory the books take, and how much of it stacks may take.
//!
//! Blocks are as many as the BPF live map holds. Stacks are as many as programs have: when
//! they would take more than they may, samples of further stacks are booked under the unknown
//! stack and counted. So all sums stay right, and the counters of a stack, too, as far as they
//! go.

use std::sync::Arc;

use memprof_common::stack::StackKey;

use super::{
    AllocOutcome, ImageBooks, Ledger, LiveAllocation, StackCounters, StackTrace, image::Size,
};
use crate::sample::{AllocSample, ImageId, StackId};

/// What an entry of a hash table takes at most: a byte more, and a table has up to 16 places
/// for 7 entries just after it has grown.
const fn entry_bytes(size: usize) -> u64 {
    ((size as u64 + 1) * 16).div_ceil(7)
}

/// What a live block takes at most.
pub const BLOCK_BYTES: u64 = entry_bytes(size_of::<(u64, LiveAllocation)>());

/// What the counters of a stack of one image take at most.
const COUNTERS_BYTES: u64 = entry_bytes(size_of::<(StackId, StackCounters)>());

/// What a stack takes without its frames: its place in the table, its counts of references, and
/// what the allocator puts before it and before its frames.
const TRACE_BYTES: u64 = entry_bytes(size_of::<(StackKey, Arc<StackTrace>)>())
    + (size_of::<StackTrace>() + 2 * size_of::<usize>() + 2 * 16) as u64;

/// What of the ledger is counted while it changes.
#[derive(Debug, Default)]
pub(super) struct Room {
    stack_bytes: u64,
    max_stack_bytes: Option<u64>,
    blocks: u64,
}

impl Room {
    /// Takes notice of how the books of an image have changed.
    pub(super) fn changed(&mut self, before: Size, after: Size) {
        let bytes = |size: Size| size.stacks * COUNTERS_BYTES;
        self.stack_bytes = (self.stack_bytes + bytes(after)).saturating_sub(bytes(before));
        self.blocks = (self.blocks + after.blocks).saturating_sub(before.blocks);
    }

    /// Takes notice of a stack.
    pub(super) fn learnt(&mut self, trace: &StackTrace) {
        self.stack_bytes += trace_bytes(trace);
    }

    /// Takes notice that a stack is forgotten.
    pub(super) fn forgotten(&mut self, trace: &StackTrace) {
        self.stack_bytes = self.stack_bytes.saturating_sub(trace_bytes(trace));
    }

    fn is_full(&self) -> bool {
        self.max_stack_bytes
            .is_some_and(|max| self.stack_bytes >= max)
    }
}

fn trace_bytes(trace: &StackTrace) -> u64 {
    TRACE_BYTES + (trace.frames.capacity() * size_of::<u64>()) as u64
}

impl Ledger {
    /// Lets stacks take so many bytes from now on; those that are known stay.
    pub fn limit_stacks(&mut self, max_stack_bytes: Option<u64>) {
        self.room.max_stack_bytes = max_stack_bytes;
    }

    /// Whether one more stack may be added.
    #[must_use]
    pub fn has_room_for_stacks(&self) -> bool {
        !self.room.is_full()
    }

    /// What stacks and their counters take.
    #[must_use]
    pub fn stack_bytes(&self) -> u64 {
        self.room.stack_bytes
    }

    /// How many blocks are live in all images.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.room.blocks
    }

    /// What live blocks take.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.images.values().map(ImageBooks::block_bytes).sum()
    }

    /// Gives back what tables of blocks have kept since they held many more.
    pub fn shrink(&mut self) {
        self.images.values_mut().for_each(ImageBooks::shrink);
    }

    /// The same of the table of stacks.
    pub(super) fn shrink_stacks(&mut self) {
        let wanted = self.traces.len().max(1024) * 2;
        if self.traces.capacity() / 2 >= wanted {
            self.traces.shrink_to(wanted);
        }
    }

    /// The stack that a sample is booked under: the unknown one, if there is no room.
    fn stack_in_room(&self, sample: &AllocSample) -> StackId {
        let stack = sample.stack;
        let is_known = |books: &ImageBooks| books.has(stack);
        if !self.room.is_full() || self.images.get(&sample.key.image).is_some_and(is_known) {
            return stack;
        }
        StackId::first(StackKey::UNKNOWN)
    }

    /// Books a sample by `book`, under a stack that there is room for.
    pub(super) fn book(
        &mut self,
        sample: &AllocSample,
        book: impl FnOnce(&mut ImageBooks, &AllocSample) -> AllocOutcome,
    ) -> AllocOutcome {
        let stack = self.stack_in_room(sample);
        let books = self.images.entry(sample.key.image).or_default();
        let before = books.size();
        let outcome = book(books, &AllocSample { stack, ..*sample });
        let is_new = matches!(
            outcome,
            AllocOutcome::Recorded | AllocOutcome::Replaced | AllocOutcome::Stale
        );
        if is_new && stack != sample.stack {
            books.tally.stacks_full += 1;
        }
        self.room.changed(before, books.size());
        outcome
    }

    /// Changes the books of an image, if there are any, by `change`.
    pub(super) fn change<T>(
        &mut self,
        image: ImageId,
        change: impl FnOnce(&mut ImageBooks) -> T,
    ) -> Option<T> {
        let books = self.images.get_mut(&image)?;
        let before = books.size();
        let result = change(books);
        self.room.changed(before, books.size());
        Some(result)
    }
}

#[cfg(test)]
#[path = "room_tests.rs"]
mod tests;
