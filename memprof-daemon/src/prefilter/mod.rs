//! The prefilter engine: which calls are sampled is decided in the target, so that only
//! samples trap. `docs/prefilter.md` says what is written there, and how it is undone.

#![expect(
    unsafe_code,
    reason = "ptrace(2) and kcmp(2) beyond what nix has, memory that is shared with the target, and the code that is put into it"
)]

pub mod data;
pub mod gaps;
mod header;
pub mod hooks;
pub mod image;
pub mod layout;
pub mod relocate;
mod shared;
mod stubs;
mod supply;
