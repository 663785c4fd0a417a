//! An immutable copy of the ledger's counters.

use std::sync::Arc;

use memprof_common::unwind::walk::StackEnd;

use crate::{
    address::FrameAddress,
    sample::{ImageId, StackId},
};

/// Per-stack counters: estimates of the true values. In-use is derived, never
/// stored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StackCounters {
    /// Allocations.
    pub alloc_objects: f64,
    /// Bytes allocated.
    pub alloc_bytes: f64,
    /// Blocks freed.
    pub free_objects: f64,
    /// Bytes freed.
    pub free_bytes: f64,
    /// Estimated variance of `alloc_bytes`, in square bytes.
    pub alloc_variance: f64,
    /// The part of it that was freed.
    pub free_variance: f64,
    /// The largest interval that a sample was taken at.
    pub coarsest_interval_bytes: u64,
    /// How many samples the estimates rest on.
    pub samples: u64,
    /// How many of them are not freed: with none, in-use is nothing, exactly.
    pub live_samples: u64,
    /// The difference of two readings: what is in use may have become less.
    pub is_change: bool,
}

impl StackCounters {
    /// Blocks allocated and not freed.
    #[must_use]
    pub fn inuse_objects(&self) -> f64 {
        self.derive(self.alloc_objects, self.free_objects)
    }

    /// Bytes allocated and not freed.
    #[must_use]
    pub fn inuse_bytes(&self) -> f64 {
        self.derive(self.alloc_bytes, self.free_bytes)
    }

    /// Variance of [`Self::inuse_bytes`], in square bytes.
    #[must_use]
    pub fn inuse_variance(&self) -> f64 {
        self.derive(self.alloc_variance, self.free_variance)
    }

    /// The difference, without what rounding leaves of nothing.
    fn derive(&self, allocated: f64, freed: f64) -> f64 {
        if self.is_change {
            allocated - freed
        } else if self.live_samples == 0 {
            0.0
        } else {
            (allocated - freed).max(0.0)
        }
    }
}

impl std::ops::AddAssign for StackCounters {
    fn add_assign(&mut self, other: Self) {
        self.alloc_objects += other.alloc_objects;
        self.alloc_bytes += other.alloc_bytes;
        self.free_objects += other.free_objects;
        self.free_bytes += other.free_bytes;
        self.alloc_variance += other.alloc_variance;
        self.free_variance += other.free_variance;
        self.coarsest_interval_bytes = self
            .coarsest_interval_bytes
            .max(other.coarsest_interval_bytes);
        self.samples += other.samples;
        self.live_samples += other.live_samples;
        self.is_change |= other.is_change;
    }
}

/// A stack of return addresses, leaf first: the function that called the
/// allocator, then its callers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StackTrace {
    /// Empty if none could be captured.
    pub frames: Vec<FrameAddress>,
    /// Why there are no more.
    pub end: StackEnd,
    /// Some were found by frame pointers.
    pub by_frame_pointer: bool,
}

impl Default for StackTrace {
    fn default() -> Self {
        Self {
            frames: Vec::new(),
            end: StackEnd::Unreadable,
            by_frame_pointer: false,
        }
    }
}

/// One stack of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct StackSnapshot {
    /// Which stack.
    pub trace: Arc<StackTrace>,
    /// Its counters.
    pub counters: StackCounters,
}

/// One process image.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageSnapshot {
    /// Which.
    pub image: ImageId,
    /// Its stacks, in no order.
    pub stacks: Vec<(StackId, StackSnapshot)>,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// One entry a process image that has samples.
    pub images: Vec<ImageSnapshot>,
}
