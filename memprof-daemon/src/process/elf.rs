//! What memprof needs of an ELF file, read in small pieces.
//!
//! Mapped files are chosen by the traced program and can be of any size and
//! content, and can change while they are read: so nothing is mapped (a
//! truncation would be `SIGBUS`), no table is believed about its own length,
//! and no more is held than a few megabytes.

mod build_id;
mod fields;
mod named;
mod sections;

use std::{fs::File, io, os::unix::fs::FileExt};

use object::elf;

pub use self::{fields::Fields, named::find_sections};
use crate::address::{FileOffset, VirtOffset};

/// Program headers beyond this number are an error: linkers write about a dozen.
const MAX_SEGMENTS: u16 = 4096;

const FILE_HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;

/// Why a file is not used as an ELF file.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// It could not be read, or is shorter than its headers say.
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("not an ELF file")]
    NotElf,
    /// Only x86-64 is supported.
    #[error("not a 64-bit x86 ELF file")]
    WrongMachine,
    /// It contradicts itself.
    #[error("malformed ELF file: {0}")]
    Malformed(&'static str),
}

/// A part of the file that is mapped into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it is in the file.
    pub file_offset: FileOffset,
    /// Where it is in memory, before relocation.
    pub address: VirtOffset,
    /// How long it is in the file.
    pub file_size: u64,
    /// Code can run in it.
    pub executable: bool,
}

/// Where a symbol table and its names are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolTable {
    /// First symbol.
    pub offset: FileOffset,
    /// Size in bytes, as the file has it: not verified.
    pub size: u64,
    /// First byte of the names.
    pub names_offset: FileOffset,
    /// Size of the names, as the file has it: not verified.
    pub names_size: u64,
}

/// A section of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Where it is in the file.
    pub file_offset: FileOffset,
    /// How long it is there: not verified.
    pub size: u64,
    /// Where it is in memory, before relocation.
    pub address: VirtOffset,
    /// It is compressed (`SHF_COMPRESSED`).
    pub compressed: bool,
}

/// What a section names another file for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// `.gnu_debuglink`: it has the debug information of this one.
    Debug,
    /// `.gnu_debugaltlink`: it has what the debug information of several files shares.
    Shared,
    /// `.debug_sup`: the same in DWARF 5.
    Supplementary,
}

/// The tables of an ELF file for x86-64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElfLayout {
    /// The `PT_LOAD` segments.
    pub segments: Vec<Segment>,
    /// `.dynsym` and `.symtab`, each if present.
    pub symbol_tables: Vec<SymbolTable>,
    /// `.eh_frame`, by the section headers.
    pub eh_frame: Option<Section>,
    /// `.eh_frame_hdr`, by the program headers.
    pub eh_frame_header: Option<Section>,
    /// `.gnu_debugdata`: a compressed ELF file with more symbols.
    pub gnu_debugdata: Option<Section>,
    /// `.debug_frame`.
    pub debug_frame: Option<Section>,
    /// Sections that name another file.
    pub links: Vec<(LinkKind, Section)>,
    /// The names of sections are where the header says: else any can be missing above.
    pub has_section_names: bool,
    /// `.debug_info`, which says that the file has its debug information itself.
    pub debug_info: Option<Section>,
    /// Position and size of what holds notes.
    notes: Vec<(u64, u64)>,
}

