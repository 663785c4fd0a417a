//! Sections by their names.

use std::{fs::File, os::unix::fs::FileExt as _};

use super::{ElfError, FILE_HEADER_BYTES, Fields, Section, sections};

/// The first section of each of `names`, each if there is one.
///
/// # Errors
///
/// The headers cannot be read.
pub fn find_sections<const N: usize>(
    file: &File,
    names: [&[u8]; N],
) -> Result<[Option<Section>; N], ElfError> {
    let mut header = [0; FILE_HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let header = Fields(&header);
    let mut found = [None; N];
    let Some(bytes) = sections::read_headers(file, &header)? else {
        return Ok(found);
    };
    let sections = || sections::each(&bytes);
    let Some(table) = sections().nth(usize::from(header.u16(62))) else {
        return Ok(found);
    };
    let longest = names.iter().map(|name| name.len()).max().unwrap_or(0);
    let mut text = vec![0; longest + 1];
    for section in sections() {
        let at = table.u64(24).saturating_add(u64::from(section.u32(0)));
        // At the end of the file there may be fewer bytes.
        let Ok(read) = file.read_at(&mut text, at) else {
            continue;
        };
        let text = text.get(..read).unwrap_or_default();
        let name = text.split(|&byte| byte == 0).next().unwrap_or_default();
        for (found, wanted) in found.iter_mut().zip(names) {
            if found.is_none() && name == wanted {
                *found = Some(sections::place(&section));
            }
        }
    }
    Ok(found)
}
