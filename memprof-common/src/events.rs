//! The records in the ring buffer.
//!
//! Each begins with its kind, a `u32`. All are padding-free, so that no byte of
//! kernel memory leaves by accident and decoding needs no unsafe code.

use crate::live::{LiveKey, LiveValue};

/// The kind of an [`AllocEvent`].
pub const KIND_ALLOC: u32 = 1;
/// The kind of a [`FreeEvent`].
pub const KIND_FREE: u32 = 2;
/// The kind of an [`ExecEvent`].
pub const KIND_EXEC: u32 = 3;
/// The kind of an [`UnknownCodeEvent`].
pub const KIND_UNKNOWN_CODE: u32 = 4;

/// The kind of a [`ClaimEvent`].
pub const KIND_CLAIM: u32 = 5;

/// A sampled allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct AllocEvent {
    /// [`KIND_ALLOC`].
    pub kind: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Which block.
    pub key: LiveKey,
    /// What the live map holds for it.
    pub value: LiveValue,
}

/// A free of a sampled block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FreeEvent {
    /// [`KIND_FREE`].
    pub kind: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Which block.
    pub key: LiveKey,
    /// When the block was allocated: with the key it names one allocation.
    pub alloc_timestamp_ns: u64,
}

/// A target has replaced its program; every block of the old one is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ExecEvent {
    /// [`KIND_EXEC`].
    pub kind: u32,
    /// The process.
    pub pid: u32,
    /// The epoch of the new program.
    pub epoch: u32,
    /// 1 if a thread other than the first replaced the program, else 0. It has
    /// taken the first one's id, and probes that were bound to that are off.
    pub by_other_thread: u32,
    /// Name of the new program, padded with zeros: it may have ended before the
    /// daemon can ask.
    pub comm: [u8; COMM_BYTES],
}

/// A stack led to code that the daemon has not told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct UnknownCodeEvent {
    /// [`KIND_UNKNOWN_CODE`].
    pub kind: u32,
    /// The process.
    pub pid: u32,
    /// Its program.
    pub epoch: u32,
    /// 0.
    pub reserved: u32,
    /// An address in that code.
    pub address: u64,
}

/// A process that was not known has called an allocator that is probed for all, and has
/// taken a free slot. No event of it comes before this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ClaimEvent {
    /// [`KIND_CLAIM`].
    pub kind: u32,
    /// The process.
    pub pid: u32,
    /// The thread that has called.
    pub tid: u32,
    /// The slot that is the process's from now on.
    pub slot: u32,
    /// `CLOCK_MONOTONIC`.
    pub timestamp_ns: u64,
    /// The thread's name, padded with zeros.
    pub comm: [u8; COMM_BYTES],
}

/// `TASK_COMM_LEN`, `include/linux/sched.h`.
pub const COMM_BYTES: usize = 16;

const _: () = assert!(size_of::<AllocEvent>() == 72);
const _: () = assert!(size_of::<FreeEvent>() == 32);
const _: () = assert!(size_of::<ExecEvent>() == 32);
const _: () = assert!(size_of::<UnknownCodeEvent>() == 24);
const _: () = assert!(size_of::<ClaimEvent>() == 40);
