//! The books of one process image.

use std::collections::{HashMap, hash_map::Entry};

use super::{AllocOutcome, FreeOutcome, StackCounters};
use crate::{
    sample::{AllocSample, StackId},
    weight::{Weight, unbias},
};

/// A sampled block that is not freed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LiveAllocation {
    /// When it was allocated.
    pub timestamp_ns: u64,
    /// What the sample stands for, fixed when it was taken.
    pub weight: Weight,
    /// Its stack.
    pub stack: StackId,
    /// The sweep it came after.
    generation: u32,
    /// Found in the live map, and no event has told of it since.
    untold: bool,
}

/// What happened to the events of an image. At quiescence
/// `alloc_events = live + free_events + purged`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventTally {
    /// Allocations booked, however they became known.
    pub alloc_events: u64,
    /// Frees booked, however they became known.
    pub free_events: u64,
    /// Live blocks that vanished with their process.
    pub purged: u64,
    /// Of `alloc_events`: found in the live map, not in the ring.
    pub recovered_allocations: u64,
    /// Of `free_events`: found missing in the live map.
    pub swept_frees: u64,
    /// Of `free_events`: found out since the address was allocated again.
    pub replaced_allocations: u64,
    /// Frees of blocks that are not in the books.
    pub unmatched_frees: u64,
    /// Frees taken back since a `realloc` failed.
    pub restored_allocations: u64,
    /// Of `recovered_allocations`: freed, and no event ever told of them. BPF
    /// counts them as unreported, not knowing that they were found.
    pub recovered_unreported: u64,
    /// Of `alloc_events`: booked under the unknown stack, since there was no room for theirs.
    pub stacks_full: u64,
}

/// How many entries there are that take memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) blocks: u64,
    pub(super) stacks: u64,
}

/// A table that has room for this many times what it holds gives some back.
const SPARSE: usize = 4;

/// A table is not made smaller than for this many.
const SMALL: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct ImageBooks {
    live: HashMap<u64, LiveAllocation>,
    stacks: HashMap<StackId, StackCounters>,
    /// Untold blocks that were booked as freed without a word: (address, time),
    /// and the sweep it happened in. An event about one may still be in the ring.
    ghosts: HashMap<(u64, u64), u32>,
    pub(super) tally: EventTally,
    closed: bool,
}

impl ImageBooks {
    pub(super) fn alloc(&mut self, sample: &AllocSample, generation: u32) -> AllocOutcome {
        if self.closed {
            return AllocOutcome::Late;
        }
        let name = (sample.key.addr, sample.timestamp_ns);
        if self.ghosts.remove(&name).is_some() {
            // BPF has told of it after all, so it did not count it as unreported.
            self.tally.recovered_unreported = self.tally.recovered_unreported.saturating_sub(1);
            if !sample.restored {
                return AllocOutcome::Duplicate;
            }
        }
        let weight = unbias(sample.size_bytes, sample.sample_interval_bytes);
        let allocation = LiveAllocation {
            timestamp_ns: sample.timestamp_ns,
            weight,
            stack: sample.stack,
            generation,
            untold: false,
        };
        let replaced = match self.live.entry(sample.key.addr) {
            Entry::Occupied(mut known) if known.get().timestamp_ns == sample.timestamp_ns => {
                known.get_mut().untold = false;
                return AllocOutcome::Duplicate;
            }
            // The address has been handed out again since, and a sweep has told
            // that before the ring told this.
            Entry::Occupied(known) if known.get().timestamp_ns > sample.timestamp_ns => {
                self.book_stale(sample, &allocation);
                return AllocOutcome::Stale;
            }
            Entry::Occupied(mut known) => Some(known.insert(allocation)),
            Entry::Vacant(place) => {
                place.insert(allocation);
                None
            }
        };
        if let Some(old) = replaced {
            self.remember_ghost(sample.key.addr, &old, generation);
            self.book_free(&old);
            self.tally.replaced_allocations += 1;
        }
        let counters = self.stacks.entry(sample.stack).or_default();
        counters.live_samples += 1;
        counters.coarsest_interval_bytes = counters
            .coarsest_interval_bytes
            .max(sample.sample_interval_bytes);
        // Only if a free was booked: there may be none to take back.
        if sample.restored && counters.samples >= counters.live_samples {
            counters.free_objects -= weight.weight_objects;
            counters.free_bytes -= weight.weight_bytes;
            counters.free_variance -= weight.variance_bytes;
            self.tally.free_events = self.tally.free_events.saturating_sub(1);
            self.tally.restored_allocations += 1;
            return AllocOutcome::Restored;
        }
        counters.samples += 1;
        counters.alloc_objects += weight.weight_objects;
        counters.alloc_bytes += weight.weight_bytes;
        counters.alloc_variance += weight.variance_bytes;
        self.tally.alloc_events += 1;
        if replaced.is_some() {
            AllocOutcome::Replaced
        } else {
            AllocOutcome::Recorded
        }
    }

