//! The prefilter engine: stubs in the target decide which blocks are sampled, and pass a
//! probed place for those alone.

#![expect(
    unsafe_code,
    reason = "memory that is shared with the target, and the code that is put into it"
)]

pub mod data;
pub mod gaps;
pub mod layout;
mod shared;
mod supply;
