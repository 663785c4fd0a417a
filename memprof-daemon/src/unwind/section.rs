//! Finds and reads the section with the unwind information.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::FileExt as _,
};

use flate2::read::ZlibDecoder;
use gimli::{BaseAddresses, EhFrameHdr, LittleEndian};

use super::CompileError;
use crate::process::elf::{ElfLayout, Fields, Section};

/// Larger than that of any program there is.
const MAX_BYTES: u64 = 256 << 20;
/// A header names the section in its first bytes.
const HEADER_BYTES: u64 = 64;

/// Unwind information as bytes.
#[derive(Debug)]
pub(super) struct Bytes {
    pub(super) bytes: Vec<u8>,
    /// Where the bytes are in memory, before relocation: addresses count from there.
    pub(super) address: u64,
    pub(super) kind: Kind,
}

/// The two encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    EhFrame,
    DebugFrame,
}

/// Finds `.eh_frame`, or `.debug_frame` where only that is.
fn find(file: &File, layout: &ElfLayout) -> Result<(Section, Kind), CompileError> {
    let eh_frame = layout
        .eh_frame
        .or_else(|| by_header(file, layout).ok().flatten())
        // An empty one is a word that ends it.
        .filter(|section| section.size > 4);
    match (eh_frame, layout.debug_frame) {
        (Some(section), _) => Ok((section, Kind::EhFrame)),
        (None, Some(section)) => Ok((section, Kind::DebugFrame)),
        (None, None) => Err(CompileError::NoUnwindInfo),
    }
}

/// How many bytes of the file it has.
pub(super) fn size(file: &File, layout: &ElfLayout) -> Result<u64, CompileError> {
    find(file, layout).map(|(section, _)| section.size)
}

/// Reads it.
pub(super) fn read(file: &File, layout: &ElfLayout) -> Result<Bytes, CompileError> {
    let (section, kind) = find(file, layout)?;
    let bytes = if section.compressed {
        decompress(&bytes_of(file, &section)?)?
    } else {
        bytes_of(file, &section)?
    };
    Ok(Bytes {
        bytes,
        address: section.address.0,
        kind,
    })
}

/// Without section headers: the program headers name a header, which names the section.
/// Where it ends is not told; it ends itself, and with its segment.
fn by_header(file: &File, layout: &ElfLayout) -> Result<Option<Section>, CompileError> {
    let Some(mut header) = layout.eh_frame_header else {
        return Ok(None);
    };
    header.size = header.size.min(HEADER_BYTES);
    let bytes = bytes_of(file, &header)?;
    let bases = BaseAddresses::default().set_eh_frame_hdr(header.address.0);
    let parsed = EhFrameHdr::new(&bytes, LittleEndian).parse(&bases, 8)?;
    let gimli::Pointer::Direct(address) = parsed.eh_frame_ptr() else {
        return Ok(None);
    };
    Ok(layout.segments.iter().find_map(|segment| {
        let within = address.checked_sub(segment.address.0)?;
        let size = segment.file_size.checked_sub(within)?;
        Some(Section {
            file_offset: crate::address::FileOffset(segment.file_offset.0.checked_add(within)?),
            size,
            address: crate::address::VirtOffset(address),
            compressed: false,
        })
    }))
}

fn bytes_of(file: &File, section: &Section) -> Result<Vec<u8>, CompileError> {
    if section.size > MAX_BYTES {
        return Err(CompileError::TooMuch("its section is larger than 256 MiB"));
    }
    // What a sparse or short file does not have is not made room for.
    let length = file.metadata()?.len();
    if section
        .file_offset
        .0
        .checked_add(section.size)
        .is_none_or(|end| end > length)
    {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let mut bytes = vec![0; usize::try_from(section.size).unwrap_or(0)];
    file.read_exact_at(&mut bytes, section.file_offset.0)?;
    Ok(bytes)
}

/// `Elf64_Chdr` and what it announces.
fn decompress(bytes: &[u8]) -> Result<Vec<u8>, CompileError> {
    const HEADER: usize = 24;
    let header = Fields(bytes.get(..HEADER).unwrap_or_default());
    if header.u32(0) != object::elf::ELFCOMPRESS_ZLIB.0 {
        return Err(ElfErrorKind.into());
    }
    if header.u64(8) > MAX_BYTES {
        return Err(CompileError::TooMuch("its section is larger than 256 MiB"));
    }
    let mut plain = Vec::new();
    ZlibDecoder::new(bytes.get(HEADER..).unwrap_or_default())
        .take(header.u64(8))
        .read_to_end(&mut plain)?;
    Ok(plain)
}

/// Compressed in a way that is not known here.
struct ElfErrorKind;

impl From<ElfErrorKind> for CompileError {
    fn from(_: ElfErrorKind) -> Self {
        crate::process::elf::ElfError::Malformed("a section that is compressed in an unknown way")
            .into()
    }
}
