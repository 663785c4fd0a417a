//! The gaps between samples.
//!
//! Samples are the points of a Poisson process over bytes with mean gap R, so a gap is
//! `-R ln(U)`, U uniform on (0, 1]. Stubs count in whole bytes, so it is rounded up: a block
//! of S bytes reaches a gap G of whole bytes if `G <= S`, and
//!
//! ```text
//! P(ceil(X) <= S) = P(X <= S) = 1 - exp(-S / R)    for whole S
//! ```
//!
//! Nothing is lost by rounding, then, and what is left of a rounded gap after any number of
//! whole bytes is again distributed like a fresh one: it has no memory, as the one that is
//! not rounded.

use memprof_common::{
    limits::MAX_SAMPLE_INTERVAL_BYTES,
    random::{Draws, Stream},
};

/// A class of sizes that BPF, which starts at the same seed for a target, has not.
const CLASS: usize = 0x3f;

/// A gap, with the interval it was drawn with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// At least 1.
    pub bytes: u64,
    /// At least 2, and what the sample at its end is weighed with.
    pub interval_bytes: u64,
}

/// An endless supply, of one target.
#[derive(Clone, Copy, Debug)]
pub struct Gaps {
    stream: Stream,
    drawn: u64,
}

impl Gaps {
    /// Those that start at `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self {
            stream: Stream {
                seed,
                epoch: 0,
                cpu: 0,
                class: CLASS,
            },
            drawn: 0,
        }
    }

    /// The next, with the mean `interval_bytes`. At an interval of 0 there are no samples,
    /// and at 1 all blocks are: no gap would say so.
    pub fn draw(&mut self, interval_bytes: u64) -> Gap {
        let interval_bytes = interval_bytes.clamp(2, MAX_SAMPLE_INTERVAL_BYTES);
        let mut draws = Draws::new(self.stream, self.drawn);
        self.drawn = self.drawn.wrapping_add(1);
        let bits = u64::from(draws.draw()) << 32 | u64::from(draws.draw());
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "numbers of 53 bits and of 32; a gap is at most 53 ln(2) intervals, and \
                      not below 0"
        )]
        let bytes = {
            let uniform = ((bits >> 11) + 1) as f64 / (1_u64 << 53) as f64;
            (-uniform.ln() * interval_bytes as f64).ceil() as u64
        };
        Gap {
            // 0 where U is 1: as rare as a gap of 36 intervals.
            bytes: bytes.max(1),
            interval_bytes,
        }
    }
}

#[cfg(test)]
#[path = "gaps_tests.rs"]
mod tests;
