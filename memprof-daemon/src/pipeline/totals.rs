//! The arithmetic of exact totals: what is one image's of what BPF has counted
//! in a place that several images have used, one after the other.

use memprof_common::totals::TargetTotals;

use crate::export::totals::ExactTotals;

/// Readings of the place that an image's calls are counted in.
///
/// BPF counts in two places a target, taken in turn by its images. Nothing is
/// ever set back, so an image's totals are a difference: what stands there at its
/// end, less what stood there when it began. Nobody counts there while the images
/// before and after it run, so both can be read with delay: until two images
/// later has begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct ImageTotals {
    /// What stood there when the image began; none if that was read too late.
    base: Option<TargetTotals>,
    /// The last reading; none if it was made too late, or never.
    last: Option<TargetTotals>,
    /// What stubs in the image have counted. Each call is counted there or in BPF.
    stubs: TargetTotals,
}

impl ImageTotals {
    pub(super) const fn new(base: Option<TargetTotals>) -> Self {
        Self {
            base,
            last: None,
            stubs: TargetTotals {
                alloc_bytes: 0,
                free_calls: 0,
                alloc_calls: [0; _],
                reserved: [0; _],
            },
        }
    }

    pub(super) const fn set_stubs(&mut self, stubs: TargetTotals) {
        self.stubs = stubs;
    }

    pub(super) const fn set_base(&mut self, base: Option<TargetTotals>) {
        self.base = base;
    }

    pub(super) const fn set_last(&mut self, last: Option<TargetTotals>) {
        self.last = last;
    }

    /// The image's own; none if they are not known.
    pub(super) fn exact(&self) -> Option<ExactTotals> {
        let (base, last) = (self.base?, self.last?);
        let probed = combined(last, &base, u64::wrapping_sub);
        let all = combined(probed, &self.stubs, u64::wrapping_add);
        Some(ExactTotals::from(&all))
    }
}

/// The sum over the CPUs. One CPU's number of frees may be below zero: a failed
/// `realloc` takes its free back on the CPU where it ends. The sum is right.
pub(super) fn sum<'a>(cpus: impl IntoIterator<Item = &'a TargetTotals>) -> TargetTotals {
    cpus.into_iter().fold(TargetTotals::default(), |sum, cpu| {
        combined(sum, cpu, u64::wrapping_add)
    })
}

fn combined(
    mut left: TargetTotals,
    right: &TargetTotals,
    operation: fn(u64, u64) -> u64,
) -> TargetTotals {
    left.alloc_bytes = operation(left.alloc_bytes, right.alloc_bytes);
    left.free_calls = operation(left.free_calls, right.free_calls);
    for (left, right) in left.alloc_calls.iter_mut().zip(right.alloc_calls) {
        *left = operation(*left, right);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(alloc_bytes: u64, free_calls: u64, small_calls: u64) -> TargetTotals {
        let mut totals = TargetTotals {
            alloc_bytes,
            free_calls,
            ..TargetTotals::default()
        };
        totals.alloc_calls[3] = small_calls;
        totals
    }

    /// Check that a free taken back on another CPU leaves the right sum.
    #[test]
    fn one_cpu_may_be_below_zero() {
        let sum = sum(&[totals(10, 5, 1), totals(20, u64::MAX, 2)]);
        assert_eq!(sum, totals(30, 4, 3));
    }

    /// Check that an image's totals are what was added since it began, and that
    /// without either reading there are none.
    #[test]
    fn difference_of_two_readings() {
        let mut image = ImageTotals::new(Some(totals(100, 7, 10)));
        assert_eq!(image.exact(), None);
        image.set_last(Some(totals(160, 9, 14)));
        let exact = image.exact().unwrap().calls;
        assert_eq!(
            (exact.alloc_bytes, exact.free_calls, exact.alloc_calls),
            (60, 2, 4)
        );
        image.set_base(None);
        assert_eq!(image.exact(), None);
    }
}
