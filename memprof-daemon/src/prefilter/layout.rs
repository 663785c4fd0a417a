//! Where things are in the memory that stubs and daemon share, and in the private part
//! behind it. `docs/prefilter.md` draws it.

use memprof_common::prefilter::{
    BUCKET_BYTES, HEADER_BYTES, PRIVATE_FLAG_BYTES, RING_ENTRIES, RING_ENTRY_BYTES, SHARD_BYTES,
};

/// The fewest shards.
pub const MIN_SHARDS: u32 = 256;
/// The most shards: 16 MiB of each part, of which only what is used is ever backed.
pub const MAX_SHARDS: u32 = 16_384;
/// The fewest bits of a bucket's number: 16,384 buckets, 1 MiB.
pub const MIN_BUCKET_BITS: u32 = 14;
/// The most bits of a bucket's number: 131,072 buckets, 8 MiB.
pub const MAX_BUCKET_BITS: u32 = 17;

/// How large the tables are. The code of an image has it as numbers, so it is the same
/// as long as the image is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// How many threads can be counted at a time; a power of two.
    pub shards: u32,
    /// Bits of a bucket's number.
    pub bucket_bits: u32,
}

impl Geometry {
    /// For a process with so many threads, of which so many sampled blocks may live at a
    /// time: four shards a thread, so that most find their home free, and eight buckets of
    /// eight a block, so that hardly any overflows.
    #[must_use]
    pub fn for_process(threads: usize, sampled_blocks: u64) -> Self {
        let shards = u32::try_from(threads.saturating_mul(4))
            .unwrap_or(MAX_SHARDS)
            .clamp(MIN_SHARDS, MAX_SHARDS)
            .next_power_of_two();
        let mut bucket_bits = MIN_BUCKET_BITS;
        while bucket_bits < MAX_BUCKET_BITS && 1 << bucket_bits < sampled_blocks {
            bucket_bits += 1;
        }
        Self {
            shards,
            bucket_bits,
        }
    }

    /// Whether code can be made for it.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.shards.is_power_of_two()
            && self.shards >= MIN_SHARDS
            && self.shards <= MAX_SHARDS
            && self.bucket_bits >= MIN_BUCKET_BITS
            && self.bucket_bits <= MAX_BUCKET_BITS
    }

    /// Where the ring of gaps begins.
    #[must_use]
    pub const fn ring_offset(self) -> usize {
        HEADER_BYTES
    }

    /// How many buckets there are, each with a byte of occupancy.
    #[must_use]
    pub const fn buckets(self) -> usize {
        1 << self.bucket_bits
    }

    /// Where the bytes of occupancy begin.
    #[must_use]
    pub const fn occupancy_offset(self) -> usize {
        self.ring_offset() + RING_ENTRIES * RING_ENTRY_BYTES
    }

    /// Where the buckets begin.
    #[must_use]
    pub const fn buckets_offset(self) -> usize {
        self.occupancy_offset() + self.buckets()
    }

    /// Where the shards begin.
    #[must_use]
    pub const fn shards_offset(self) -> usize {
        self.buckets_offset() + self.buckets() * BUCKET_BYTES
    }

    /// Where a shard begins.
    #[must_use]
    pub const fn shard_offset(self, shard: usize) -> usize {
        self.shards_offset() + shard * SHARD_BYTES
    }

    /// Length of the shared part; whole pages.
    #[must_use]
    pub const fn shared_bytes(self) -> usize {
        self.shard_offset(self.shards as usize)
    }

    /// Length of the private part, which is directly behind; whole pages.
    #[must_use]
    pub const fn private_bytes(self) -> usize {
        PRIVATE_FLAG_BYTES + self.shards as usize * SHARD_BYTES
    }

    /// From a shard to its private block.
    #[must_use]
    pub const fn p_delta(self) -> usize {
        self.shared_bytes() + PRIVATE_FLAG_BYTES - self.shards_offset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that every part begins at a page, for each geometry, that the parts do not
    /// overlap, and that the last private block ends with the private part.
    #[test]
    fn parts_tile() {
        for bucket_bits in MIN_BUCKET_BITS..=MAX_BUCKET_BITS {
            for shards in [MIN_SHARDS, 1024, MAX_SHARDS] {
                let geometry = Geometry {
                    shards,
                    bucket_bits,
                };
                assert!(geometry.is_valid());
                let starts = [
                    0,
                    geometry.ring_offset(),
                    geometry.occupancy_offset(),
                    geometry.buckets_offset(),
                    geometry.shards_offset(),
                    geometry.shared_bytes(),
                ];
                assert!(starts.is_sorted_by(|a, b| a < b));
                assert!(starts.iter().all(|start| start % 4096 == 0));
                let last = geometry.shard_offset(shards as usize - 1) + geometry.p_delta();
                assert_eq!(
                    last + SHARD_BYTES,
                    geometry.shared_bytes() + geometry.private_bytes()
                );
            }
        }
    }

    /// Check that the tables grow with the process, to their bounds.
    #[test]
    fn grows_with_the_process() {
        let of = |threads, blocks| {
            let geometry = Geometry::for_process(threads, blocks);
            assert!(geometry.is_valid());
            (geometry.shards, geometry.bucket_bits)
        };
        assert_eq!(of(1, 0), (256, 14));
        assert_eq!(of(65, 20_000), (512, 15));
        assert_eq!(of(usize::MAX, u64::MAX), (16_384, 17));
    }
}
