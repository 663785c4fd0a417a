//! Medians, and how sure they are.

use serde::{Deserialize, Serialize};

/// A median is stable once its confidence interval is this narrow.
pub(super) const STABLE_SPREAD: f64 = 0.03;

/// Fewer values than this say nothing about their spread.
pub(super) const FEWEST_ROUNDS: usize = 5;

/// The median of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Estimate {
    /// The median.
    pub(super) median: f64,
    /// Half the width of its 95 % confidence interval, as a share of it.
    pub(super) spread: f64,
    /// How many measurements.
    pub(super) rounds: usize,
}

impl Estimate {
    /// Of `values`; nothing of none.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let median = median(values)?;
        let deviations: Vec<f64> = values.iter().map(|value| (value - median).abs()).collect();
        // 1.4826 makes the median absolute deviation a standard deviation where
        // the noise is normal; the standard error of a median is sqrt(pi/2) times
        // that of a mean.
        let deviation = 1.4826 * self::median(&deviations)?;
        let error = (std::f64::consts::PI / 2.0).sqrt() * deviation / (values.len() as f64).sqrt();
        Some(Self {
            median,
            spread: if median == 0.0 {
                0.0
            } else {
                1.96 * error / median.abs()
            },
            rounds: values.len(),
        })
    }

    /// Whether more rounds would hardly move it.
    pub(super) fn is_stable(&self) -> bool {
        self.rounds >= FEWEST_ROUNDS && self.spread < STABLE_SPREAD
    }
}

/// The middle value, or the mean of the two in the middle; nothing of none.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// `above / below`, pair by pair, where both were measured.
pub(super) fn ratios(above: &[Option<f64>], below: &[Option<f64>]) -> Vec<f64> {
    let pairs = above.iter().zip(below);
    pairs
        .filter_map(|pair| match pair {
            (Some(above), Some(below)) if *below > 0.0 => Some(above / below),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a median is the middle value, whatever the order.
    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    /// Check that one wild value moves neither the median nor its spread much.
    #[test]
    fn outliers() {
        let estimate = Estimate::of(&[10.0, 10.1, 9.9, 10.0, 50.0, 10.05]).expect("values");
        assert!((estimate.median - 10.0).abs() < 0.1, "{estimate:?}");
        assert!(estimate.is_stable(), "{estimate:?}");
    }

    /// Check the spread on numbers worked out by hand: median 3, deviations
    /// 0 1 1 2 2 with median 1, so 1.96 * 1.2533 * 1.4826 / sqrt(5) / 3.
    #[test]
    fn spread() {
        let estimate = Estimate::of(&[1.0, 2.0, 3.0, 4.0, 5.0]).expect("values");
        assert!((estimate.spread - 0.5429).abs() < 1e-3, "{estimate:?}");
        assert!(!estimate.is_stable());
    }

    /// Check that few rounds are not called stable, however equal they are.
    #[test]
    fn few_rounds() {
        assert!(!Estimate::of(&[2.0; 4]).expect("values").is_stable());
        assert!(Estimate::of(&[2.0; 5]).expect("values").is_stable());
    }

    /// Check that a round that lacks one of the two gives no ratio.
    #[test]
    fn ratio_of_rounds() {
        let above = [Some(4.0), None, Some(9.0), Some(1.0)];
        let below = [Some(2.0), Some(1.0), Some(3.0), None];
        assert_eq!(ratios(&above, &below), [2.0, 3.0]);
    }
}
