//! From sampled blocks to what they stand for.

use crate::{ledger::StackCounters, weight::unbias};

/// The counters of `allocs` sampled blocks of `size_bytes`, of which `frees` are freed.
///
/// It is what `scaleHeapSample` of Go's `runtime/pprof` makes of them: all blocks of a bucket
/// have the same size, so each stands for the same.
pub(crate) fn counters(
    size_bytes: u64,
    allocs: u64,
    frees: u64,
    interval_bytes: u64,
) -> StackCounters {
    let weight = unbias(size_bytes, interval_bytes);
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts far below 2^53 in practice; above, the relative error is 2^-53"
    )]
    let times = |count: u64, weight: f64| count as f64 * weight;
    StackCounters {
        alloc_objects: times(allocs, weight.weight_objects),
        alloc_bytes: times(allocs, weight.weight_bytes),
        free_objects: times(frees, weight.weight_objects),
        free_bytes: times(frees, weight.weight_bytes),
        alloc_variance: times(allocs, weight.variance_bytes),
        free_variance: times(frees, weight.variance_bytes),
        coarsest_interval_bytes: interval_bytes,
        samples: allocs,
        live_samples: allocs.saturating_sub(frees),
        is_change: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check the numbers against those of Go's formula, `1 / (1 - exp(-size / rate))` for each
    /// block, and that at a rate of 1 blocks are counted as they are.
    #[test]
    fn as_go_scales() {
        let counters = counters(4096, 3, 1, 524_288);
        let scale = 1.0 / (1.0 - (-4096.0_f64 / 524_288.0).exp());
        assert!((counters.alloc_objects - 3.0 * scale).abs() < 1e-6);
        assert!((counters.inuse_bytes() - 2.0 * 4096.0 * scale).abs() < 1e-2);
        assert_eq!((counters.samples, counters.live_samples), (3, 2));

        let exact = super::counters(4096, 3, 1, 1);
        assert_eq!((exact.alloc_bytes, exact.free_bytes), (12288.0, 4096.0));
        assert_eq!(exact.alloc_variance, 0.0);
    }
}
