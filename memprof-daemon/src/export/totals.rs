//! Exact totals of a process: every call counted, sampled or not.

use memprof_common::totals::{SIZE_CLASSES, TargetTotals, size_class_bounds};
use serde::Serialize;

/// What one process image has asked of its allocator while it was traced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExactTotals {
    /// The three sums.
    pub calls: CallTotals,
    /// Allocating calls by size, smallest sizes first; those with calls only.
    pub size_histogram: Vec<SizeClass>,
}

impl ExactTotals {
    /// What has come since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let calls = |class: &SizeClass| {
            let same = |other: &&SizeClass| other.min_bytes == class.min_bytes;
            let before = before.size_histogram.iter().find(same);
            let before = before.map_or(0, |before| before.calls);
            class.calls.saturating_sub(before)
        };
        let classes = self.size_histogram.iter().map(|class| SizeClass {
            calls: calls(class),
            ..*class
        });
        let sub = u64::saturating_sub;
        Self {
            calls: CallTotals {
                alloc_calls: sub(self.calls.alloc_calls, before.calls.alloc_calls),
                alloc_bytes: sub(self.calls.alloc_bytes, before.calls.alloc_bytes),
                free_calls: sub(self.calls.free_calls, before.calls.free_calls),
            },
            size_histogram: classes.filter(|class| class.calls != 0).collect(),
        }
    }
}

/// Sums over all calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CallTotals {
    /// Calls that asked for a block, also those that failed.
    pub alloc_calls: u64,
    /// Bytes asked for by them.
    pub alloc_bytes: u64,
    /// Calls that gave a block up. How many bytes is not known: `free` is told
    /// an address only.
    pub free_calls: u64,
}

/// The calls that asked for sizes from one power of two to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SizeClass {
    /// Smallest size.
    pub min_bytes: u64,
    /// Largest size; none for the last class, which has no end.
    pub max_bytes: Option<u64>,
    /// How many calls.
    pub calls: u64,
}

impl From<&TargetTotals> for ExactTotals {
    fn from(totals: &TargetTotals) -> Self {
        let size_histogram: Vec<SizeClass> = totals
            .alloc_calls
            .iter()
            .enumerate()
            .filter(|&(_, &calls)| calls != 0)
            .map(|(class, &calls)| {
                let (min_bytes, max_bytes) = size_class_bounds(class);
                SizeClass {
                    min_bytes,
                    max_bytes: (class + 1 < SIZE_CLASSES).then_some(max_bytes),
                    calls,
                }
            })
            .collect();
        Self {
            calls: CallTotals {
                alloc_calls: size_histogram.iter().map(|class| class.calls).sum(),
                alloc_bytes: totals.alloc_bytes,
                free_calls: totals.free_calls,
            },
            size_histogram,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that calls are the sum over the classes, that empty classes are left
    /// out, that the last has no end, and that of two readings the difference is told.
    #[test]
    fn histogram() {
        let mut totals = TargetTotals {
            alloc_bytes: 5000,
            free_calls: 3,
            ..TargetTotals::default()
        };
        totals.alloc_calls[0] = 1;
        totals.alloc_calls[5] = 20;
        totals.alloc_calls[SIZE_CLASSES - 1] = 300;
        let exact = ExactTotals::from(&totals);
        assert_eq!(
            exact.calls,
            CallTotals {
                alloc_calls: 321,
                alloc_bytes: 5000,
                free_calls: 3
            }
        );
        let mut later = totals;
        later.alloc_calls[5] += 2;
        later.alloc_bytes += 40;
        let since = ExactTotals::from(&later).since(&exact);
        let calls = since.calls;
        assert_eq!(
            (calls.alloc_calls, calls.alloc_bytes, calls.free_calls),
            (2, 40, 0)
        );
        assert_eq!(since.size_histogram.len(), 1);
        assert_eq!(since.size_histogram[0].calls, 2);
        let classes = exact.size_histogram.iter();
        let classes: Vec<_> = classes
            .map(|class| (class.min_bytes, class.max_bytes, class.calls))
            .collect();
        assert_eq!(
            classes,
            [(0, Some(0), 1), (16, Some(31), 20), (1 << 42, None, 300)]
        );
    }
}
