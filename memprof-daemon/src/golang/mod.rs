//! Go programs: the heap profile that the Go runtime keeps of itself, read from outside.
//!
//! A Go program samples its own allocations: each one that is sampled belongs to a *bucket*,
//! one for each stack and size, and all buckets are in a list that begins at the variable
//! `runtime.mbuckets`. That list is read in the target's memory. Nothing is probed, nothing is
//! written, and the target does not stop.
//!
//! ```text
//!  file ── buildinfo ─► version ─► layout ─┐
//!       ── symbols, or code ─► variables ──┼─► walk ─► scale ─► counters
//!       ── pclntab ────────────────────────┴─► names ─────────► frames
//! ```
//!
//! `docs/go.md` says what the numbers mean.

mod buildinfo;
mod code;
mod file;
mod layout;
pub(crate) mod memory;
mod module;
mod names;
mod pclntab;
mod program;
mod scale;
mod source;
mod symbols;
#[cfg(test)]
mod testing;
mod walk;

use std::{io, sync::Arc};

pub(crate) use self::{
    file::GoFiles,
    names::{Named, NamedStack},
    scale::counters,
    source::GoSource,
    walk::{Bucket, Reading},
};

use self::program::Mapped;
use crate::process::mapping::MappingTable;

/// A Go program that was found.
#[derive(Debug)]
pub(crate) struct FoundGo {
    /// The version of the Go that built it.
    pub(crate) version: String,
    /// Its profile, if it has begun to run; or why that cannot be read.
    pub(crate) profile: Result<(Arc<GoSource>, Option<Reading>), GoError>,
}

/// The Go program that a process runs, if it is one.
pub(crate) fn find(pid: u32, mappings: &MappingTable, files: &GoFiles) -> Option<FoundGo> {
    let found = Mapped::find(mappings, files)?;
    let open = || {
        let source = GoSource::open(pid, found.program()?)?;
        let first = match source.read() {
            // It is being put into its memory at this moment, and can be read in the next.
            Err(GoError::Memory(_)) => None,
            first => first?.filter(|first| !first.is_blank()),
        };
        Ok((source, first))
    };
    Some(FoundGo {
        version: found.version().to_owned(),
        profile: open(),
    })
}

/// Why a Go program's profile cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum GoError {
    /// Its runtime is older or newer than those that are known.
    #[error(
        "it is built by {version}, and the profiles of Go 1.{oldest} to 1.{newest} are known",
        oldest = layout::OLDEST,
        newest = layout::NEWEST
    )]
    Version {
        /// As the program says it.
        version: String,
    },
    /// The linker took profiling out.
    #[error(
        "the Go linker has taken memory profiling out of it, since nothing in it can reach \
         runtime.MemProfile: importing runtime/pprof or net/http/pprof keeps it in"
    )]
    Removed,
    /// Its variables were not found.
    #[error(
        "the variable {0} of its Go runtime cannot be found: it has no symbol, and no known code"
    )]
    NoVariable(&'static str),
    /// Its table of functions is not as it should be.
    #[error("its table of Go functions is not understood: {0}")]
    FunctionTable(&'static str),
    /// The file could not be read.
    #[error("cannot read its file: {0}")]
    File(#[source] io::Error),
    /// Its memory could not be read, or not any more.
    #[error("cannot read its memory: {0}")]
    Memory(#[source] io::Error),
    /// What is there cannot be what it is taken for.
    #[error("what it has in memory is no profile of {version}: {what}")]
    Implausible {
        /// As the program says it.
        version: String,
        /// What is wrong.
        what: &'static str,
    },
}
