//! What both sides of memprof's ring buffer must agree on.
//!
//! The BPF programs (`memprof-ebpf`) and the daemon (`memprof-daemon`) share the
//! records that cross the ring buffer, the keys and values of the maps, the
//! sampling decision and the limits. Everything here is `no_std` and free of
//! I/O, so that it runs in BPF and is tested on the host.
//!
//! The kernel calls a process *tgid* and a thread *pid*; memprof says `pid` and
//! `tid` for them, here and everywhere else.

#![no_std]

pub mod config;
pub mod counters;
pub mod events;
pub mod function;
pub mod limits;
pub mod live;
pub mod occupancy;
pub mod prefilter;
pub mod random;
pub mod sampler;
pub mod stack;
pub mod stack_copy;
pub mod totals;
pub mod unwind;

#[cfg(feature = "user")]
mod user;
