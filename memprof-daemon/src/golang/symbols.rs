//! Addresses of variables by their symbols.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt as _};

use crate::process::elf::{ElfLayout, Fields, SymbolTable};

/// Of a symbol table and of its names, what lies beyond is not read.
const MAX_TABLE_BYTES: u64 = 1 << 30;
/// Files are read in pieces of this size.
const CHUNK_BYTES: usize = 256 << 10;
const SYMBOL_BYTES: usize = 24;
/// A hostile file can have the same name over and over.
const MAX_MATCHES: usize = 64;

/// The addresses, in the file's terms, of the symbols of those names; each if there is one.
///
/// # Errors
///
/// The file cannot be read.
pub(super) fn find<const N: usize>(
    file: &File,
    layout: &ElfLayout,
    names: [&str; N],
) -> io::Result<[Option<u64>; N]> {
    let mut found = [None; N];
    for table in &layout.symbol_tables {
        let places = find_names(file, table, &names)?;
        if places.is_empty() {
            continue;
        }
        let piece = CHUNK_BYTES / SYMBOL_BYTES * SYMBOL_BYTES;
        for_each_chunk(file, table.offset.0, table.size, piece, |chunk| {
            for symbol in chunk.chunks_exact(SYMBOL_BYTES).map(Fields) {
                let (section, value) = (symbol.u16(6), symbol.u64(8));
                if let Some(&name) = places.get(&symbol.u32(0))
                    && section != object::elf::SHN_UNDEF.0
                    && value != 0
                    && let Some(found) = found.get_mut(name)
                {
                    *found = Some(value);
                }
            }
        })?;
    }
    Ok(found)
}

/// Where in the names of a table each of `wanted` stands by itself: Go's linker lets no name
/// end another.
fn find_names(
    file: &File,
    table: &SymbolTable,
    wanted: &[&str],
) -> io::Result<HashMap<u32, usize>> {
    let longest = wanted.iter().map(|name| name.len()).max().unwrap_or(0);
    let mut found = HashMap::new();
    let mut window: Vec<u8> = Vec::new();
    let mut window_start = 0_u64;
    for_each_chunk(
        file,
        table.names_offset.0,
        table.names_size,
        CHUNK_BYTES,
        |chunk| {
            window.extend_from_slice(chunk);
            let mut start = 0;
            while let Some(len) = window
                .get(start..)
                .and_then(|rest| rest.iter().position(|&byte| byte == 0))
            {
                let name = window.get(start..start + len).unwrap_or_default();
                let place = wanted.iter().position(|wanted| wanted.as_bytes() == name);
                if let Some(place) = place
                    && found.len() < MAX_MATCHES
                    && let Ok(at) = u32::try_from(window_start + start as u64)
                {
                    found.insert(at, place);
                }
                start += len + 1;
            }
            // The last name may go on in the next chunk; of one that is too long, its end is
            // enough to know that it is none of them.
            let kept = window.len().saturating_sub(longest + 2).max(start);
            window.drain(..kept.min(window.len()));
            window_start += kept as u64;
        },
    )?;
    Ok(found)
}

fn for_each_chunk(
    file: &File,
    start: u64,
    size: u64,
    chunk_bytes: usize,
    mut on_chunk: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut buffer = vec![0; chunk_bytes];
    let mut at = start;
    let mut left = size.min(MAX_TABLE_BYTES);
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(chunk_bytes);
        let Some(chunk) = buffer.get_mut(..wanted) else {
            break;
        };
        file.read_exact_at(chunk, at)?;
        on_chunk(chunk);
        at = at.saturating_add(wanted as u64);
        left -= wanted as u64;
    }
    Ok(())
}
