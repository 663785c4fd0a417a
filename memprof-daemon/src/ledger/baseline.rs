//! The counters of an earlier moment, and what later ones are compared with them.

use std::collections::HashMap;

use super::{Ledger, StackCounters};
use crate::sample::{ImageId, StackId};

/// A copy of all counters. Stacks that have none in it had counted nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Baseline {
    images: HashMap<ImageId, HashMap<StackId, StackCounters>>,
}

impl Baseline {
    /// What a stack had counted.
    #[must_use]
    pub fn get(&self, image: ImageId, stack: StackId) -> Option<&StackCounters> {
        self.images.get(&image)?.get(&stack)
    }
}

impl Ledger {
    /// A copy of the counters as they are now.
    #[must_use]
    pub fn baseline(&self) -> Baseline {
        let images = self.images.iter();
        Baseline {
            images: images
                .map(|(&image, books)| (image, books.stacks().collect()))
                .collect(),
        }
    }
}

impl StackCounters {
    /// What has changed since `before`. What is in use may have become less.
    #[must_use]
    pub fn change_since(&self, before: &Self) -> Self {
        Self {
            alloc_objects: self.alloc_objects - before.alloc_objects,
            alloc_bytes: self.alloc_bytes - before.alloc_bytes,
            free_objects: self.free_objects - before.free_objects,
            free_bytes: self.free_bytes - before.free_bytes,
            alloc_variance: self.alloc_variance - before.alloc_variance,
            free_variance: self.free_variance - before.free_variance,
            samples: self.samples.saturating_sub(before.samples),
            is_change: true,
            ..*self
        }
    }

    /// Whether anything has been booked since `before`.
    #[must_use]
    pub fn has_changed_since(&self, before: &Self) -> bool {
        self.samples != before.samples
            || self.live_samples != before.live_samples
            // As many frees taken back as were booked leave the sums alone, too.
            || self.free_bytes.to_bits() != before.free_bytes.to_bits()
            || self.free_objects.to_bits() != before.free_objects.to_bits()
    }

    /// The counters as if allocations had been counted from `before` on, with the same in
    /// use as ever. What was allocated before and is freed later is nobody's loss: it is
    /// taken from both sides, so that `alloc - free` stays what is live.
    #[must_use]
    pub fn counted_from(&self, before: &Self) -> Self {
        Self {
            alloc_objects: self.alloc_objects - before.alloc_objects,
            alloc_bytes: self.alloc_bytes - before.alloc_bytes,
            free_objects: self.free_objects - before.alloc_objects,
            free_bytes: self.free_bytes - before.alloc_bytes,
            alloc_variance: self.alloc_variance - before.alloc_variance,
            free_variance: self.free_variance - before.alloc_variance,
            samples: self.samples.saturating_sub(before.samples),
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use memprof_common::{function::Function, stack::StackKey};

    use super::*;
    use crate::{
        ledger::StackTrace,
        sample::{AllocKey, AllocSample, FreeSample},
    };

    const IMAGE: ImageId = ImageId { pid: 7, epoch: 0 };
    const STACK: StackId = StackId::first(StackKey { high: 1, low: 1 });

    fn block(addr: u64, size_bytes: u64) -> AllocSample {
        AllocSample {
            key: AllocKey { image: IMAGE, addr },
            timestamp_ns: addr,
            size_bytes,
            sample_interval_bytes: 1,
            stack: STACK,
            function: Function::Malloc,
            restored: false,
        }
    }

    fn free(addr: u64) -> FreeSample {
        FreeSample {
            key: AllocKey { image: IMAGE, addr },
            alloc_timestamp_ns: addr,
        }
    }

    fn now(ledger: &Ledger) -> StackCounters {
        ledger.snapshot(|_| true).images[0].stacks[0].1.counters
    }

    /// Two blocks before the baseline, of which one is freed after it; one after it.
    fn books() -> (StackCounters, StackCounters) {
        let mut ledger = Ledger::new();
        ledger.add_stack(STACK.key, StackTrace::default());
        ledger.alloc(&block(1, 100));
        ledger.alloc(&block(2, 1000));
        let baseline = ledger.baseline();
        let before = *baseline.get(IMAGE, STACK).unwrap();
        assert!(!now(&ledger).has_changed_since(&before));
        ledger.free(&free(2));
        ledger.alloc(&block(3, 30));
        (before, now(&ledger))
    }

    /// Check that a change is the difference of both sides, and below zero where more was
    /// freed than allocated.
    #[test]
    fn change_may_be_negative() {
        let (before, after) = books();
        assert!(after.has_changed_since(&before));
        let change = after.change_since(&before);
        assert_eq!((change.alloc_bytes, change.samples), (30.0, 1));
        assert_eq!(change.inuse_bytes(), -970.0);
        assert_eq!(change.inuse_objects(), 0.0);
    }

    /// Check that what is in use stays right when allocations are counted anew, also when
    /// all of it is freed later.
    #[test]
    fn counted_anew_keeps_what_is_in_use() {
        let (before, after) = books();
        let anew = after.counted_from(&before);
        assert_eq!(
            (anew.alloc_objects, anew.alloc_bytes, anew.samples),
            (1.0, 30.0, 1)
        );
        assert_eq!((anew.inuse_objects(), anew.inuse_bytes()), (2.0, 130.0));
        assert_eq!(anew.inuse_bytes(), after.inuse_bytes());
    }

    /// Check that an image that the baseline does not know has counted nothing in it.
    #[test]
    fn unknown_images_had_nothing() {
        assert_eq!(Baseline::default().get(IMAGE, STACK), None);
    }
}
