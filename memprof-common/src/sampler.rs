//! The sampling decision, in integers.
//!
//! memprof samples a Poisson process over bytes with mean gap R: the chance that
//! an allocation of S bytes holds at least one sample point is
//!
//! ```text
//! P(S) = 1 - exp(-S / R)
//! ```
//!
//! A byte stream with gaps drawn from an exponential distribution has no
//! memory, so nothing need be kept between calls: draw a fresh gap G at each
//! entry and sample if S reaches it. By inversion G = -R ln(1 - U) with U
//! uniform on [0, 1), and `G <= S` is the same event as `U <= P(S)`. The second
//! form needs no logarithm and can stop early, because `P(S) <= S / R`: when
//! `U > S / R` the answer is no, which one multiplication tells for nearly all
//! calls. Only the rest (a share of S / R) pays for more random bits and for P.
//!
//! U has 64 bits: the first 32 decide early, the others are drawn on demand.
//! The daemon weighs a sample with 1 / P(S) in floating point; the two agree to
//! better than one part in a billion (tested below).

use core::hint::black_box;

use crate::limits::MAX_SAMPLE_INTERVAL_BYTES;

/// Decides whether an allocation of `size_bytes` is sampled.
///
/// `draw` returns 32 uniformly random bits and is called once, or twice where
/// the first bits leave the answer open. An allocation of 0 bytes is sampled
/// like one of 1 byte, so that it is counted at all.
#[inline(always)]
pub fn should_sample(
    size_bytes: u64,
    sample_interval_bytes: u64,
    mut draw: impl FnMut() -> u32,
) -> bool {
    if sample_interval_bytes <= 1 {
        return sample_interval_bytes == 1;
    }
    let interval = if sample_interval_bytes > MAX_SAMPLE_INTERVAL_BYTES {
        MAX_SAMPLE_INTERVAL_BYTES
    } else {
        sample_interval_bytes
    };
    let size = if size_bytes == 0 { 1 } else { size_bytes };
    let first = draw() as u64;
    // U >= first / 2^32, so `first * R > S * 2^32` means U > S / R >= P(S).
    // Neither side overflows: first and R are below 2^32, and so is S where it
    // is shifted.
    if size <= u32::MAX as u64 && first * interval > size << 32 {
        return false;
    }
    let uniform = first << 32 | draw() as u64;
    uniform <= probability(size, interval)
}

/// `1 - exp(-size / interval)` in units of 2^-64, rounded down; saturates at
/// 2^64 - 1. `interval` must be at least 1 and fit 32 bits.
#[inline(always)]
fn probability(size: u64, interval: u64) -> u64 {
    let whole = size / interval;
    // exp(-45) < 2^-64.
    if whole >= 45 {
        return u64::MAX;
    }
    // The fraction of size / interval in units of 2^-64, by long division.
    let rest = size % interval;
    let high = (rest << 32) / interval;
    let rest = (rest << 32) % interval;
    let low = (rest << 32) / interval;
    let fraction = high << 32 | low;

    // 1 - exp(-x) = x (1 - x/2 (1 - x/3 (1 - ...))) for x in [0, 1). After 20
    // terms the rest is below 1/21! < 2^-65.
    let mut sum = u64::MAX;
    // The compiler must not know the divisor: it would turn the division into a
    // 128-bit multiplication, which BPF lacks. The verifier follows it through.
    let mut term = black_box(20_u64);
    while term > 1 {
        sum = u64::MAX - multiply_high(fraction / term, sum);
        term -= 1;
    }
    let below_one = multiply_high(fraction, sum);

    // exp(-whole - x) = exp(-1)^whole (1 - below_one).
    let mut survivors = u64::MAX - below_one;
    let mut step = 0;
    while step < 45 {
        if step >= whole {
            break;
        }
        survivors = multiply_high(survivors, EXP_MINUS_ONE);
        step += 1;
    }
    if whole == 0 {
        below_one
    } else {
        u64::MAX - survivors
    }
}

/// exp(-1) in units of 2^-64.
const EXP_MINUS_ONE: u64 = 0x5e2d_58d8_b3bc_df1a;

