//! Which places of a small table have sampled blocks: nearly every free is of a
//! block that was never sampled, and learns so from one word instead of a look
//! into the live map, which is a call and a walk.
//!
//! The table counts the entries of the live map by a hash of their key. A count
//! is raised before its block goes into the map, and lowered after it was taken
//! out, so that 0 means that the map has no such block. The other way round,
//! blocks that share a place only cost the look.

use crate::live::LiveKey;

/// Places: half a megabyte, of which a target with a few thousand sampled blocks
/// touches little.
pub const OCCUPANCY_PLACES: usize = 1 << 17;

/// The table: how many blocks there are at each place.
pub type Occupancy = [u32; OCCUPANCY_PLACES];

/// The place of a block.
#[must_use]
#[inline(always)]
pub const fn occupancy_place(key: &LiveKey) -> usize {
    // The top bits of a product with an odd number depend on all bits below. The
    // numbers are SplitMix64's ([`crate::random`]).
    let block = key.addr.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let image = ((key.pid as u64) << 32 | key.epoch as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((block ^ image) >> (u64::BITS - OCCUPANCY_PLACES.trailing_zeros())) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;
    use std::vec;

    /// Check that blocks as allocators lay them out spread over the table: no
    /// place has many, for several distances between blocks and processes.
    #[test]
    fn blocks_spread() {
        for step in [16, 32, 48, 64, 1024, 4096, 1 << 16, 1 << 21] {
            let mut counts = vec![0_u32; OCCUPANCY_PLACES];
            for pid in [1, 4000, 4001, 4_194_303] {
                for block in 0..4096 {
                    let key = LiveKey {
                        pid,
                        epoch: 0,
                        addr: 0x7f00_0000_0010 + block * step,
                    };
                    counts[occupancy_place(&key)] += 1;
                }
            }
            let most = counts.iter().max().copied();
            let used = counts.iter().filter(|&&count| count > 0).count();
            // 16384 thrown at random would leave 1 - exp(-1/8) = 12 % of the
            // places used.
            assert!(most <= Some(12), "{step}: {most:?} in one place");
            assert!(used > OCCUPANCY_PLACES / 16, "{step}: {used} places used");
        }
    }

    /// Check that images of one process differ.
    #[test]
    fn images_differ() {
        let place = |epoch| {
            occupancy_place(&LiveKey {
                pid: 77,
                epoch,
                addr: 0x5555_0000,
            })
        };
        assert_ne!(place(0), place(1));
    }
}
