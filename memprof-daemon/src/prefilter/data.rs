//! What the stubs of a target and the daemon tell each other, through memory that both have
//! mapped: gaps to the one side, exact totals to the other.

use std::{fs::File, io, sync::Arc};

use memprof_common::{
    prefilter::{
        HEADER_UNSHARDED, OCCUPANCY_OVERFLOWED, SHARD_BYTES_ASKED, SHARD_CALL_CLASSES, SHARD_CALLS,
        SHARD_FREES,
    },
    totals::{SIZE_CLASSES, TargetTotals},
};

use super::{layout::Geometry, shared::Shared, supply::Supply};

/// The daemon's end of it.
#[derive(Debug)]
pub struct SharedData {
    shared: Arc<Shared>,
    supply: Supply,
}

/// What the stubs could not do, and what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedStats {
    /// Calls that were neither counted nor sampled, since their thread found no shard.
    pub unsharded: u64,
    /// Times that a thread stopped sampling until the next tick, since it found no gap.
    pub starved: u64,
    /// Buckets of the sampled set that have been full: each free of an address that falls
    /// into one is looked up by BPF.
    pub overflowed_buckets: u64,
    /// Blocks in the sampled set.
    pub sampled_blocks: u64,
}

/// Reads the totals, also when the target and [`SharedData`] are gone.
#[derive(Clone, Debug)]
pub struct SharedTotals(Arc<Shared>);

impl SharedData {
    /// Maps the shared part of a target's data: `memfd` from `offset` on, which is of its
    /// full length, and reads as zeros if no daemon has used it before. Seals the file so
    /// that it cannot be made shorter.
    ///
    /// # Errors
    ///
    /// If the file is too short, does not allow seals, or cannot be mapped.
    pub fn new(memfd: &File, offset: u64, geometry: Geometry) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared::new(memfd, offset, geometry)?),
            supply: Supply::new(),
        })
    }

    /// Lets sampling begin, or go on if another daemon has left the target. The random gaps
    /// start at `seed`.
    pub fn start(&mut self, interval_bytes: u64, seed: u64) {
        self.supply.start(&self.shared, interval_bytes, seed);
    }

    /// Supplies the stubs with what they have used. To be called ten times a second.
    pub fn tick(&mut self) {
        self.supply.tick(&self.shared);
    }

    /// Samples with another interval from now on: 1 takes every block, 0 none. BPF is to
    /// have been told before.
    pub fn set_interval(&mut self, interval_bytes: u64) {
        self.supply.set_interval(&self.shared, interval_bytes);
    }

    /// The totals as they stand.
    #[must_use]
    pub fn totals(&self) -> TargetTotals {
        totals(&self.shared)
    }

    /// What reads the totals without the rest.
    #[must_use]
    pub fn reader(&self) -> SharedTotals {
        SharedTotals(Arc::clone(&self.shared))
    }

    /// Counts.
    #[must_use]
    pub fn stats(&self) -> SharedStats {
        let mut stats = SharedStats {
            unsharded: self.unsharded(),
            starved: self.supply.starved(&self.shared),
            ..SharedStats::default()
        };
        for byte in self.shared.occupancy() {
            stats.overflowed_buckets += u64::from(byte & OCCUPANCY_OVERFLOWED != 0);
            stats.sampled_blocks += u64::from(byte & !OCCUPANCY_OVERFLOWED);
        }
        stats
    }

    /// Calls that were neither counted nor sampled: [`SharedStats::unsharded`].
    #[must_use]
    pub fn unsharded(&self) -> u64 {
        self.shared.load(HEADER_UNSHARDED)
    }

    /// Makes the sampled set empty. Not while threads of the target run.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    pub fn clear_sampled_set(&self) -> io::Result<()> {
        self.shared.clear_sampled_set()
    }
}

impl SharedTotals {
    /// The totals as they stand.
    #[must_use]
    pub fn read(&self) -> TargetTotals {
        totals(&self.0)
    }
}

/// The sum over the threads. One thread's number of frees may be below zero; the sum is
/// right.
fn totals(shared: &Shared) -> TargetTotals {
    let mut sum = TargetTotals::default();
    let add = |sum: &mut u64, place| *sum = sum.wrapping_add(shared.load(place));
    for shard in shared.used_shards() {
        add(&mut sum.alloc_bytes, shard + SHARD_BYTES_ASKED);
        add(&mut sum.free_calls, shard + SHARD_FREES);
        for zeros in 0..SHARD_CALL_CLASSES {
            if let Some(calls) = sum.alloc_calls.get_mut(class_of(zeros)) {
                add(calls, shard + SHARD_CALLS + zeros * size_of::<u64>());
            }
        }
    }
    sum
}

/// The class of the sizes with that many leading zeros; the largest sizes share one, as in
/// [`memprof_common::totals::size_class`].
const fn class_of(leading_zeros: usize) -> usize {
    let bits = 64_usize.saturating_sub(leading_zeros);
    if bits < SIZE_CLASSES {
        bits
    } else {
        SIZE_CLASSES - 1
    }
}

#[cfg(test)]
#[path = "data_tests.rs"]
mod tests;
