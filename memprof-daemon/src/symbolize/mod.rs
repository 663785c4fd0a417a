//! From addresses to names.
//!
//! ```text
//! FrameAddress ─ site ─► AbsAddr ─ normalize ─► (MappedFile, FileOffset) ─ resolve ─► FrameName
//!                                                            └──────── cache ───────┘
//! ```
//!
//! [`worker`] runs all of it on a thread of its own.

mod cache;
pub mod debuginfod;
mod demangle;
pub mod frame;
pub mod names;
pub mod normalize;
pub mod resolve;
mod separate;
mod site;
#[cfg(test)]
mod testing;
pub mod trim;
pub mod worker;

pub use worker::{SymbolizeError, SymbolizeHandle};
