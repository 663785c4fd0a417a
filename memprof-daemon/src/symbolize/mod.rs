//! From addresses to names.
//!
//! ```text
//! FrameAddress ─ normalize ─► (MappedFile, FileOffset) ─ resolve ─► FrameName
//!                                     └──────── cache ───────┘
//! ```
//!
//! [`worker`] runs all of it on a thread of its own.

mod cache;
mod demangle;
pub mod frame;
pub mod normalize;
pub mod resolve;
mod separate;
#[cfg(test)]
mod testing;
pub mod trim;
pub mod worker;

pub use worker::{SymbolizeError, SymbolizeHandle};
