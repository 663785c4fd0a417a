//! What memprof needs of an ELF file, read in small pieces.
//!
//! Mapped files are chosen by the traced program and can be of any size and
//! content, and can change while they are read: so nothing is mapped (a
//! truncation would be `SIGBUS`), no table is believed about its own length,
//! and no more is held than a few megabytes.

use std::{fs::File, io, os::unix::fs::FileExt};

use object::elf;

use crate::address::{FileOffset, VirtOffset};

/// Program headers beyond this number are an error: linkers write about a dozen.
const MAX_SEGMENTS: u16 = 4096;
/// Section headers beyond this number are an error.
const MAX_SECTIONS: u64 = 1 << 16;
/// Notes are read up to this size.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// No linker writes a build id longer than a SHA-512.
const MAX_BUILD_ID_BYTES: usize = 64;

const FILE_HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const SECTION_BYTES: usize = 64;

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

    /// Sections are not needed to run, and may be missing.
    fn read_sections(&mut self, file: &File, header: &Fields<'_>) -> Result<(), ElfError> {
        let start = header.u64(40);
        if start == 0 {
            return Ok(());
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

        let names = usize::from(header.u16(62));
        let names = bytes.chunks_exact(SECTION_BYTES).nth(names).map(Fields);
        let mut found = [None, None];
        for section in bytes.chunks_exact(SECTION_BYTES).map(Fields) {
            let kind = section.u32(4);
            if kind == elf::SHT_PROGBITS.0 || kind == elf::SHT_X86_64_UNWIND.0 {
                let name = names.and_then(|names| {
                    let mut name = [0; 15];
                    let at = names.u64(24).checked_add(u64::from(section.u32(0)))?;
                    // At the end of the file there may be fewer bytes.
                    let read = file.read_at(&mut name, at).ok()?;
                    name.get(..read)?
                        .split(|&byte| byte == 0)
                        .next()
                        .map(<[u8]>::to_vec)
                });
                let place = match name.as_deref() {
                    Some(b".eh_frame") => Some(&mut self.eh_frame),
                    Some(b".gnu_debugdata") => Some(&mut self.gnu_debugdata),
                    Some(b".debug_frame") => Some(&mut self.debug_frame),
                    _ => None,
                };
                if let Some(place) = place {
                    *place = Some(Section {
                        file_offset: FileOffset(section.u64(24)),
                        size: section.u64(32),
                        address: VirtOffset(section.u64(16)),
                        compressed: section.u64(8) & elf::SHF_COMPRESSED.0 != 0,
                    });
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
                .and_then(|link| bytes.chunks_exact(SECTION_BYTES).nth(link))
                .map(Fields);
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

/// Little-endian fields of a header. A field beyond its end is 0: callers hand
/// over whole headers.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0
            .get(at..)
            .and_then(<[u8]>::first_chunk)
            .copied()
            .unwrap_or([0; N])
    }

    /// The byte at `at`.
    #[must_use]
    pub fn u8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.array(at))
    }

    /// Two bytes from `at`.
    #[must_use]
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    /// Four bytes from `at`.
    #[must_use]
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// Eight bytes from `at`.
    #[must_use]
    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn own_exe() -> File {
        File::open("/proc/self/exe").unwrap()
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile();
        file.write_all(bytes).unwrap();
        file
    }

    fn tempfile() -> File {
        use std::os::unix::fs::OpenOptionsExt;
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(std::env::temp_dir())
            .unwrap()
    }

    /// Check that what is read of Debian's `/bin/true` or whatever it is here
    /// agrees with the object crate: build id and segments.
    #[test]
    fn agrees_with_object() {
        use object::read::{Object, ObjectSegment};
        for path in ["/bin/true", "/proc/self/exe"] {
            let file = File::open(path).unwrap();
            let layout = ElfLayout::read(&file).unwrap();
            let bytes = std::fs::read(path).unwrap();
            let object = object::File::parse(&*bytes).unwrap();
            let expected = object.build_id().unwrap().map(<[u8]>::to_vec);
            assert_eq!(layout.build_id(&file), expected, "{path}");
            let segments: Vec<_> = object
                .segments()
                .map(|segment| (segment.address(), segment.file_range().0))
                .collect();
            let ours: Vec<_> = layout
                .segments
                .iter()
                .map(|segment| (segment.address.0, segment.file_offset.0))
                .collect();
            assert_eq!(ours, segments, "{path}");
        }
    }

    /// Check that this function's address comes back as an offset at which the
    /// file holds this function's code.
    #[test]
    fn code_offset_finds_code() {
        let layout = ElfLayout::read(&own_exe()).unwrap();
        let text = layout.segments.iter().find(|s| s.executable).unwrap();
        let last = VirtOffset(text.address.0 + text.file_size - 1);
        assert_eq!(
            layout.code_offset(text.address),
            Some(text.file_offset),
            "first byte"
        );
        assert!(layout.code_offset(last).is_some());
        assert_eq!(layout.code_bytes_from(text.address), text.file_size);
        assert_eq!(layout.code_bytes_from(last), 1);
        assert_eq!(layout.code_bytes_from(VirtOffset(u64::MAX)), 0);
        assert_eq!(layout.code_offset(VirtOffset(u64::MAX)), None);
        let data = layout.segments.iter().find(|s| !s.executable).unwrap();
        assert_eq!(layout.code_offset(data.address), None);
    }

    /// Check that no file panics or takes long: empty, text, every truncation of
    /// a header, and a real file with each byte of its headers set to each of
    /// some bad values.
    #[test]
    fn hostile_files() {
        let mut good = std::fs::read("/bin/true").unwrap();
        good.truncate(8 << 10);
        assert!(matches!(
            ElfLayout::read(&file_of(b"")),
            Err(ElfError::NotElf)
        ));
        assert!(matches!(
            ElfLayout::read(&file_of(&[b'x'; 100])),
            Err(ElfError::NotElf)
        ));
        for length in 0..200 {
            assert!(ElfLayout::read(&file_of(&good[..length])).is_err());
        }
        // Without its section headers the rest of the file must do.
        good[40..48].fill(0);
        let file = file_of(&good);
        assert!(ElfLayout::read(&file).unwrap().build_id(&file).is_some());
        for at in 0..64 + 56 * 14 {
            for bad in [0x00, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = bad;
                let file = file_of(&bytes);
                if let Ok(layout) = ElfLayout::read(&file) {
                    let _ = layout.build_id(&file);
                    let _ = layout.code_offset(VirtOffset(0x2000));
                }
            }
        }
    }

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