/// The upper 64 bits of the product; BPF has no 128-bit multiplication.
#[inline(always)]
fn multiply_high(a: u64, b: u64) -> u64 {
    let (a_high, a_low) = (a >> 32, a & 0xffff_ffff);
    let (b_high, b_low) = (b >> 32, b & 0xffff_ffff);
    let low = a_low * b_low;
    // Opaque, or the compiler recognizes what this is and calls the 128-bit
    // multiplication after all.
    let middle = black_box(a_high * b_low + (low >> 32));
    let other = a_low * b_high + (middle & 0xffff_ffff);
    a_high * b_high + (middle >> 32) + (other >> 32)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    /// Xorshift64*: small, seeded, and independent of the code under test.
    struct Random(u64);

    impl Random {
        fn draw(&mut self) -> u32 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
        }
    }

    fn exact(size: u64, interval: u64) -> f64 {
        -(-(size as f64) / interval as f64).exp_m1()
    }

    /// Check that the product's upper half is right against 128-bit arithmetic.
    #[test]
    fn multiply_high_is_exact() {
        let mut random = Random(0x5eed);
        for _ in 0..100_000 {
            let a = u64::from(random.draw()) << 32 | u64::from(random.draw());
            let b = u64::from(random.draw()) << 32 | u64::from(random.draw());
            assert_eq!(
                multiply_high(a, b),
                ((u128::from(a) * u128::from(b)) >> 64) as u64
            );
        }
        assert_eq!(multiply_high(u64::MAX, u64::MAX), u64::MAX - 1);
    }

    /// Check that the integer probability is 1 - exp(-S/R) to a billionth,
    /// from one byte at the largest interval to sizes far above it.
    #[test]
    fn probability_matches_floating_point() {
        for interval in [
            2,
            3,
            100,
            4096,
            65_536,
            524_288,
            1 << 30,
            u64::from(u32::MAX),
        ] {
            for size in [
                1,
                2,
                16,
                100,
                4096,
                65_536,
                524_288,
                1 << 25,
                1 << 33,
                1 << 40,
            ] {
                let got = probability(size, interval) as f64 / 2_f64.powi(64);
                let want = exact(size, interval);
                assert!(
                    ((got - want) / want).abs() < 1e-9,
                    "size {size}, interval {interval}: {got} is not {want}"
                );
            }
        }
    }

    /// Check that the early no never contradicts the exact decision: replay the
    /// same bits through both.
    #[test]
    fn early_exit_agrees_with_the_full_decision() {
        let mut random = Random(0xabcdef);
        for round in 0..2_000_000_u64 {
            let size = 1 + (u64::from(random.draw()) >> (round % 32));
            let interval = 2 + (u64::from(random.draw()) >> (round % 29));
            let bits = [random.draw(), random.draw()];
            let mut next = bits.into_iter();
            let got = should_sample(size, interval, || next.next().unwrap());
            let uniform = u64::from(bits[0]) << 32 | u64::from(bits[1]);
            assert_eq!(got, uniform <= probability(size, interval));
        }
    }

    /// Check that the share of sampled calls is P(S) within 5 sigmas, seed
    /// fixed, over sizes far below, near and far above the interval.
    #[test]
    fn sampled_share_is_unbiased() {
        let mut random = Random(20_261_123);
        const CALLS: u32 = 400_000;
        for (size, interval) in [
            (1, 64),
            (16, 4096),
            (300, 4096),
            (4096, 4096),
            (20_000, 4096),
        ] {
            let sampled = (0..CALLS)
                .filter(|_| should_sample(size, interval, || random.draw()))
                .count() as f64;
            let p = exact(size, interval);
            let n = f64::from(CALLS);
            let sigma = (n * p * (1.0 - p)).sqrt();
            assert!(
                (sampled - n * p).abs() <= 5.0 * sigma,
                "size {size}: {sampled} of {n}, expected {} +- {sigma}",
                n * p
            );
        }
    }

    /// Check the ends: interval 0 takes none, 1 takes all, and size 0 is
    /// sampled like size 1.
    #[test]
    fn ends_of_the_scale() {
        assert!(!should_sample(1 << 40, 0, || 0));
        assert!(should_sample(0, 1, || u32::MAX));
        assert!(should_sample(0, 4096, || 0));
        assert!(!should_sample(0, 4096, || u32::MAX));
        assert!(should_sample(u64::MAX, 4096, || u32::MAX));
        assert!(should_sample(u64::MAX, u64::MAX, || u32::MAX));
    }
}
