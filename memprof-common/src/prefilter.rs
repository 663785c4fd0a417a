//! What the stubs in a target, the daemon and the BPF programs of the prefilter
//! engine must agree on: places of fields in the shared memory, and the frame that
//! a site shows.
//!
//! The stubs are assembly (`memprof-daemon/src/prefilter/stubs/`), which takes these
//! constants as operands. docs/prefilter.md draws the memory.

/// A place in the stubs that carries a uprobe. Its code is the function byte of the
/// probe's cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum SiteKind {
    /// A sampled call has handed out a block: see [`SiteFrame`].
    Alloc = 0xf0,
    /// A block of the sampled set is about to be freed; `rdi` is its address.
    Free = 0xf1,
    /// `realloc` is about to give up a block of the sampled set; `rdi` is its address.
    Take = 0xf2,
    /// The `realloc` has failed: [`SiteFrame::old_pointer`] is as it was.
    Restore = 0xf3,
}

impl SiteKind {
    /// Every kind.
    pub const ALL: &[Self] = &[Self::Alloc, Self::Free, Self::Take, Self::Restore];

    /// The kind with this code, if there is one.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0xf0 => Some(Self::Alloc),
            0xf1 => Some(Self::Free),
            0xf2 => Some(Self::Take),
            0xf3 => Some(Self::Restore),
            _ => None,
        }
    }
}

/// A call that the stubs follow to its return, on the stack of its thread.
///
/// Its last word is the return address that the caller has pushed: the caller's stack
/// pointer after the return is the address of the frame + 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SiteFrame {
    /// Bytes asked for.
    pub size_bytes: u64,
    /// The interval that the gap was drawn with; 0: undecided, BPF decides.
    pub interval_bytes: u64,
    /// The block handed out.
    pub address: u64,
    /// Code of the [`crate::function::Function`].
    pub function: u32,
    /// `FRAME_*`.
    pub flags: u32,
    /// Where `posix_memalign` stores the address; else 0.
    pub out_pointer: u64,
    /// The block that `realloc` was given; else 0.
    pub old_pointer: u64,
    /// Address of the thread's shard.
    pub shard: u64,
    /// Where the call returns to.
    pub return_address: u64,
}

/// Bytes of a [`SiteFrame`].
pub const SITE_FRAME_BYTES: u64 = 64;
const _: () = assert!(size_of::<SiteFrame>() == SITE_FRAME_BYTES as usize);

/// From the stack pointer at [`SiteKind::Alloc`] and [`SiteKind::Restore`] to the frame.
pub const SITE_FRAME_OFFSET: u64 = 64;

/// The call was taken for sampling.
pub const FRAME_SAMPLED: u32 = 1;
/// `realloc`'s old block was in the sampled set and was taken out.
pub const FRAME_TAKEN: u32 = 2;
/// The function may call others of the family, so the call is followed if it is not
/// sampled, too.
pub const FRAME_NESTS: u32 = 4;
/// `posix_memalign`: it returns an `int`, and the address is at
/// [`SiteFrame::out_pointer`].
pub const FRAME_STORES: u32 = 8;
/// `xallocx`: it returns the size that the block has then, and has failed if that is less
/// than was asked for. The block stays where it is.
pub const FRAME_IN_PLACE: u32 = 16;
/// `reallocf`: the old block is freed also if it fails.
pub const FRAME_GIVES_UP: u32 = 32;
/// The thread had no shard, so that the call is marked in none; if it is followed, it is
/// one of [`HEADER_UNMARKED`].
pub const FRAME_UNMARKED: u32 = 64;

/// First word of the shared part: "MPPFdat1".
pub const DATA_MAGIC: u64 = u64::from_le_bytes(*b"MPPFdat1");
/// Where [`DATA_MAGIC`] is.
pub const HEADER_MAGIC: usize = 0;
/// Raised by the daemon when the interval changes, after it has emptied the ring and
/// before it fills it anew: a thread reads this first, then takes a gap, and so never
/// takes an old gap for a new one. Begins with 1.
pub const HEADER_GENERATION: usize = 16;
/// Times that a thread found the ring empty and no credit left.
pub const HEADER_STARVED: usize = 24;
/// Calls (allocating and freeing) that were not counted nor sampled, since their
/// thread found no shard.
pub const HEADER_UNSHARDED: usize = 32;
/// Calls under way that the stubs follow and that no shard has a mark of.
pub const HEADER_UNMARKED: usize = 40;
/// The next gap to take: a count, taken modulo the ring's length. Threads raise it by
/// compare and exchange; the daemon empties the ring by setting it to the tail so.
pub const HEADER_RING_HEAD: usize = 64;
/// Behind the last gap that the daemon has written: a count.
pub const HEADER_RING_TAIL: usize = 128;
/// How many calls BPF may be asked to decide while the ring is empty; signed.
pub const HEADER_CREDIT: usize = 192;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 4096;

/// Gaps that the ring holds; a power of two.
pub const RING_ENTRIES: usize = 1 << 14;
/// An entry: the gap in bytes, at least 1, and the interval it was drawn with.
pub const RING_ENTRY_BYTES: usize = 16;

/// Bytes of a shard.
pub const SHARD_BYTES: usize = 1024;
/// Bytes until the next sample; signed.
pub const SHARD_COUNTDOWN: usize = 0;
/// Bytes asked for.
pub const SHARD_BYTES_ASKED: usize = 8;
/// Calls that gave a block up; signed, and to be summed over the shards.
pub const SHARD_FREES: usize = 16;
/// The interval of the gap in force; 0: the gap is no gap (see [`SiteFrame`]).
pub const SHARD_INTERVAL: usize = 24;
/// The generation that the gap in force was taken in.
pub const SHARD_GENERATION: usize = 32;
/// Calls by the number of leading zeros of their size: 65 words.
pub const SHARD_CALLS: usize = 40;
/// Words at [`SHARD_CALLS`].
pub const SHARD_CALL_CLASSES: usize = 65;

