//! Unwinding by tables, on both sides: what the daemon compiles from `.eh_frame`,
//! and how BPF walks a stack with it.
//!
//! Everything lies in one address space of 64-bit *words*, the arena:
//!
//! - the *rows* of a module, sorted: from which address on which [`rule::Rule`] holds;
//! - its *pages*: for each [`table::PAGE_BYTES`] of the module's addresses, the rows that
//!   begin in it, so that a search has few rows to look at however large the module is;
//! - its *wide rules*, for what does not fit a row;
//! - the *mappings* of a process, sorted: which addresses belong to which module.
//!
//! What was found there is kept in a [`cache`], for the next walk.
//!
//! [`walk`] is the same code in BPF and in tests: it sees the arena and the target's
//! memory through [`walk::Memory`].

pub mod cache;
mod frame_pointer;
pub mod rule;
mod search;
pub mod table;
pub mod walk;
