//! The numbers of a stack, rounded: estimates are rounded once, at the very end.

use std::{
    cmp::{Ordering, Reverse},
    sync::Arc,
};

use crate::{
    export::profile::{ProcessProfile, StackProfile},
    interval::{Interval, interval_95},
    ledger::snapshot::StackCounters,
    symbolize::frame::Frame,
};

/// What a value of a profile counts; the names are pprof's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum ValueType {
    /// Allocations.
    AllocObjects,
    /// Bytes allocated.
    AllocSpace,
    /// Blocks allocated and not freed.
    InuseObjects,
    /// Bytes allocated and not freed.
    InuseSpace,
}

impl ValueType {
    /// All four, in Go's order.
    pub const ALL: [Self; 4] = [
        Self::AllocObjects,
        Self::AllocSpace,
        Self::InuseObjects,
        Self::InuseSpace,
    ];

    /// pprof's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllocObjects => "alloc_objects",
            Self::AllocSpace => "alloc_space",
            Self::InuseObjects => "inuse_objects",
            Self::InuseSpace => "inuse_space",
        }
    }

    /// pprof's name for its unit.
    #[must_use]
    pub const fn unit(self) -> &'static str {
        match self {
            Self::AllocObjects | Self::InuseObjects => "count",
            Self::AllocSpace | Self::InuseSpace => "bytes",
        }
    }
}

/// Rounded numbers of a stack, or of several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) alloc_objects: u64,
    pub(crate) alloc_bytes: u64,
    /// Below zero only in the profile of a window.
    pub(crate) inuse_objects: i64,
    /// The same.
    pub(crate) inuse_bytes: i64,
    /// 95% confidence interval of `alloc_bytes`, its ends rounded outward.
    pub(crate) alloc_bytes_ci95: [u64; 2],
    /// The same of `inuse_bytes`.
    pub(crate) inuse_bytes_ci95: [i64; 2],
    pub(crate) samples: u64,
    /// Of `samples`: those not freed.
    pub(crate) live_samples: u64,
}

impl Numbers {
    /// One stack's.
    pub(crate) fn of(counters: &StackCounters) -> Self {
        Self::total([counters])
    }

    /// The sum of several stacks', which is not the sum of their rounded ones.
    pub(crate) fn total<'a>(all: impl IntoIterator<Item = &'a StackCounters>) -> Self {
        Self::total_at(0, all)
    }

    /// All stacks of a process: also of those that it has without a sample yet,
    /// at an interval of at most `sample_interval_bytes`.
    pub(crate) fn of_process(process: &ProcessProfile, sample_interval_bytes: u64) -> Self {
        let stacks = process.stacks.iter().map(|stack| &stack.counters);
        Self::total_at(sample_interval_bytes, stacks)
    }

    fn total_at<'a>(
        sample_interval_bytes: u64,
        all: impl IntoIterator<Item = &'a StackCounters>,
    ) -> Self {
        let (mut alloc_objects, mut inuse_objects) = (0.0, 0.0);
        let (mut alloc_bytes, mut inuse_bytes) = (0.0, 0.0);
        let (mut alloc_variance, mut inuse_variance) = (0.0, 0.0);
        let (mut free_bytes, mut free_variance) = (0.0, 0.0);
        let mut is_change = false;
        let mut coarsest = sample_interval_bytes;
        let (mut samples, mut live_samples) = (0_u64, 0_u64);
        for counters in all {
            alloc_objects += counters.alloc_objects;
            alloc_bytes += counters.alloc_bytes;
            alloc_variance += counters.alloc_variance;
            inuse_objects += counters.inuse_objects();
            inuse_bytes += counters.inuse_bytes();
            inuse_variance += counters.inuse_variance();
            free_bytes += counters.free_bytes;
            free_variance += counters.free_variance;
            is_change |= counters.is_change;
            coarsest = coarsest.max(counters.coarsest_interval_bytes);
            samples = samples.saturating_add(counters.samples);
            live_samples = live_samples.saturating_add(counters.live_samples);
        }
        let allocated = interval_95(alloc_bytes, alloc_variance, coarsest);
        let inuse = if is_change {
            change_95(
                allocated,
                interval_95(free_bytes, free_variance, coarsest),
                inuse_bytes,
            )
        } else {
            interval_95(inuse_bytes, inuse_variance, coarsest)
        };
        Self {
            alloc_objects: round(alloc_objects).unsigned_abs(),
            alloc_bytes: round(alloc_bytes).unsigned_abs(),
            inuse_objects: round(inuse_objects),
            inuse_bytes: round(inuse_bytes),
            alloc_bytes_ci95: outward(allocated).map(i64::unsigned_abs),
            inuse_bytes_ci95: outward(inuse),
            samples,
            live_samples,
        }
    }

    /// One of the four.
    pub(crate) fn value(&self, value_type: ValueType) -> i64 {
        let signed = |number| i64::try_from(number).unwrap_or(i64::MAX);
        match value_type {
            ValueType::AllocObjects => signed(self.alloc_objects),
            ValueType::AllocSpace => signed(self.alloc_bytes),
            ValueType::InuseObjects => self.inuse_objects,
            ValueType::InuseSpace => self.inuse_bytes,
        }
    }

    /// All four are 0.
    pub(crate) fn is_zero(&self) -> bool {
        ValueType::ALL.iter().all(|&value| self.value(value) == 0)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the cast saturates, and makes 0 of what is no number"
)]
fn round(estimate: f64) -> i64 {
    estimate.round() as i64
}