/// The first page of the private part: 0 if the stubs are to do nothing, as in a
/// forked child.
pub const PRIVATE_ENABLED: usize = 0;
/// Bytes before the private blocks of the shards.
pub const PRIVATE_FLAG_BYTES: usize = 4096;
/// In a shard's private block: the thread pointer of the owner, until the owner has ended
/// and the daemon makes it [`OWNER_GONE`]; 0 if there was none yet. Not where a shard has its hot words, or processors would take a load
/// of the next word for one of theirs (they compare 12 bits of addresses first).
pub const PRIVATE_OWNER: usize = 960;
/// In a shard's private block: the thread pointer of the owner if it is in no call that
/// the stubs follow, else the address of the outermost call's [`SiteFrame`]. One word,
/// so that a signal handler finds no half of a change.
pub const PRIVATE_CALL: usize = 968;
/// At [`PRIVATE_OWNER`]: the owner has ended, and another thread may take the shard. Its
/// [`PRIVATE_CALL`] is 0 then. Not 0, at which a thread ends its search for its own.
pub const OWNER_GONE: u64 = 1;

/// A countdown that asks the thread for another gap.
pub const REDRAW: i64 = -(1 << 62);
/// At most this: [`REDRAW`], also after sizes were subtracted.
pub const REDRAW_LIMIT: i64 = -(1 << 61);
/// The countdown of a thread that found neither gap nor credit. As large as the sizes
/// that no allocator grants, so that such a size never passes as an unsampled call.
pub const ASLEEP: i64 = crate::totals::IMPOSSIBLE_BYTES as i64;
/// Above this a countdown is [`ASLEEP`]: no gap is so long.
pub const ASLEEP_LIMIT: i64 = ASLEEP / 2;

/// Multiplier of the hash of thread pointers.
pub const SHARD_HASH: u64 = 0x61c8_8647;
/// Multiplier of the hash of addresses.
pub const BUCKET_HASH: u64 = 0x61c8_8647;
/// How many shards a thread tries, from its home on.
pub const SHARD_PROBES: usize = 64;

/// The home shard of a thread among a power of two.
#[must_use]
#[inline(always)]
pub const fn home_shard(thread_pointer: u64, shards: u32) -> u32 {
    (thread_pointer.wrapping_mul(SHARD_HASH) >> 42) as u32 & (shards - 1)
}

/// The bucket of an address.
#[must_use]
#[inline(always)]
pub const fn bucket_of(address: u64, bucket_bits: u32) -> u32 {
    (address.wrapping_mul(BUCKET_HASH) >> 32) as u32 & ((1 << bucket_bits) - 1)
}

/// Bit of an occupancy byte: the bucket has been full, an address is not in it, and
/// every free of the bucket must hit [`SiteKind::Free`]. The others count its entries.
pub const OCCUPANCY_OVERFLOWED: u8 = 0x80;
/// Bytes of a bucket: a line of the cache.
pub const BUCKET_BYTES: usize = 64;
/// Addresses that a bucket holds; a free slot is 0.
pub const BUCKET_SLOTS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;
    use std::vec;

    /// Check that a kind's code leads back to it, and that no function has one.
    #[test]
    fn codes_round_trip() {
        for &kind in SiteKind::ALL {
            assert_eq!(SiteKind::from_code(kind as u8), Some(kind));
            assert_eq!(crate::function::Function::from_code(kind as u8), None);
        }
        assert_eq!(SiteKind::from_code(0xf4), None);
    }

    /// Check that threads whose control blocks lie as C libraries lay them (stacks of
    /// several sizes with their guard, one behind another) rarely share a home: with
    /// four shards a thread, at most half do, whatever the distance, and a tenth on
    /// average (thrown at random it would be 12 %).
    #[test]
    fn threads_have_homes() {
        let (mut sum, mut cases) = (0.0, 0.0);
        for step in [
            0x2_1000, 0x2_3000, 0x4_0000, 0x4_1000, 0x10_1000, 0x80_0000, 0x80_1000, 0x81_0000,
            0x400_1000,
        ] {
            for threads in [8_u32, 64, 250, 1000] {
                let shards = (4 * threads).next_power_of_two().max(256);
                let mut homes = vec![0_u32; shards as usize];
                for thread in 0..u64::from(threads) {
                    let pointer = 0x7f12_3456_76c0 - thread * step;
                    homes[home_shard(pointer, shards) as usize] += 1;
                }
                let shared: u32 = homes.iter().map(|&n| n.saturating_sub(1)).sum();
                assert!(shared * 2 <= threads, "{step:x}: {shared} of {threads}");
                sum += f64::from(shared) / f64::from(threads);
                cases += 1.0;
            }
        }
        assert!(sum / cases <= 0.1, "{}", sum / cases);
    }

    /// Check that blocks as allocators lay them out spread over the buckets: of as
    /// many blocks as a quarter of the slots, none would make a bucket overflow.
    #[test]
    fn blocks_spread() {
        for step in [
            16,
            32,
            48,
            64,
            112,
            1024,
            4096,
            1 << 16,
            (1 << 16) + 4096,
            1 << 21,
        ] {
            let mut counts = vec![0_u32; 1 << 14];
            for block in 0..1_u64 << 15 {
                counts[bucket_of(0x7f00_0000_0010 + block * step, 14) as usize] += 1;
            }
            let most = counts.iter().max().copied();
            assert!(most <= Some(BUCKET_SLOTS as u32), "{step}: {most:?}");
        }
    }
}
