//! For tests of the unwinder: writes what walks saw to a file.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    mem::offset_of,
    path::Path,
};

use aya::maps::{MapData, RingBuf};
use memprof_common::stack_copy::StackCopy;

/// The file, and the ring that BPF sends copies through.
pub(super) struct StackCopies {
    ring: RingBuf<MapData>,
    file: BufWriter<File>,
}

impl StackCopies {
    pub(super) fn create(path: &Path, ring: RingBuf<MapData>) -> io::Result<Self> {
        Ok(Self {
            ring,
            file: BufWriter::new(File::create(path)?),
        })
    }

    /// Writes what has come since the last time, each without what is not in use of it.
    pub(super) fn write(&mut self) -> io::Result<()> {
        let mut is_any = false;
        while let Some(record) = self.ring.next() {
            is_any = true;
            let malformed = || io::Error::other("a copy of a stack is too short");
            let field = |at: usize| {
                let bytes = record.get(at..)?.first_chunk()?;
                usize::try_from(u32::from_ne_bytes(*bytes)).ok()
            };
            let depth = field(offset_of!(StackCopy, depth)).ok_or_else(malformed)?;
            let copied = field(offset_of!(StackCopy, copy_bytes)).ok_or_else(malformed)?;
            let frames = offset_of!(StackCopy, frames);
            let lengths = offset_of!(StackCopy, copy_bytes);
            for part in [
                0..frames.saturating_add(depth.saturating_mul(8)),
                lengths..offset_of!(StackCopy, copy).saturating_add(copied),
            ] {
                self.file
                    .write_all(record.get(part).ok_or_else(malformed)?)?;
            }
        }
        if is_any {
            self.file.flush()?;
        }
        Ok(())
    }
}
