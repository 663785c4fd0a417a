use super::*;

/// How far a mean may be from what it estimates. Seeds are fixed.
const SIGMAS: f64 = 5.0;
const DRAWS: u32 = 400_000;

/// The chance that a block of so many bytes reaches a gap, as weights have it.
fn probability(size: f64, interval: f64) -> f64 {
    -(-size / interval).exp_m1()
}

fn gaps(seed: u64, interval: u64) -> impl Iterator<Item = u64> {
    let mut gaps = Gaps::new(seed);
    (0..DRAWS).map(move |_| {
        let gap = gaps.draw(interval);
        assert_eq!(gap.interval_bytes, interval);
        assert!(gap.bytes >= 1);
        gap.bytes
    })
}

/// Check mean and variance against those of an exponential distribution that is rounded up,
/// which is a geometric one. The variance of a sample variance is (kurtosis - 1) / n of its
/// square, and the kurtosis is 9 and less than 11 here.
#[test]
fn moments() {
    for (seed, interval) in [2, 8, 100, 4096, 524_288, MAX_SAMPLE_INTERVAL_BYTES]
        .into_iter()
        .enumerate()
    {
        let n = f64::from(DRAWS);
        let (mut sum, mut squares) = (0.0, 0.0);
        for gap in gaps(seed as u64, interval) {
            sum += gap as f64;
            squares += (gap as f64).powi(2);
        }
        let mean = sum / n;
        let variance = squares / n - mean * mean;
        let p = probability(1.0, interval as f64);
        let (want, want_variance) = (1.0 / p, (1.0 - p) / (p * p));
        let sigmas = (mean - want) / (want_variance / n).sqrt();
        assert!(sigmas.abs() < SIGMAS, "{interval}: mean {mean}, {sigmas}");
        let sigmas = (variance / want_variance - 1.0) / (10.0 / n).sqrt();
        assert!(
            sigmas.abs() < SIGMAS,
            "{interval}: variance {variance}, {sigmas}"
        );
    }
}

/// Check that blocks from one byte to ten intervals reach a gap as often as a weight of
/// their size assumes.
#[test]
fn blocks_reach_gaps() {
    for (seed, interval) in [64, 4096, 524_288].into_iter().enumerate() {
        let mut reached = [0_u32; 5];
        let sizes = [1, 8, 100, interval, 10 * interval];
        for gap in gaps(50 + seed as u64, interval) {
            for (reached, size) in reached.iter_mut().zip(sizes) {
                *reached += u32::from(gap <= size);
            }
        }
        for (reached, size) in reached.into_iter().zip(sizes) {
            let p = probability(size as f64, interval as f64);
            let (n, got) = (f64::from(DRAWS), f64::from(reached));
            // Of events so rare that none is likely, a few are no surprise.
            let sigma = (n * p * (1.0 - p)).sqrt().max(1.0);
            assert!(
                (got - n * p).abs() <= SIGMAS * sigma,
                "{size} of {interval}: {got}, expected {} +- {sigma}",
                n * p
            );
        }
    }
}

/// Check the whole distribution: counts in 100 bins against chi-square with 99 degrees of
/// freedom, whose deviation is sqrt(198).
#[test]
fn distribution() {
    const BINS: usize = 100;
    for (seed, interval) in [4096, 524_288].into_iter().enumerate() {
        let scale = interval as f64;
        // The largest gap of each bin.
        let ends: Vec<u64> = (1..=BINS)
            .map(|bin| (-scale * (1.0 - bin as f64 / BINS as f64).ln()).min(1e18) as u64)
            .collect();
        let mut counts = [0_u32; BINS];
        for gap in gaps(70 + seed as u64, interval) {
            counts[ends.partition_point(|&end| end < gap).min(BINS - 1)] += 1;
        }
        let mut chi_square = 0.0;
        let mut below = 0.0;
        for (&count, &end) in counts.iter().zip(&ends) {
            let up_to = probability(end as f64, scale);
            let expected = (up_to - below) * f64::from(DRAWS);
            chi_square += (f64::from(count) - expected).powi(2) / expected;
            below = up_to;
        }
        let sigmas = (chi_square - 99.0) / 198_f64.sqrt();
        assert!(sigmas.abs() < SIGMAS, "{interval}: {chi_square}");
    }
}

/// Check that a gap does not depend on the one before it, nor on the one that another
/// target gets at the same place. The coefficient of n pairs deviates by 1 / sqrt(n).
#[test]
fn independent() {
    let shifted: Vec<u64> = gaps(7, 4096).collect();
    let others: Vec<u64> = gaps(8, 4096).collect();
    let pairs = [
        (
            "next",
            shifted
                .windows(2)
                .map(|pair| (pair[0], pair[1]))
                .collect::<Vec<_>>(),
        ),
        ("other", shifted.iter().copied().zip(others).collect()),
    ];
    for (name, pairs) in pairs {
        let n = pairs.len() as f64;
        let mean = 4096.5;
        let sum: f64 = pairs
            .iter()
            .map(|&(a, b)| (a as f64 - mean) * (b as f64 - mean))
            .sum();
        let coefficient = sum / n / 4096_f64.powi(2);
        assert!(
            coefficient.abs() < SIGMAS / n.sqrt(),
            "{name}: {coefficient}"
        );
    }
}

/// Check that intervals without a gap, and those that are too long, are given one that is
/// defined, and that the longest gap is far from what a countdown means otherwise.
#[test]
fn ends_of_the_scale() {
    let mut gaps = Gaps::new(u64::MAX);
    assert_eq!(gaps.draw(0).interval_bytes, 2);
    assert_eq!(gaps.draw(1).interval_bytes, 2);
    assert_eq!(
        gaps.draw(u64::MAX).interval_bytes,
        MAX_SAMPLE_INTERVAL_BYTES
    );
    let longest = 53.0 * 2_f64.ln() * MAX_SAMPLE_INTERVAL_BYTES as f64;
    assert!(longest < memprof_common::prefilter::ASLEEP_LIMIT as f64);
}
