//! The part of a target's data that it shares with the daemon, as the daemon sees it.
//!
//! The target may write anything there, at any time. So each word is read once and by
//! itself, and nothing that is read here is taken for a place or a length.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsRawFd as _, OwnedFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use memprof_common::prefilter::SHARD_BYTES;
use rustix::fs::{
    FallocateFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, fcntl_get_seals, seek,
};

use super::layout::Geometry;

/// The mapped memory, and the file that it is of.
#[derive(Debug)]
pub(super) struct Shared {
    words: NonNull<AtomicU64>,
    geometry: Geometry,
    file: OwnedFd,
    /// Where in the file.
    offset: u64,
}

// SAFETY: the mapping belongs to the process, not to a thread, and what is in it is only
// accessed atomically.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps it from `offset` of `memfd` on, which is of that length already.
    ///
    /// # Errors
    ///
    /// If the file is too short, if it could be made so later (then each access here would
    /// be one to memory that is not there), or if it cannot be mapped.
    pub(super) fn new(memfd: &File, offset: u64, geometry: Geometry) -> io::Result<Self> {
        let file = OwnedFd::from(memfd.try_clone()?);
        if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            fcntl_add_seals(&file, SealFlags::SHRINK)?;
        }
        let bytes = geometry.shared_bytes();
        let end = offset.checked_add(bytes as u64);
        if end.is_none_or(|end| memfd.metadata().map_or(0, |data| data.len()) < end) {
            return Err(io::Error::other("the file in memory is too short"));
        }
        let place = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory in use;
        // it stays when the descriptor is closed.
        let words = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                place,
            )
        };
        if words == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(words.cast())
            .ok_or_else(|| io::Error::other("mmap gave a null pointer"))?;
        Ok(Self {
            words,
            geometry,
            file,
            offset,
        })
    }

    pub(super) const fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is of this length and page-aligned, lives as long as `self`,
        // and the file cannot become shorter; what else writes to it does so in whole words.
        unsafe {
            std::slice::from_raw_parts(
                self.words.as_ptr(),
                self.geometry.shared_bytes() / size_of::<u64>(),
            )
        }
    }

    /// The words of a range of bytes that begins and ends with words.
    fn range(&self, bytes: Range<usize>) -> &[AtomicU64] {
        self.words()
            .get(bytes.start / size_of::<u64>()..bytes.end / size_of::<u64>())
            .unwrap_or_default()
    }

    pub(super) fn word(&self, offset: usize) -> Option<&AtomicU64> {
        self.words().get(offset / size_of::<u64>())
    }

    /// The word at a place of the layout.
    pub(super) fn load(&self, offset: usize) -> u64 {
        self.word(offset)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Writes the word at a place of the layout, after all that was written before.
    pub(super) fn store(&self, offset: usize, value: u64) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Release);
        }
    }

    /// Writes a word unless it has changed since it was `old`.
    pub(super) fn replace(&self, offset: usize, old: u64, new: u64) {
        if let Some(word) = self.word(offset) {
            // It has: then whoever did so is served by the next look.
            let _ = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// The parts of a range that have ever been written to. Where nobody has, a look would
    /// make the kernel find memory for it.
    fn used(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut used = Vec::new();
        let in_file = |at: usize| self.offset + at as u64;
        let (mut at, end) = (in_file(range.start), in_file(range.end));
        while at < end {
            // None of either (ENXIO): there is no more.
            let Ok(data) = seek(&self.file, SeekFrom::Data(at)) else {
                break;
            };
            let Ok(hole) = seek(&self.file, SeekFrom::Hole(data)) else {
                break;
            };
            if data >= end || hole <= data {
                break;
            }
            let within = |place: u64| usize::try_from(place - self.offset).unwrap_or(range.end);
            used.push(within(data)..within(hole.min(end)));
            at = hole;
        }
        used
    }

    /// Places of the shards that threads have used, and of some beside them.
    pub(super) fn used_shards(&self) -> impl Iterator<Item = usize> + use<> {
        let first = self.geometry.shards_offset();
        self.used(first..self.geometry.shared_bytes())
            .into_iter()
            .flat_map(move |range| {
                // A page holds whole shards, and the first begins with a page.
                let begin = range.start - (range.start - first) % SHARD_BYTES;
                (begin..range.end).step_by(SHARD_BYTES)
            })
    }

    /// How many entries the sampled set has, and how many of its buckets have ever been
    /// full, by its occupancy bytes.
    pub(super) fn occupancy(&self) -> impl Iterator<Item = u8> {
        let range = self.geometry.occupancy_offset()..self.geometry.buckets_offset();
        self.used(range)
            .into_iter()
            .flat_map(|range| self.range(range))
            .map(|word| word.load(Ordering::Relaxed))
            .filter(|&word| word != 0)
            .flat_map(u64::to_le_bytes)
    }

    /// Makes the sampled set empty, and gives its memory back. Not while threads of the
    /// target run.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    pub(super) fn clear_sampled_set(&self) -> io::Result<()> {
        let begin = self.geometry.occupancy_offset();
        let bytes = self.geometry.shards_offset() - begin;
        fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            self.offset + begin as u64,
            bytes as u64,
        )?;
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody has a reference any more.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.geometry.shared_bytes()) };
    }
}
