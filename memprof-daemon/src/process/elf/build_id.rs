//! The GNU build id: what linkers write into a file to name its content.

use std::{fs::File, os::unix::fs::FileExt as _};

use object::elf;

use super::{ElfLayout, Fields};

/// Notes are read up to this size.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// No linker writes a build id longer than a SHA-512.
const MAX_BUILD_ID_BYTES: usize = 64;

impl ElfLayout {
    /// The GNU build id of `file`, which this is the layout of.
    #[must_use]
    pub fn build_id(&self, file: &File) -> Option<Vec<u8>> {
        // A file has a handful; a hostile one can name the same many times.
        self.notes.iter().take(64).find_map(|&(offset, size)| {
            let size = usize::try_from(size.min(MAX_NOTE_BYTES)).ok()?;
            let mut notes = vec![0; size];
            file.read_exact_at(&mut notes, offset).ok()?;
            // Notes are aligned to 4 or, where `.note.gnu.property` shares
            // their segment, to 8; a build id's own size is a multiple of 4.
            find_build_id(&notes, 4).or_else(|| find_build_id(&notes, 8))
        })
    }
}

fn find_build_id(mut notes: &[u8], align: usize) -> Option<Vec<u8>> {
    loop {
        let header = Fields(notes.get(..12)?);
        let name_size = usize::try_from(header.u32(0)).ok()?;
        let size = usize::try_from(header.u32(4)).ok()?;
        let kind = header.u32(8);
        let rest = notes.get(12..)?;
        let name = rest.get(..name_size)?;
        let descriptor_start = (12 + name_size).checked_next_multiple_of(align)?;
        let end = descriptor_start.checked_add(size)?;
        let descriptor = notes.get(descriptor_start..end)?;
        if kind == elf::NT_GNU_BUILD_ID.0 && name == b"GNU\0" {
            return (1..=MAX_BUILD_ID_BYTES)
                .contains(&size)
                .then(|| descriptor.to_vec());
        }
        notes = notes.get(end.checked_next_multiple_of(align)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that build ids of impossible length, and notes that end early, are
    /// none.
    #[test]
    fn hostile_notes() {
        let note = |size: u32, length: usize| {
            let mut note = Vec::new();
            note.extend(4_u32.to_le_bytes());
            note.extend(size.to_le_bytes());
            note.extend(elf::NT_GNU_BUILD_ID.0.to_le_bytes());
            note.extend(b"GNU\0");
            note.extend(std::iter::repeat_n(7, length));
            note
        };
        assert_eq!(find_build_id(&note(20, 20), 4), Some(vec![7; 20]));
        assert_eq!(find_build_id(&note(21, 20), 4), None);
        assert_eq!(find_build_id(&note(0, 0), 4), None);
        assert_eq!(find_build_id(&note(1000, 1000), 4), None);
        assert_eq!(find_build_id(&note(u32::MAX, 20), 4), None);
        for length in 0..36 {
            assert_eq!(find_build_id(&note(20, 20)[..length], 4), None);
        }
    }
}