impl ElfLayout {
    /// Reads the headers of `file`.
    ///
    /// # Errors
    ///
    /// It is not an ELF file for x86-64, or its headers are out of bounds.
    pub fn read(file: &File) -> Result<Self, ElfError> {
        let mut header = [0; FILE_HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                ElfError::NotElf
            } else {
                error.into()
            }
        })?;
        let header = Fields(&header);
        match identify(&header) {
            None => return Err(ElfError::NotElf),
            Some(Class::Bits32 | Class::Other) => return Err(ElfError::WrongMachine),
            Some(Class::X86_64) => {}
        }
        let mut layout = Self::default();
        layout.read_segments(file, &header)?;
        layout.read_sections(file, &header)?;
        Ok(layout)
    }

    fn read_segments(&mut self, file: &File, header: &Fields<'_>) -> Result<(), ElfError> {
        let count = header.u16(56);
        if count > MAX_SEGMENTS {
            return Err(ElfError::Malformed("too many program headers"));
        }
        let stride = usize::from(header.u16(54));
        if count > 0 && stride != SEGMENT_BYTES {
            return Err(ElfError::Malformed("program headers of unknown size"));
        }
        let mut bytes = vec![0; usize::from(count) * SEGMENT_BYTES];
        file.read_exact_at(&mut bytes, header.u64(32))?;
        for segment in bytes.chunks_exact(SEGMENT_BYTES).map(Fields) {
            let (offset, file_size) = (segment.u64(8), segment.u64(32));
            if segment.u32(0) == elf::PT_LOAD.0 {
                self.segments.push(Segment {
                    file_offset: FileOffset(offset),
                    address: VirtOffset(segment.u64(16)),
                    file_size,
                    executable: segment.u32(4) & elf::PF_X.0 != 0,
                });
            } else if segment.u32(0) == elf::PT_GNU_EH_FRAME.0 {
                self.eh_frame_header = Some(Section {
                    file_offset: FileOffset(offset),
                    size: file_size,
                    address: VirtOffset(segment.u64(16)),
                    compressed: false,
                });
            } else if segment.u32(0) == elf::PT_NOTE.0 {
                self.notes.push((offset, file_size));
            }
        }
        Ok(())
    }

    /// Where the byte at `offset` of the file is in memory, before relocation, if it is in
    /// an executable segment.
    #[must_use]
    pub fn code_address(&self, offset: FileOffset) -> Option<VirtOffset> {
        self.segments
            .iter()
            .filter(|segment| segment.executable)
            .find_map(|segment| {
                let within = offset.0.checked_sub(segment.file_offset.0)?;
                (within < segment.file_size).then_some(())?;
                segment.address.0.checked_add(within).map(VirtOffset)
            })
    }

    /// Where the code at `address` is in the file; none if it is not in an
    /// executable segment's part of the file.
    #[must_use]
    pub fn code_offset(&self, address: VirtOffset) -> Option<FileOffset> {
        let (segment, within) = self.code_segment(address)?;
        segment.file_offset.0.checked_add(within).map(FileOffset)
    }

    /// How much code there is in the file from `address` on, as the file has it:
    /// not verified. 0 if there is none at `address`.
    #[must_use]
    pub fn code_bytes_from(&self, address: VirtOffset) -> u64 {
        self.code_segment(address)
            .map_or(0, |(segment, within)| segment.file_size - within)
    }

    /// The executable segment with `address`, and how far in that is.
    fn code_segment(&self, address: VirtOffset) -> Option<(&Segment, u64)> {
        self.segments
            .iter()
            .filter(|segment| segment.executable)
            .find_map(|segment| {
                let within = address.0.checked_sub(segment.address.0)?;
                (within < segment.file_size).then_some((segment, within))
            })
    }
}

/// What a program is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The one memprof supports.
    X86_64,
    /// 32-bit code, or 64-bit code with 32-bit pointers (x32).
    Bits32,
    /// Another machine, run by an emulator.
    Other,
}

/// What the program in `file` is built for; none if it is no ELF file.
///
/// # Errors
///
/// The file cannot be read.
pub fn class(file: &File) -> io::Result<Option<Class>> {
    let mut header = [0; 20];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => Ok(identify(&Fields(&header))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn identify(header: &Fields<'_>) -> Option<Class> {
    let [magic @ .., class, data] = header.array::<6>(0);
    (magic == elf::ELFMAG).then_some(())?;
    if class == elf::ELFCLASS32.0 {
        Some(Class::Bits32)
    } else if data == elf::ELFDATA2LSB.0 && header.u16(18) == elf::EM_X86_64.0 {
        Some(Class::X86_64)
    } else {
        Some(Class::Other)
    }
}

#[cfg(test)]
mod tests;
