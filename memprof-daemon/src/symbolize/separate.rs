//! Debug information and symbols that a file has elsewhere: in a debug file of its own, and
//! in `.gnu_debugdata` (MiniDebugInfo), a compressed ELF file within the file.
//!
//! Both keep the addresses of the file that they are for, not its places.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    os::fd::AsRawFd as _,
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

use lzma_rust2::XzReader;

use super::names::Source;
use crate::process::{debug_info::leads_nowhere_else, elf::ElfLayout};

/// Larger than that of any program there is, compressed and not.
const MAX_COMPRESSED: u64 = 64 << 20;
const MAX_PLAIN: u64 = 256 << 20;
/// What the decompressor may take: `xz -9` needs 65 MiB.
const MAX_MEMORY_KIB: u32 = 128 << 10;

/// A file with symbols for another.
#[derive(Debug)]
pub(super) struct Separate {
    /// It has debug information that may be read, not just symbols.
    pub(super) has_lines: bool,
    file: File,
}

impl Separate {
    /// The path that leads to it for as long as this lives.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// What the file of `source`, of which `open` and `layout` are, has elsewhere; the best
/// first.
pub(super) fn find(source: &Source, open: &File, layout: &ElfLayout) -> Vec<Separate> {
    let debug_file = source
        .debug_file()
        .and_then(|file| file.try_clone().ok())
        .map(|file| {
            let layout = ElfLayout::read(&file).unwrap_or_default();
            Separate {
                has_lines: leads_nowhere_else(&file, &layout),
                file,
            }
        });
    let mini = match read_mini(open, layout) {
        Ok(file) => file.map(|file| Separate {
            has_lines: false,
            file,
        }),
        Err(error) => {
            tracing::debug!(path = %source.file.path.display(), %error, "no use of .gnu_debugdata");
            None
        }
    };
    debug_file.into_iter().chain(mini).collect()
}

fn read_mini(open: &File, layout: &ElfLayout) -> io::Result<Option<File>> {
    let Some(section) = layout.gnu_debugdata else {
        return Ok(None);
    };
    if section.size > MAX_COMPRESSED {
        return Err(io::Error::other("it is larger than 64 MiB"));
    }
    let mut bytes = vec![0; usize::try_from(section.size).unwrap_or(0)];
    open.read_exact_at(&mut bytes, section.file_offset.0)?;
    let reader = XzReader::new_mem_limit(bytes.as_slice(), false, MAX_MEMORY_KIB);
    let mut plain = Vec::new();
    let read = reader.take(MAX_PLAIN + 1).read_to_end(&mut plain)?;
    if read as u64 > MAX_PLAIN {
        return Err(io::Error::other("it is larger than 256 MiB"));
    }
    let memory = nix::sys::memfd::memfd_create(
        c"memprof-debugdata",
        nix::sys::memfd::MFdFlags::MFD_CLOEXEC,
    )?;
    let mut file = File::from(memory);
    file.write_all(&plain)?;
    file.rewind()?;
    Ok(Some(file))
}
