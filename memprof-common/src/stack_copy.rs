//! For tests of the unwinder: what a walk saw, so that another unwinder can walk it
//! again.

use crate::limits::MAX_STACK_DEPTH;

/// Bytes of stack in a copy, at most.
pub const COPY_BYTES: usize = 60 << 10;
/// How many are copied at once: those before the first that cannot be read are lost
/// with it.
pub const COPY_STEP_BYTES: usize = 512;

/// The registers and the memory that one walk began with, and what came of it.
#[repr(C)]
pub struct StackCopy {
    /// The process.
    pub pid: u32,
    /// Its program.
    pub epoch: u32,
    /// Return address of the allocating call.
    pub ip: u64,
    /// Stack pointer after it.
    pub sp: u64,
    /// Frame pointer after it.
    pub bp: u64,
    /// As in the [`crate::stack::StackRecord`].
    pub end: u32,
    /// How many of `frames` are in use.
    pub depth: u32,
    /// As in the [`crate::stack::StackRecord`].
    pub frames: [u64; MAX_STACK_DEPTH],
    /// How many bytes of `copy` are in use.
    pub copy_bytes: u32,
    /// 0.
    pub reserved: u32,
    /// The memory from `sp` upwards.
    pub copy: [u8; COPY_BYTES],
}

const _: () = assert!(size_of::<StackCopy>() == 40 + 8 * MAX_STACK_DEPTH + 8 + COPY_BYTES);
