//! memprof's daemon: from the events that the BPF programs send to heap
//! profiles with names.
//!
//! The stages stand in the order of the data path, and depend on those before
//! them only:
//!
//! ```text
//! probe ─► ring ─► decode ─► ledger ─► symbolize ─► export
//!                              ▲
//!                           process
//! ```
//!
//! [`pipeline`] wires them; [`cli`] is what a user types.

#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod address;
mod causes;
pub mod cli;
pub mod config;
pub mod decode;
pub mod export;
pub mod filter;
pub(crate) mod golang;
pub mod interval;
pub mod ledger;
pub mod pipeline;
pub mod prefilter;
pub mod probe;
pub mod process;
pub mod ring;
pub mod sample;
pub mod symbolize;
pub mod unwind;
pub mod weight;
