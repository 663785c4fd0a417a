//! Whether a file is a program that needs no dynamic loader.

use std::{fs::File, os::unix::fs::FileExt as _};

use object::elf;

use crate::process::elf::{ElfError, Fields};

const FILE_HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const DYNAMIC_BYTES: usize = 16;
/// Linkers write about a dozen.
const MAX_SEGMENTS: u16 = 4096;
/// Linkers write some thirty entries.
const MAX_DYNAMIC_BYTES: usize = 64 << 10;

/// Whether `file` is a program, linked statically: at a fixed address, or at any
/// (`-static-pie`). Such a program's functions are called by itself alone, and linkers make
/// local symbols of what is hidden in a position-independent one.
///
/// A shared library has no loader either; the flag tells them apart, which linkers set
/// since binutils 2.26.
pub(super) fn is_standalone(file: &File) -> Result<bool, ElfError> {
    let mut header = [0; FILE_HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let header = Fields(&header);
    let kind = header.u16(16);
    let count = header.u16(56);
    if count > MAX_SEGMENTS || usize::from(header.u16(54)) != SEGMENT_BYTES {
        return Ok(false);
    }
    let mut segments = vec![0; usize::from(count) * SEGMENT_BYTES];
    file.read_exact_at(&mut segments, header.u64(32))?;
    let segments = || segments.chunks_exact(SEGMENT_BYTES).map(Fields);
    if segments().any(|segment| segment.u32(0) == elf::PT_INTERP.0) {
        return Ok(false);
    }
    if kind == elf::ET_EXEC.0 {
        return Ok(true);
    }
    let Some(dynamic) = segments().find(|segment| segment.u32(0) == elf::PT_DYNAMIC.0) else {
        return Ok(false);
    };
    let size = usize::try_from(dynamic.u64(32)).unwrap_or(usize::MAX);
    let mut entries = vec![0; size.min(MAX_DYNAMIC_BYTES)];
    // What cannot be read says nothing.
    if file.read_exact_at(&mut entries, dynamic.u64(8)).is_err() {
        return Ok(false);
    }
    let flags = entries
        .chunks_exact(DYNAMIC_BYTES)
        .map(Fields)
        .take_while(|entry| entry.u64(0) != elf::DT_NULL.0.cast_unsigned())
        .find(|entry| entry.u64(0) == elf::DT_FLAGS_1.0.cast_unsigned())
        .map_or(0, |entry| entry.u64(8));
    Ok(kind == elf::ET_DYN.0 && flags & elf::DF_1_PIE.0 != 0)
}