    /// Books a block that was found in the live map.
    pub(super) fn recover(&mut self, sample: &AllocSample, generation: u32) -> AllocOutcome {
        let untold = self
            .live
            .get(&sample.key.addr)
            .is_none_or(|known| known.timestamp_ns != sample.timestamp_ns || known.untold);
        let outcome = self.alloc(sample, generation);
        if matches!(outcome, AllocOutcome::Recorded | AllocOutcome::Replaced) {
            self.tally.recovered_allocations += 1;
        }
        if let Some(known) = self.live.get_mut(&sample.key.addr)
            && known.timestamp_ns == sample.timestamp_ns
        {
            known.untold = untold;
        }
        outcome
    }

    /// Books an allocation whose block must have been freed by now.
    fn book_stale(&mut self, sample: &AllocSample, allocation: &LiveAllocation) {
        if sample.restored {
            // Its allocation is booked, and so is a free: the announced one is
            // as good as the real.
            return;
        }
        let weight = allocation.weight;
        let counters = self.stacks.entry(allocation.stack).or_default();
        counters.samples += 1;
        counters.live_samples += 1;
        counters.coarsest_interval_bytes = counters
            .coarsest_interval_bytes
            .max(sample.sample_interval_bytes);
        counters.alloc_objects += weight.weight_objects;
        counters.alloc_bytes += weight.weight_bytes;
        counters.alloc_variance += weight.variance_bytes;
        self.tally.alloc_events += 1;
        self.book_free(allocation);
        self.tally.replaced_allocations += 1;
    }

    pub(super) fn free(&mut self, addr: u64, alloc_timestamp_ns: u64) -> FreeOutcome {
        match self.live.entry(addr) {
            Entry::Occupied(known) if known.get().timestamp_ns == alloc_timestamp_ns => {
                let freed = known.remove();
                self.book_free(&freed);
                FreeOutcome::Freed
            }
            _ => {
                self.tally.unmatched_frees += 1;
                FreeOutcome::Unmatched
            }
        }
    }

    fn remember_ghost(&mut self, addr: u64, freed: &LiveAllocation, generation: u32) {
        if freed.untold {
            self.ghosts.insert((addr, freed.timestamp_ns), generation);
        }
    }

    /// What is in the ring when a sweep begins is drained by it: ghosts from
    /// before the sweep before this one are never heard of again.
    pub(super) fn begin_sweep(&mut self, generation: u32) {
        self.ghosts
            .retain(|_, born| generation.wrapping_sub(*born) <= 2);
    }

    fn book_free(&mut self, freed: &LiveAllocation) {
        let counters = self.stacks.entry(freed.stack).or_default();
        counters.free_objects += freed.weight.weight_objects;
        counters.free_bytes += freed.weight.weight_bytes;
        counters.free_variance += freed.weight.variance_bytes;
        counters.live_samples = counters.live_samples.saturating_sub(1);
        self.tally.free_events += 1;
        if freed.untold {
            self.tally.recovered_unreported += 1;
        }
    }

    pub(super) fn sweep(&mut self, generation: u32, is_in_map: impl Fn(u64, u64) -> bool) -> u64 {
        let missing: Vec<(u64, LiveAllocation)> = self
            .live
            .extract_if(|&addr, allocation| {
                allocation.generation != generation && !is_in_map(addr, allocation.timestamp_ns)
            })
            .collect();
        for (addr, freed) in &missing {
            self.remember_ghost(*addr, freed, generation);
            self.book_free(freed);
        }
        let found = missing.len() as u64;
        self.tally.swept_frees += found;
        found
    }

    pub(super) fn close(&mut self) -> u64 {
        self.closed = true;
        let purged = self.live.len() as u64;
        self.tally.purged += purged;
        self.live = HashMap::new();
        self.ghosts = HashMap::new();
        purged
    }

    pub(super) const fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn live(&self) -> u64 {
        self.live.len() as u64
    }

    pub(super) fn size(&self) -> Size {
        Size {
            blocks: self.live.len() as u64,
            stacks: self.stacks.len() as u64,
        }
    }

    pub(super) fn has(&self, stack: StackId) -> bool {
        self.stacks.contains_key(&stack)
    }

    /// What live blocks take, with the room that their table has for more.
    pub(super) fn block_bytes(&self) -> u64 {
        let live = self.live.capacity() * (size_of::<(u64, LiveAllocation)>() + 1);
        let ghosts = self.ghosts.capacity() * (size_of::<((u64, u64), u32)>() + 1);
        // A table is full at seven eighths.
        ((live + ghosts) as u64 * 8).div_ceil(7)
    }

    /// Gives back what a table keeps since it held many more blocks.
    pub(super) fn shrink(&mut self) {
        let wanted = self.live.len().max(SMALL) * 2;
        if self.live.capacity() / SPARSE >= wanted {
            self.live.shrink_to(wanted);
        }
        if self.ghosts.capacity() > SMALL && self.ghosts.is_empty() {
            self.ghosts = HashMap::new();
        }
    }

    pub(super) fn live_addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.live.keys().copied()
    }

    pub(super) fn stacks(&self) -> impl Iterator<Item = (StackId, StackCounters)> + '_ {
        self.stacks
            .iter()
            .map(|(&stack, &counters)| (stack, counters))
    }
}
