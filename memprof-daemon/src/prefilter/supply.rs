//! Keeps a target supplied with gaps.
//!
//! Its threads take them from a ring, the daemon puts new ones there at each tick. A thread
//! that finds the ring empty takes one of a number of *credits* instead: the next block is
//! undecided then, and BPF decides it. So the ring may run dry, and is kept so at an interval
//! of 1, at which every block is sampled. The credits end as well if the daemon does: then
//! threads fall asleep, which no interval but 0 wants.
//!
//! When the interval changes, what is left of a gap drawn with the old one would be served
//! first, which takes long if the old one is large. Gaps have no memory, so a thread may
//! throw one away at any moment that does not depend on where it ends; the daemon asks for
//! that by a countdown that none has. The thread's own subtraction may write over it at that
//! very moment, so it looks again at the next tick.

use memprof_common::prefilter::{
    ASLEEP_LIMIT, DATA_MAGIC, HEADER_CREDIT, HEADER_GENERATION, HEADER_MAGIC, HEADER_RING_HEAD,
    HEADER_RING_TAIL, HEADER_STARVED, REDRAW, REDRAW_LIMIT, RING_ENTRIES, RING_ENTRY_BYTES,
    SHARD_COUNTDOWN, SHARD_GENERATION,
};

use super::{gaps::Gaps, shared::Shared};

/// How many blocks BPF may be asked to decide from one tick to the next: as many as a
/// hundred processors can ask about in a tenth of a second, a trap each.
const CREDIT: u64 = 1 << 24;

/// The daemon's side of the supply.
#[derive(Debug)]
pub(super) struct Supply {
    gaps: Gaps,
    interval_bytes: u64,
    generation: u64,
    /// Behind the last gap that was put into the ring.
    tail: u64,
    /// The target's count of threads that fell asleep, at the last look.
    starved_seen: u64,
    /// Those that were to sample.
    starved: u64,
    /// There may be shards that are to take another gap, and have not been seen to know.
    redraws: bool,
}

impl Supply {
    pub(super) const fn new() -> Self {
        Self {
            gaps: Gaps::new(0),
            interval_bytes: 0,
            generation: 0,
            tail: 0,
            starved_seen: 0,
            starved: 0,
            redraws: false,
        }
    }

    /// Begins, or goes on with what another daemon has left.
    pub(super) fn start(&mut self, shared: &Shared, interval_bytes: u64, seed: u64) {
        self.gaps = Gaps::new(seed);
        self.generation = shared.load(HEADER_GENERATION);
        self.tail = shared.load(HEADER_RING_TAIL);
        self.starved_seen = shared.load(HEADER_STARVED);
        self.set_interval(shared, interval_bytes);
        shared.store(HEADER_MAGIC, DATA_MAGIC);
    }

    pub(super) fn set_interval(&mut self, shared: &Shared, interval_bytes: u64) {
        self.count_starved(shared);
        self.interval_bytes = interval_bytes;
        let credit = if interval_bytes == 0 { 0 } else { CREDIT };
        shared.store(HEADER_CREDIT, credit);
        // Empty. A thread that takes a gap at this moment does so before or not at all: it
        // needs the head to be as it was.
        shared.store(HEADER_RING_HEAD, self.tail);
        // Now: whoever sees it takes a gap of the new interval.
        self.generation = self.generation.wrapping_add(1);
        shared.store(HEADER_GENERATION, self.generation);
        self.fill(shared);
        self.redraws = self.ask(shared);
    }

    /// Whether ticks look at shards.
    #[cfg(test)]
    pub(super) const fn looks_at_shards(&self) -> bool {
        self.redraws
    }

    /// To be called ten times a second. Looks at a few words if nothing has happened.
    pub(super) fn tick(&mut self, shared: &Shared) {
        self.fill(shared);
        if self.interval_bytes != 0 {
            let left = shared.load(HEADER_CREDIT).cast_signed();
            if left < (CREDIT / 2).cast_signed() {
                shared.store(HEADER_CREDIT, CREDIT);
            }
        }
        // After there is something to take again.
        if self.count_starved(shared) {
            self.redraws = true;
        }
        if self.redraws {
            self.redraws = self.ask(shared);
        }
    }

    /// Threads that have fallen asleep though there was an interval.
    pub(super) fn starved(&self, shared: &Shared) -> u64 {
        let since = self.starved_since(shared);
        self.starved
            .saturating_add(if self.interval_bytes == 0 { 0 } else { since })
    }

    fn starved_since(&self, shared: &Shared) -> u64 {
        shared
            .load(HEADER_STARVED)
            .saturating_sub(self.starved_seen)
    }

    /// True if threads are to be woken.
    fn count_starved(&mut self, shared: &Shared) -> bool {
        let since = self.starved_since(shared);
        self.starved_seen = self.starved_seen.saturating_add(since);
        if self.interval_bytes == 0 {
            return false;
        }
        self.starved = self.starved.saturating_add(since);
        since != 0
    }

    /// Puts gaps where there are none.
    fn fill(&mut self, shared: &Shared) {
        if self.interval_bytes <= 1 {
            return;
        }
        let left = self.tail.wrapping_sub(shared.load(HEADER_RING_HEAD));
        // More than there can be: the target has written there. It gets no more.
        let Some(missing) = (RING_ENTRIES as u64).checked_sub(left) else {
            return;
        };
        if missing == 0 {
            return;
        }
        let ring = shared.geometry().ring_offset();
        for _ in 0..missing {
            let gap = self.gaps.draw(self.interval_bytes);
            #[expect(
                clippy::cast_possible_truncation,
                reason = "less than the length of the ring"
            )]
            let place = (self.tail % RING_ENTRIES as u64) as usize;
            let entry = ring + place * RING_ENTRY_BYTES;
            shared.store(entry, gap.bytes);
            shared.store(entry + size_of::<u64>(), gap.interval_bytes);
            self.tail = self.tail.wrapping_add(1);
        }
        shared.store(HEADER_RING_TAIL, self.tail);
    }

    /// Asks the threads whose gap is an older interval's, and those that sleep and should
    /// not, to take another. True if there was one that had not been asked.
    fn ask(&self, shared: &Shared) -> bool {
        let mut asked = false;
        for shard in shared.used_shards() {
            let place = shard + SHARD_COUNTDOWN;
            let countdown = shared.load(place);
            let left = countdown.cast_signed();
            let is_old = shared.load(shard + SHARD_GENERATION) != self.generation;
            let sleeps = self.interval_bytes != 0 && left > ASLEEP_LIMIT;
            if left > REDRAW_LIMIT && (is_old || sleeps) {
                shared.replace(place, countdown, REDRAW.cast_unsigned());
                asked = true;
            }
        }
        asked
    }
}
