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
    /// out, and that the last has no end.
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
