//! Stacks as BPF keeps them: a map from a keyed 128-bit hash to the frames.
//!
//! `bpf_get_stackid` names a stack by a 32-bit hash and loses or merges stacks
//! that collide. With 128 bits and a random key a collision among 2^32 stacks
//! has a probability below 2^-64, and a target cannot aim for one.

use crate::limits::MAX_STACK_DEPTH;

/// The name of a stack within one daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct StackKey {
    /// One half of the hash.
    pub high: u64,
    /// The other half.
    pub low: u64,
}

impl StackKey {
    /// No stack was captured; a counter says why.
    pub const UNKNOWN: Self = Self { high: 0, low: 0 };
}

/// The value of the stack map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct StackRecord {
    /// How many of `frames` are in use.
    pub depth: u32,
    /// Why there are no more: [`crate::unwind::walk::StackEnd`] and its flags.
    pub end: u32,
    /// Return addresses, the allocating function's caller first. Of a frame that a
    /// signal has interrupted: one more than the instruction's address. Of a pool's block the
    /// pool's function is before all, likewise.
    pub frames: [u64; MAX_STACK_DEPTH],
}

const _: () = assert!(size_of::<StackRecord>() == 8 + 8 * MAX_STACK_DEPTH);
const _: () = assert!(size_of::<StackKey>() == 16);

/// Hashes a stack frame by frame.
#[derive(Clone, Copy, Debug)]
pub struct StackHasher {
    high: u64,
    low: u64,
}

const HIGH_MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
const LOW_MULTIPLIER: u64 = 0xd6e8_feb8_6659_fd93;

impl StackHasher {
    /// Starts a hash under the key `seed`.
    #[must_use]
    #[inline(always)]
    pub const fn new(seed: u64) -> Self {
        Self {
            high: seed ^ 0x2545_f491_4f6c_dd1d,
            low: seed.rotate_left(32) ^ 0x1405_7b7e_f767_814f,
        }
    }

    /// Adds a frame.
    #[inline(always)]
    pub const fn push(&mut self, frame: u64) {
        // Each step is a bijection of the state for a given frame and of the
        // frame for a given state: two stacks of one length that differ in one
        // frame differ in both halves.
        self.high = (self.high ^ frame).wrapping_mul(HIGH_MULTIPLIER);
        self.high ^= self.high >> 32;
        self.low = self.low.wrapping_add(frame).wrapping_mul(LOW_MULTIPLIER);
        self.low ^= self.low >> 29;
    }

    /// The name of the stack of `depth` frames that were pushed, and that ended for
    /// the reason `end`; never [`StackKey::UNKNOWN`].
    #[must_use]
    #[inline(always)]
    pub const fn finish(mut self, depth: u32, end: u32) -> StackKey {
        self.push(depth as u64 | (end as u64) << 32);
        let mut high = self.high.wrapping_mul(LOW_MULTIPLIER);
        high ^= high >> 31;
        let mut low = self.low.wrapping_mul(HIGH_MULTIPLIER);
        low ^= low >> 33;
        // `UNKNOWN` must stay free.
        StackKey { high, low: low | 1 }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::{collections::HashSet, vec::Vec};

    fn key(seed: u64, frames: &[u64]) -> StackKey {
        let mut hasher = StackHasher::new(seed);
        for &frame in frames {
            hasher.push(frame);
        }
        hasher.finish(frames.len() as u32, 0)
    }

    /// Check that stacks that differ in one frame, in order or in length get
    /// different names, over 300,000 stacks of realistic addresses.
    #[test]
    fn different_stacks_have_different_names() {
        let mut seen = HashSet::new();
        let mut expected = 0;
        for a in 0..300_u64 {
            for b in 0..1000_u64 {
                let frames = [0x5555_0000_0000 + a * 5, 0x7fff_f000_0000 + b * 3];
                seen.insert(key(7, &frames));
                expected += 1;
            }
        }
        for depth in 0..=MAX_STACK_DEPTH {
            let zeros: Vec<u64> = std::iter::repeat_n(0, depth).collect();
            seen.insert(key(7, &zeros));
            expected += 1;
        }
        assert_eq!(seen.len(), expected);
        assert_ne!(key(7, &[1, 2]), key(7, &[2, 1]));
    }

    /// Check that both halves alone tell 200,000 stacks apart, so that the name
    /// is worth its 128 bits.
    #[test]
    fn both_halves_carry_weight() {
        let (mut high, mut low) = (HashSet::new(), HashSet::new());
        for a in 0..200_000_u64 {
            let name = key(99, &[0x7f00_0000_1000 + a, 0x5555_5555_0000]);
            high.insert(name.high);
            low.insert(name.low);
        }
        assert_eq!(high.len(), 200_000);
        assert_eq!(low.len(), 200_000);
    }

    /// Check that the key matters and that the unknown stack's name stays free.
    #[test]
    fn seed_matters_and_unknown_is_free() {
        assert_ne!(key(1, &[42]), key(2, &[42]));
        for seed in 0..1000 {
            assert_ne!(key(seed, &[]), StackKey::UNKNOWN);
        }
    }
}
