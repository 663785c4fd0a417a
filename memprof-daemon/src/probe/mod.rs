//! Probes: where they go, how they get there, and the maps they fill.
//!
//! The uprobe engine. Nothing is written to the target by us: the kernel plants
//! the breakpoints, and takes them away when the links are closed, also when
//! this process is killed.

#![expect(
    unsafe_code,
    reason = "bpf(2) beyond what aya has, what must run in children before exec, and mallopt"
)]

pub mod arena;
pub mod attach;
pub mod find;
mod function_types;
pub mod heap;
pub(crate) mod jumps;
pub mod launch;
pub mod live_map;
pub mod loader;
pub mod map_bytes;
mod mapped;
pub mod mode;
pub mod object;
mod occupancy;
pub mod point;
pub mod pools;
pub mod programs;
pub mod requirements;
pub mod seccomp;
mod syscall;
mod tail_calls;
pub mod uprobe_multi;
pub mod walker;
