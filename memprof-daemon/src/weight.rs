//! What one sample stands for.

/// Estimate of the true values behind one sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weight {
    /// Allocations.
    pub weight_objects: f64,
    /// Bytes asked for by them.
    pub weight_bytes: f64,
    /// Estimate of the variance that this sample brings into a sum of
    /// `weight_bytes`, in square bytes.
    pub variance_bytes: f64,
}

/// Undoes the bias of sampling: an allocation of S bytes is sampled with
/// probability P = 1 - exp(-S/R), so each sample stands for 1/P allocations, and
/// S/P bytes.
///
/// An allocation adds S^2 (1 - P) / P to the variance of a sum of weights. It is
/// seen with probability P, so S^2 (1 - P) / P^2 for each that is seen estimates
/// the variance without bias.
///
/// An allocation of 0 bytes is sampled like one of 1 byte: it stands for many
/// objects and no bytes. At an interval of 1 every allocation is sampled and
/// stands for itself, exactly.
#[must_use]
pub fn unbias(size_bytes: u64, sample_interval_bytes: u64) -> Weight {
    let probability = if sample_interval_bytes <= 1 {
        1.0
    } else {
        #[expect(
            clippy::cast_precision_loss,
            reason = "sizes far below 2^53 in practice; above, the relative error is 2^-53"
        )]
        let ratio = size_bytes.max(1) as f64 / sample_interval_bytes as f64;
        -(-ratio).exp_m1()
    };
    let weight_objects = 1.0 / probability;
    #[expect(clippy::cast_precision_loss, reason = "as above")]
    let weight_bytes = weight_objects * size_bytes as f64;
    Weight {
        weight_objects,
        weight_bytes,
        variance_bytes: weight_bytes * weight_bytes * (1.0 - probability),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memprof_common::sampler::should_sample;

    /// Check that at interval 1 a sample stands for itself, exactly.
    #[test]
    fn exact_at_interval_one() {
        for size in [0, 1, 7, 4096, 1 << 40] {
            let weight = unbias(size, 1);
            assert_eq!(weight.weight_objects, 1.0);
            assert_eq!(weight.weight_bytes, size as f64);
            assert_eq!(weight.variance_bytes, 0.0);
        }
    }

    /// Check that small samples weigh the interval in bytes, large ones their
    /// size, and empty ones no bytes.
    #[test]
    fn limits() {
        let interval = 524_288;
        assert!((unbias(1, interval).weight_bytes - 524_288.5).abs() < 0.01);
        assert!((unbias(1 << 30, interval).weight_bytes - (1_u64 << 30) as f64).abs() < 1e-6);
        assert_eq!(unbias(0, interval).weight_bytes, 0.0);
        assert!((unbias(0, interval).weight_objects - 524_288.5).abs() < 0.01);
    }

    /// Check that the sum of weights estimates true bytes and objects without
    /// bias: sampler and weight together, mixed sizes, 5 sigmas, fixed seed.
    #[test]
    fn sum_of_weights_is_unbiased() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut draw = move || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
        };
        let interval = 8192;
        let sizes = [0, 1, 16, 48, 300, 4096, 10_000, 100_000];
        let (mut bytes, mut objects) = (0.0, 0.0);
        let (mut true_bytes, mut true_objects) = (0.0, 0.0);
        let (mut variance_bytes, mut variance_objects) = (0.0, 0.0);
        for round in 0..800_000_usize {
            let size = sizes[round % sizes.len()];
            let weight = unbias(size, interval);
            true_bytes += size as f64;
            true_objects += 1.0;
            // Var[w * Bernoulli(p)] = w^2 p (1 - p) = x^2 (1 - p) / p, x = w p.
            let odds = weight.weight_objects - 1.0;
            variance_bytes += (size as f64).powi(2) * odds;
            variance_objects += odds;
            if should_sample(size, interval, &mut draw) {
                bytes += weight.weight_bytes;
                objects += weight.weight_objects;
            }
        }
        assert!((bytes - true_bytes).abs() < 5.0 * f64::sqrt(variance_bytes));
        assert!((objects - true_objects).abs() < 5.0 * f64::sqrt(variance_objects));
    }
}
