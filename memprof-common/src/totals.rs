//! Exact totals: what BPF counts at every call, sampled or not.

use crate::limits::MAX_TARGETS;

/// How many classes of sizes there are. The last takes all sizes from 4 TiB on,
/// which no allocator grants.
pub const SIZE_CLASSES: usize = 44;

/// The largest size of the last class but for those that are put into it.
const LARGEST_BYTES: u64 = (1 << (SIZE_CLASSES - 1)) - 1;

/// Sizes that no allocator grants, user addresses having 47 bits: such a call is
/// counted, and its bytes are not.
pub const IMPOSSIBLE_BYTES: u64 = 1 << 47;

/// The value of the per-CPU map of totals, two slots a target.
///
/// The number of allocating calls is the sum of `alloc_calls`: one addition less
/// at each call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TargetTotals {
    /// Bytes asked for.
    pub alloc_bytes: u64,
    /// Calls that give a block up; those for NULL are none.
    pub free_calls: u64,
    /// 0.
    pub reserved: [u64; 2],
    /// Allocating calls by [`size_class`].
    pub alloc_calls: [u64; SIZE_CLASSES],
}

impl Default for TargetTotals {
    fn default() -> Self {
        Self {
            alloc_bytes: 0,
            free_calls: 0,
            reserved: [0; 2],
            alloc_calls: [0; SIZE_CLASSES],
        }
    }
}

const _: () = assert!(size_of::<TargetTotals>() == 384);

/// Entries of the map of totals.
pub const TOTALS_ENTRIES: u32 = 2 * MAX_TARGETS;

/// Where the totals of a program image are: two places a slot, taken in turn, so
/// that those of an image that has been replaced stand still until the daemon has
/// read them.
#[must_use]
#[inline(always)]
pub const fn totals_index(slot: u32, epoch: u32) -> u32 {
    slot << 1 | epoch & 1
}

/// The class of a size: the number of its bits. Class 0 is 0 bytes, class 1 is 1
/// byte, class c from 2^(c-1) to 2^c - 1.
#[must_use]
#[inline(always)]
pub const fn size_class(size_bytes: u64) -> usize {
    // First, so that the verifier knows the bound of the class on every path. It
    // finds paths that cannot be, and those of Linux 6.1 and before lose all bounds
    // on one where a comparison behind them contradicts.
    let mut rest = if size_bytes > LARGEST_BYTES {
        LARGEST_BYTES
    } else {
        size_bytes
    };
    // By halves: BPF cannot count leading zeros.
    let mut bits = 0;
    let mut half = 32;
    while half > 0 {
        if rest >> half != 0 {
            bits += half;
            rest >>= half;
        }
        half /= 2;
    }
    bits + rest as usize
}

/// The smallest and the largest size of a class.
#[must_use]
pub const fn size_class_bounds(class: usize) -> (u64, u64) {
    match class {
        0 => (0, 0),
        _ if class >= SIZE_CLASSES - 1 => (1 << (SIZE_CLASSES - 2), u64::MAX),
        _ => (1 << (class - 1), (1 << class) - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that every class begins and ends where it says, and that the next
    /// begins behind it.
    #[test]
    fn classes_tile_all_sizes() {
        let mut next = 0_u64;
        for class in 0..SIZE_CLASSES {
            let (least, most) = size_class_bounds(class);
            assert_eq!(least, next);
            assert_eq!(size_class(least), class);
            assert_eq!(size_class(most), class);
            assert_eq!(size_class(least + (most - least) / 2), class);
            next = most.wrapping_add(1);
        }
        assert_eq!(next, 0, "the last class ends at the largest size");
    }

    /// Check that an image and the next never share a place, nor two slots.
    #[test]
    fn places_are_apart() {
        assert_ne!(totals_index(5, 0), totals_index(5, 1));
        assert_eq!(totals_index(5, 0), totals_index(5, 2));
        assert_ne!(totals_index(5, 1), totals_index(6, 0));
        assert!(totals_index(MAX_TARGETS - 1, u32::MAX) < TOTALS_ENTRIES);
    }
}
