//! Drains bytes that the kernel writes into memory shared with it.

#![expect(
    unsafe_code,
    reason = "memory shared with the kernel, and descriptors registered with the runtime"
)]

pub mod events;
pub mod log;
pub mod mmap_events;