/// The interval of what is in use more, or less, than before: from the two of what was
/// allocated and freed meanwhile. It is wider than it would have to be: blocks that were both
/// are in both, and cancel out.
fn change_95(allocated: Interval, freed: Interval, change: f64) -> Interval {
    Interval {
        low: (allocated.low - freed.high).min(change),
        high: (allocated.high - freed.low).max(change),
    }
}

/// The ends of an interval as whole numbers that still hold it.
fn outward(interval: Interval) -> [i64; 2] {
    [round(interval.low.floor()), round(interval.high.ceil())]
}

/// A process's stacks with their numbers: most bytes in use first, then most
/// bytes allocated, then by where they are, so that the order is always the
/// same.
pub(crate) fn by_inuse(process: &ProcessProfile) -> Vec<(&StackProfile, Numbers)> {
    sorted(process, |numbers| {
        (numbers.inuse_bytes, numbers.value(ValueType::AllocSpace))
    })
}

/// The same with most bytes allocated first.
pub(crate) fn by_alloc(process: &ProcessProfile) -> Vec<(&StackProfile, Numbers)> {
    sorted(process, |numbers| {
        (numbers.value(ValueType::AllocSpace), numbers.inuse_bytes)
    })
}

fn sorted(
    process: &ProcessProfile,
    bytes: impl Fn(&Numbers) -> (i64, i64),
) -> Vec<(&StackProfile, Numbers)> {
    let mut stacks: Vec<_> = process
        .stacks
        .iter()
        .map(|stack| (stack, Numbers::of(&stack.counters)))
        .collect();
    stacks.sort_by(|(left_stack, left), (right_stack, right)| {
        Reverse(bytes(left))
            .cmp(&Reverse(bytes(right)))
            .then_with(|| right.alloc_objects.cmp(&left.alloc_objects))
            .then_with(|| by_place(&left_stack.frames, &right_stack.frames))
    });
    stacks
}

