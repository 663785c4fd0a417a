//! How far an estimate may be from the truth.

/// The 97.5% quantile of the normal distribution: 95 of 100 outcomes are within
/// so many standard deviations.
const Z: f64 = 1.959_964;

/// A range that holds the true value in 95 of 100 cases.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Interval {
    /// Its lower end; never below 0, nor above the estimate.
    pub low: f64,
    /// Its upper end; never below the estimate.
    pub high: f64,
}

/// The 95% confidence interval of a sum of weights.
///
/// `variance` is the unbiased estimate of the sum's variance, which is the sum of
/// [`crate::weight::Weight::variance_bytes`], and `sample_interval_bytes` the
/// largest interval that any of the samples was taken at.
///
/// It is a score interval: the true value T is in it if the estimate y is within
/// Z of the standard deviations that there would be *if T were true*. For
/// each byte more than was estimated, the variance is larger by R at most, since
/// Var / S = S (1 - P) / P <= R: so those T with (y - T)^2 <= Z^2 (v + R (T - y)),
///
/// ```text
/// y + R Z^2 / 2  +-  Z sqrt(v + R^2 Z^2 / 4)
/// ```
///
/// R, and not the mean of S (1 - P) / P over the samples, since what has not been
/// sampled is small: a stack of few samples, all large, may well have allocated
/// small blocks too. At an interval of 1 nothing is missed, and the interval is
/// the estimate. `docs/sampling.md` has the derivation and what it covers.
#[must_use]
pub fn interval_95(estimate: f64, variance: f64, sample_interval_bytes: u64) -> Interval {
    #[expect(clippy::cast_precision_loss, reason = "below 2^32")]
    let gap = if sample_interval_bytes <= 1 {
        0.0
    } else {
        sample_interval_bytes as f64
    };
    let shift = gap * Z * Z / 2.0;
    let half_width = Z * (variance.max(0.0) + gap * gap * Z * Z / 4.0).sqrt();
    Interval {
        low: (estimate + shift - half_width).clamp(0.0, estimate.max(0.0)),
        high: (estimate + shift + half_width).max(estimate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::unbias;

    /// Check that what is counted exactly is certain.
    #[test]
    fn exact_at_interval_one() {
        let interval = interval_95(4096.0, 0.0, 1);
        assert_eq!((interval.low, interval.high), (4096.0, 4096.0));
    }

    /// Check the known ends for small blocks: n samples of weight R are a Poisson
    /// count, for which the score interval is n + Z^2/2 +- Z sqrt(n + Z^2/4), and
    /// none leaves room for Z^2 R.
    #[test]
    fn poisson_limit() {
        for (samples, low, high) in [(0.0, 0.0, 3.841), (1.0, 0.177, 5.665), (10.0, 5.432, 18.41)] {
            let gap = 65_536.0;
            let interval = interval_95(samples * gap, samples * gap * gap, 65_536);
            assert!((interval.low / gap - low).abs() < 1e-2, "{interval:?}");
            assert!((interval.high / gap - high).abs() < 1e-2, "{interval:?}");
        }
    }

    /// Check that large blocks, which are always sampled, are in the lower end in
    /// full, and that ends are in order for any mixture.
    #[test]
    fn certain_bytes_are_below() {
        let certain = 1_u64 << 30;
        for small in 0..20_u64 {
            let (mut estimate, mut variance) = (0.0, 0.0);
            let sizes = (0..small).map(|n| 1 << n).chain([certain]);
            for weight in sizes.map(|size| unbias(size, 65_536)) {
                estimate += weight.weight_bytes;
                variance += weight.variance_bytes;
            }
            let Interval { low, high } = interval_95(estimate, variance, 65_536);
            assert!(low >= certain as f64 - 1.0, "{low}");
            assert!(low <= estimate && estimate <= high);
        }
    }
}
