//! Wires the stages: one task owns the ledger, threads of their own attach and
//! symbolize, bounded channels in between.
//!
//! ```text
//!  CLI, HTTP ──commands──► tracer task ──requests──► probe thread
//!      │                    │  ring, live map, ledger, mappings
//!      │                    └──jobs──► blocking pool: reads /proc and ELF files
//!      └──captures──► symbolize thread
//! ```

pub mod budget;
pub mod capture;
pub mod dump;
mod image;
pub mod install;
mod metrics;
mod prober;
mod scan;
pub mod service;
mod stack_copies;
pub mod stats;
mod sweep;
mod tables;
pub mod target;
mod totals;
pub mod tracer;
mod versions;
