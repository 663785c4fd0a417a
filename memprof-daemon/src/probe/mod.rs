//! Probes: where they go, how they get there, and the maps they fill.
//!
//! The uprobe engine. Nothing is written to the target by us: the kernel plants
//! the breakpoints, and takes them away when the links are closed, also when
//! this process is killed.

#![expect(
    unsafe_code,
    reason = "bpf(2) batch operations, and what must run between fork and exec"
)]

pub mod attach;
pub mod find;
mod jumps;
pub mod launch;
pub mod live_map;
pub mod loader;
pub mod point;
pub mod requirements;
