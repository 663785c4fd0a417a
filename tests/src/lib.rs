//! What the end-to-end tests share: small programs with known totals, the built
//! `memprof`, and readers for what it writes.
//!
//! Every wait has a limit, and nothing is skipped: what is missing (root, a
//! compiler, Go's pprof) fails the test that needs it.

pub mod code;
pub mod container;
pub mod daemon;
pub mod debuginfod;
pub mod dir;
pub mod engine;
pub mod golang;
pub mod hold;
pub mod http;
pub mod memory;
pub mod memprof;
pub mod nursery;
pub mod openapi;
pub mod oracle;
pub mod pprof;
pub mod profile;
pub mod record;
pub mod running;
pub mod stripped;
pub mod targets;

pub use self::{
    daemon::Daemon,
    dir::TempDir,
    memprof::memprof,
    profile::{CallTotals, Process, Profile, Stack, Totals, sum},
    record::{End, Record, Recorded},
    running::{Finished, LIMIT, LONG_LIMIT, Running},
    targets::{Target, target},
};
