//! Section headers.

use std::{fs::File, os::unix::fs::FileExt as _};

use object::elf;

use super::{ElfError, ElfLayout, Fields, LinkKind, Section, SymbolTable};
use crate::address::{FileOffset, VirtOffset};

/// Section headers beyond this number are an error.
const MAX_SECTIONS: u64 = 1 << 16;

const SECTION_BYTES: usize = 64;

impl ElfLayout {
    /// Sections are not needed to run, and may be missing.
    pub(super) fn read_sections(
        &mut self,
        file: &File,
        header: &Fields<'_>,
    ) -> Result<(), ElfError> {
        let Some(bytes) = read_headers(file, header)? else {
            return Ok(());
        };
        let names = usize::from(header.u16(62));
        let names = each(&bytes).nth(names);
        self.has_section_names = names.is_some();
        let mut found = [None, None];
        for section in each(&bytes) {
            let kind = section.u32(4);
            let name = names.and_then(|names| section_name(file, &names, &section));
            let link = match name.as_deref() {
                Some(b".gnu_debuglink") => Some(LinkKind::Debug),
                Some(b".gnu_debugaltlink") => Some(LinkKind::Shared),
                Some(b".debug_sup") => Some(LinkKind::Supplementary),
                _ => None,
            };
            if let Some(link) = link {
                self.links.push((link, place(&section)));
            }
            if kind == elf::SHT_PROGBITS.0 || kind == elf::SHT_X86_64_UNWIND.0 {
                let known = match name.as_deref() {
                    Some(b".eh_frame") => Some(&mut self.eh_frame),
                    Some(b".gnu_debugdata") => Some(&mut self.gnu_debugdata),
                    Some(b".debug_frame") => Some(&mut self.debug_frame),
                    // Compressed as it was done before `SHF_COMPRESSED`.
                    Some(b".debug_info" | b".zdebug_info") => Some(&mut self.debug_info),
                    _ => None,
                };
                if let Some(known) = known {
                    *known = Some(place(&section));
                }
            }
            if kind == elf::SHT_NOTE.0 {
                self.notes.push((section.u64(24), section.u64(32)));
            }
            let slot = match kind {
                kind if kind == elf::SHT_DYNSYM.0 => 0,
                kind if kind == elf::SHT_SYMTAB.0 => 1,
                _ => continue,
            };
            let names = usize::try_from(section.u32(40))
                .ok()
                .and_then(|link| each(&bytes).nth(link));
            if let (Some(slot), Some(names)) = (found.get_mut(slot), names) {
                *slot = Some(SymbolTable {
                    offset: FileOffset(section.u64(24)),
                    size: section.u64(32),
                    names_offset: FileOffset(names.u64(24)),
                    names_size: names.u64(32),
                });
            }
        }
        self.symbol_tables.extend(found.into_iter().flatten());
        Ok(())
    }
}

/// The section headers of a file, if it has any.
pub(super) fn read_headers(file: &File, header: &Fields<'_>) -> Result<Option<Vec<u8>>, ElfError> {
    let start = header.u64(40);
    if start == 0 {
        return Ok(None);
    }
    if usize::from(header.u16(58)) != SECTION_BYTES {
        return Err(ElfError::Malformed("section headers of unknown size"));
    }
    let mut count = u64::from(header.u16(60));
    if count == 0 {
        // More than 65,279: the first section's size says how many.
        let mut first = [0; SECTION_BYTES];
        file.read_exact_at(&mut first, start)?;
        count = Fields(&first).u64(32);
    }
    if count > MAX_SECTIONS {
        return Err(ElfError::Malformed("too many section headers"));
    }
    let bytes = usize::try_from(count).unwrap_or(0) * SECTION_BYTES;
    let mut bytes = vec![0; bytes];
    file.read_exact_at(&mut bytes, start)?;
    Ok(Some(bytes))
}

/// Each header by itself.
pub(super) fn each(bytes: &[u8]) -> impl Iterator<Item = Fields<'_>> {
    bytes.chunks_exact(SECTION_BYTES).map(Fields)
}

/// The name of a section, of which the longest that is looked for are whole.
fn section_name(file: &File, names: &Fields<'_>, section: &Fields<'_>) -> Option<Vec<u8>> {
    let mut name = [0; 18];
    let at = names.u64(24).checked_add(u64::from(section.u32(0)))?;
    // At the end of the file there may be fewer bytes.
    let read = file.read_at(&mut name, at).ok()?;
    name.get(..read)?
        .split(|&byte| byte == 0)
        .next()
        .map(<[u8]>::to_vec)
}

pub(super) fn place(section: &Fields<'_>) -> Section {
    Section {
        file_offset: FileOffset(section.u64(24)),
        size: section.u64(32),
        address: VirtOffset(section.u64(16)),
        compressed: section.u64(8) & elf::SHF_COMPRESSED.0 != 0,
    }
}
