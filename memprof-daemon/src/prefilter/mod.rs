//! The prefilter engine: which calls are sampled is decided in the target, so that only
//! samples trap. `docs/prefilter.md` says what is written there, and how it is undone.

#![expect(
    unsafe_code,
    reason = "ptrace(2) and kcmp(2) beyond what nix has, memory that is shared with the target, and the code that is put into it"
)]

pub mod attach;
pub mod check;
pub mod data;
pub mod detach;
pub mod error;
pub mod frame;
pub mod gadgets;
pub mod gaps;
mod halt;
pub mod header;
pub mod hooks;
pub mod image;
pub mod inject;
mod jumps;
pub mod layout;
mod lead_out;
pub mod leftover;
mod map;
mod memory;
mod moves;
mod occupants;
pub mod place;
mod plan;
mod ptrace;
pub mod reclaim;
pub mod relocate;
mod remote;
mod restart;
mod shared;
pub mod sharing;
pub mod stack_rows;
mod step;
pub mod stop;
pub mod stop_error;
mod stubs;
mod supply;
pub mod tracer;
pub mod turn;
mod victim;
mod within;

#[cfg(test)]
mod death_tests;
#[cfg(test)]
mod testing;
