//! A frame with its name, or with the reason why it has none.

use std::sync::Arc;

use crate::{
    address::{AbsAddr, FileOffset},
    process::mapping::Mapping,
};

/// One frame of a stack after symbolization. One address can be several
/// functions: those the compiler inlined there, and the one it compiled them
/// into.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The instruction that it stands at: the call, not the return address.
    pub address: AbsAddr,
    /// Where it is mapped from, if anywhere known.
    pub mapping: Option<Arc<Mapping>>,
    /// The instruction's place in the mapping's file.
    pub file_offset: Option<FileOffset>,
    /// Its name.
    pub name: FrameName,
}

/// The outcome of looking for a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameName {
    /// Leaf first: inlined functions, then the one that contains them, last.
    /// Never empty.
    Known(Vec<FunctionLine>),
    /// None found.
    Unknown(UnknownReason),
}

/// A function and a line in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionLine {
    /// Demangled.
    pub function: String,
    /// Source file, if the debug information says.
    pub file: Option<String>,
    /// Line in it.
    pub line: Option<u32>,
}

/// Why a frame has no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UnknownReason {
    /// No stack was captured for the sample; the process's losses say why.
    NoStack,
    /// No mapping is known at the address: a broken frame-pointer chain, or the
    /// process was gone before its mappings were read.
    Unmapped,
    /// The mapping has no file: code made at run time.
    Anonymous,
    /// The kernel's vDSO or vsyscall page.
    Vdso,
    /// The mapped file could not be read.
    FileUnreadable,
    /// The mapped file is not an ELF file that could be understood.
    NotElf,
    /// The file has no symbol at the address: stripped.
    NoSymbol,
}

impl UnknownReason {
    /// As spelled in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoStack => "no_stack",
            Self::Unmapped => "unmapped",
            Self::Anonymous => "anonymous",
            Self::Vdso => "vdso",
            Self::FileUnreadable => "file_unreadable",
            Self::NotElf => "not_elf",
            Self::NoSymbol => "no_symbol",
        }
    }
}
