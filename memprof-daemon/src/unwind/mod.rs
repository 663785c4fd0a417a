//! From a file's unwind information to the rows that BPF walks stacks with.
//!
//! ```text
//! ELF file ─ section ─► .eh_frame ─ rows ─► (address, rule)... ─ table ─► Table
//!                                    │
//!                                  rule: one gimli row to one Rule
//! ```
//!
//! Files are hostile until proven otherwise: nothing is mapped, no length is believed,
//! and time and memory have limits.

mod rows;
mod rule;
mod section;
mod table;

use std::{fs::File, io::Write as _, os::fd::OwnedFd};

use memprof_common::unwind::rule::Rule;
use thiserror::Error;

pub use self::table::Table;
use crate::{
    address::VirtOffset,
    process::elf::{ElfError, ElfLayout},
};

/// Why a file has no table.
#[derive(Debug, Error)]
pub enum CompileError {
    /// It could not be read.
    #[error("cannot read: {0}")]
    Io(#[from] std::io::Error),
    /// It is not what it should be.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// It describes no function.
    #[error("no unwind information")]
    NoUnwindInfo,
    /// What describes the functions is damaged from its beginning on.
    #[error("malformed unwind information: {0}")]
    Malformed(#[from] gimli::Error),
    /// It is larger, or more work, than that of any real file.
    #[error("too much unwind information: {0}")]
    TooMuch(&'static str),
}

/// Compiles the unwind information of a file. Takes up to a second for the largest.
///
/// What of it is damaged is left out: stacks end there.
///
/// # Errors
///
/// [`CompileError`].
pub fn compile(file: &File) -> Result<Table, CompileError> {
    let layout = ElfLayout::read(file)?;
    let section = section::read(file, &layout)?;
    let code = rows::Code::of(&layout)?;
    table::build(&code, rows::collect(&section, &code)?)
}

/// The table of code of which the rules are known otherwise: each holds from its address, relative
/// to `origin`, to the next, the last being [`Rule::NONE`].
///
/// # Errors
///
/// [`CompileError::NoUnwindInfo`] if there are none.
pub fn of_rules(origin: VirtOffset, rules: &[(u32, Rule)]) -> Result<Table, CompileError> {
    let mut rows = rows::Rows::default();
    for pair in rules.windows(2) {
        if let &[(start, rule), (end, _)] = pair
            && rule != Rule::NONE
        {
            rows.push(start..end, rule);
        }
    }
    table::build(&rows::Code::at(origin), rows)
}

/// What compiling takes of memory, for each byte of unwind information: the information, rows
/// in a growing list and in order, and their copy for the arena.
const COMPILE_TIMES: u64 = 8;

/// How much memory [`compile`] takes for a file, roughly.
///
/// # Errors
///
/// [`CompileError`]: it cannot be compiled either.
pub fn compile_bytes(file: &File) -> Result<u64, CompileError> {
    let layout = ElfLayout::read(file)?;
    Ok(section::size(file, &layout)?.saturating_mul(COMPILE_TIMES))
}

/// Compiles the unwind information of an ELF file that is in memory, which the vDSO is.
///
/// # Errors
///
/// [`CompileError`].
pub fn compile_image(image: &[u8]) -> Result<Table, CompileError> {
    let memory: OwnedFd =
        nix::sys::memfd::memfd_create(c"memprof-image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .map_err(std::io::Error::from)?;
    let mut file = File::from(memory);
    file.write_all(image)?;
    compile(&file)
}

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
