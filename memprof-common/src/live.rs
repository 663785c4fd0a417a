//! The live map: sampled blocks that have not been freed.

use crate::stack::StackKey;

/// Which block: `AllocKey` in the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct LiveKey {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Program image of the process: BPF counts its `execve`s, so that a block of
    /// the old image is never taken for one of the new.
    pub epoch: u32,
    /// Address the allocator returned; of a pool's block with [`POOL_BLOCK`].
    pub addr: u64,
}

/// Set in the address of a block of a pool, which no address has. The first block of a piece of
/// memory that the pool has from another allocator can have the address of that.
pub const POOL_BLOCK: u64 = 1 << 63;

/// What is known of the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LiveValue {
    /// When the allocation returned, `CLOCK_MONOTONIC`.
    pub timestamp_ns: u64,
    /// Bytes the caller asked for.
    pub size_bytes: u64,
    /// The interval in force when the sample was taken.
    pub sample_interval_bytes: u64,
    /// The stack, or [`StackKey::UNKNOWN`].
    pub stack: StackKey,
    /// `FLAG_*`.
    pub flags: u32,
    /// Code of the [`crate::function::Function`] that was called.
    pub function: u32,
}

/// No alloc event has been sent for this block.
pub const FLAG_UNSENT: u32 = 1;

/// A failed `realloc` gave the block back; the daemon has been told of its
/// allocation, and perhaps of a free that did not happen.
pub const FLAG_RESTORED: u32 = 2;

const _: () = assert!(size_of::<LiveKey>() == 16);
const _: () = assert!(size_of::<LiveValue>() == 48);