/// Compares stacks by where their calls are, leaf first.
fn by_place(left: &[Arc<Frame>], right: &[Arc<Frame>]) -> Ordering {
    let place = |frame: &Frame| (frame.file_offset, frame.address);
    left.iter()
        .zip(right)
        // Most frames of two stacks are the same ones.
        .filter(|(left, right)| !Arc::ptr_eq(left, right))
        .map(|(left, right)| place(left).cmp(&place(right)))
        .find(|order| order.is_ne())
        .unwrap_or_else(|| left.len().cmp(&right.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a total is rounded once: three stacks of 0.4 make 1, and what
    /// is no number makes nothing.
    #[test]
    fn rounds_once() {
        let counters = StackCounters {
            alloc_objects: 0.4,
            alloc_bytes: f64::NAN,
            samples: 1,
            ..StackCounters::default()
        };
        assert_eq!(Numbers::of(&counters).alloc_objects, 0);
        let total = Numbers::total([&counters; 3]);
        assert_eq!(
            (total.alloc_objects, total.alloc_bytes, total.samples),
            (1, 0, 3)
        );
    }

    /// Check that intervals hold the rounded estimate, that those of a total are
    /// narrower than the sum of its parts, and that a process without samples may
    /// have allocated something.
    #[test]
    fn intervals() {
        let counters = StackCounters {
            alloc_bytes: 70_000.6,
            alloc_variance: 70_000.0 * 65_536.0,
            coarsest_interval_bytes: 65_536,
            samples: 1,
            ..StackCounters::default()
        };
        let one = Numbers::of(&counters);
        let [low, high] = one.alloc_bytes_ci95;
        assert!(0 < low && low < one.alloc_bytes && one.alloc_bytes < high);
        assert_eq!(one.inuse_bytes_ci95, [0, 251_754]);
        let [low_of_many, high_of_many] = Numbers::total([&counters; 100]).alloc_bytes_ci95;
        assert!(high_of_many - low_of_many < 20 * (high - low));

        let mut process = crate::export::testing::empty_profile().processes.remove(0);
        process.stacks.clear();
        let nothing = Numbers::of_process(&process, 65_536);
        assert_eq!(nothing.alloc_bytes_ci95, [0, 251_754]);
        assert_eq!(Numbers::of_process(&process, 1).alloc_bytes_ci95, [0, 0]);
    }

    /// Check that a change may be below zero, and that its interval holds it, also where
    /// all is counted.
    #[test]
    fn changes() {
        let exact = StackCounters {
            alloc_bytes: 10.0,
            free_bytes: 30.0,
            alloc_objects: 1.0,
            free_objects: 3.0,
            coarsest_interval_bytes: 1,
            samples: 1,
            is_change: true,
            ..StackCounters::default()
        };
        let numbers = Numbers::of(&exact);
        assert_eq!((numbers.inuse_objects, numbers.inuse_bytes), (-2, -20));
        assert_eq!(numbers.inuse_bytes_ci95, [-20, -20]);
        assert_eq!(numbers.value(ValueType::InuseSpace), -20);
        let sampled = StackCounters {
            coarsest_interval_bytes: 65_536,
            ..exact
        };
        let [low, high] = Numbers::of(&sampled).inuse_bytes_ci95;
        assert!(low < -20 && -20 < high, "{low} {high}");
    }

    /// Check that stacks are in the same order whatever order they came in.
    #[test]
    fn order_is_deterministic() {
        let mut process = crate::export::testing::profile().processes.remove(0);
        let order = |process: &ProcessProfile| -> Vec<_> {
            let stacks = by_inuse(process).into_iter().chain(by_alloc(process));
            stacks
                .map(|(stack, numbers)| (stack.frames[0].address, numbers))
                .collect()
        };
        let expected = order(&process);
        for _ in 0..process.stacks.len() {
            process.stacks.rotate_left(1);
            assert_eq!(order(&process), expected);
        }
        let inuse: Vec<_> = by_inuse(&process)
            .iter()
            .map(|(_, numbers)| numbers.inuse_bytes)
            .collect();
        assert!(inuse.is_sorted_by(|left, right| left >= right), "{inuse:?}");
    }
}
