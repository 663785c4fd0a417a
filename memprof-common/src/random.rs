//! The random bits of sampling decisions.
//!
//! The n-th call of a stream gets `mix(seed + n * WEYL)`, the generator
//! SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
//! generators", 2014) entered at place n. Since BPF counts every call anyway, it
//! has n without state of its own: nothing to race for, and no call of the
//! kernel's generator, `bpf_get_prandom_u32`, which calls another function.
//!
//! A place of the generator's period of 2^64 is used once: its number is made of
//! the stream and of n.

/// 2^64 divided by the golden ratio, odd.
const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// Whose calls are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Of the target: another one for each.
    pub seed: u64,
    /// Which of its programs.
    pub epoch: u32,
    /// The CPU that counts.
    pub cpu: u32,
    /// Which of the counts.
    pub class: usize,
}

/// The random bits of one call, 32 at a time; two draws at most.
#[derive(Clone, Copy, Debug)]
pub struct Draws(u64);

impl Draws {
    /// Of call number `call` of a stream.
    ///
    /// 2^40 calls, 4096 CPUs, 64 classes and 64 programs have places of their
    /// own; beyond, places are shared, by calls too far apart to matter.
    #[must_use]
    #[inline(always)]
    pub const fn new(stream: Stream, call: u64) -> Self {
        let place = call
            ^ (stream.cpu as u64 & 0xfff) << 40
            ^ (stream.class as u64 & 0x3f) << 52
            ^ (stream.epoch as u64) << 58;
        let mut z = place.wrapping_mul(WEYL).wrapping_add(stream.seed);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(z ^ z >> 31)
    }

    /// The next 32.
    #[inline(always)]
    pub const fn draw(&mut self) -> u32 {
        let high = self.0 >> 32;
        self.0 <<= 32;
        high as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;

    fn stream(seed: u64, cpu: u32, class: usize, epoch: u32) -> Stream {
        Stream {
            seed,
            epoch,
            cpu,
            class,
        }
    }

    /// Check against the published generator's first numbers with seed
    /// 1234567, as of <https://prng.di.unimi.it/splitmix64.c>.
    #[test]
    fn is_splitmix() {
        let draws = |call| {
            let mut draws = Draws::new(stream(1_234_567, 0, 0, 0), call);
            u64::from(draws.draw()) << 32 | u64::from(draws.draw())
        };
        assert_eq!(draws(1), 6_457_827_717_110_365_317);
        assert_eq!(draws(2), 3_203_168_211_198_807_973);
        assert_eq!(draws(3), 9_817_491_932_198_370_423);
    }

    /// Check that the bits are uniform along a stream, and across streams at the
    /// same call: counts in 256 bins against chi-square with 255 degrees of
    /// freedom, whose deviation is sqrt(510), within 5 sigmas.
    #[test]
    fn uniform_along_and_across() {
        let chi_square = |draw: &dyn Fn(u64) -> u32| {
            let mut bins = [0_u32; 256];
            let draws = 1_u64 << 18;
            for call in 0..draws {
                bins[(draw(call) >> 24) as usize] += 1;
            }
            let expected = draws as f64 / 256.0;
            let square = |&bin: &u32| (f64::from(bin) - expected).powi(2) / expected;
            bins.iter().map(square).sum::<f64>()
        };
        for seed in [0, 1, u64::MAX, 0x1234_5678_9abc_def0] {
            let along = chi_square(&|call| Draws::new(stream(seed, 0, 5, 0), call).draw());
            let across = chi_square(&|n| {
                let (cpu, class) = ((n & 0xfff) as u32, (n >> 12) as usize);
                Draws::new(stream(seed, cpu, class, 3), 17).draw()
            });
            for value in [along, across] {
                assert!((value - 255.0).abs() < 5.0 * 510_f64.sqrt(), "{value}");
            }
        }
    }

    /// Check that neighbours are not correlated: successive calls, the same call
    /// on two CPUs, in two classes, of two programs, of two targets with seeds
    /// one apart. The coefficient of n pairs deviates by 1/sqrt(n).
    #[test]
    fn uncorrelated_neighbours() {
        let base = stream(99, 0, 6, 0);
        let uniform = |stream, call| f64::from(Draws::new(stream, call).draw()) / 2_f64.powi(32);
        let others: [(&str, Stream, u64); 5] = [
            ("call", base, 1),
            ("cpu", stream(99, 1, 6, 0), 0),
            ("class", stream(99, 0, 7, 0), 0),
            ("epoch", stream(99, 0, 6, 1), 0),
            ("seed", stream(100, 0, 6, 0), 0),
        ];
        for (name, other, ahead) in others {
            let calls = 400_000_u32;
            let sum: f64 = (0..u64::from(calls))
                .map(|call| (uniform(base, call) - 0.5) * (uniform(other, call + ahead) - 0.5))
                .sum();
            let coefficient = 12.0 * sum / f64::from(calls);
            assert!(
                coefficient.abs() < 5.0 / f64::from(calls).sqrt(),
                "{name}: {coefficient}"
            );
        }
    }
}
