//! BPF arrays that are mapped here (`BPF_F_MMAPABLE`, Linux 5.5): BPF and the daemon
//! read and write the same memory.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64},
};

use aya::maps::{MapData, MapError};

/// A word that is accessed atomically, since BPF may do so at the same time.
///
/// # Safety
///
/// Every bit pattern is one, and a shared reference is all that an access needs.
pub(super) unsafe trait Word {}

// SAFETY: integers.
unsafe impl Word for AtomicU32 {}
// SAFETY: integers.
unsafe impl Word for AtomicU64 {}

/// The words of a BPF array.
#[derive(Debug)]
pub(super) struct MappedArray<W> {
    words: NonNull<W>,
    len: usize,
    _words: PhantomData<[W]>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and what is in it is only
// accessed atomically.
unsafe impl<W: Word> Send for MappedArray<W> {}

impl<W: Word> MappedArray<W> {
    /// Maps all values of an array, which are `len` words.
    ///
    /// # Errors
    ///
    /// If it is of another size, or cannot be mapped.
    pub(super) fn new(map: &MapData, len: usize) -> Result<Self, MapError> {
        let bytes = len * size_of::<W>();
        let info = map.info()?;
        // A value takes whole words of 8 bytes (kernel/bpf/arraymap.c).
        let value_size = (info.value_size() as usize).next_multiple_of(8);
        let size = value_size * info.max_entries() as usize;
        if size != bytes {
            return Err(MapError::InvalidValueSize {
                size,
                expected: bytes,
            });
        }
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory in
        // use; it stays when the descriptor is closed.
        let words = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if words == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let words = NonNull::new(words.cast())
            .ok_or_else(|| io::Error::other("mmap gave a null pointer"))?;
        Ok(Self {
            words,
            len,
            _words: PhantomData,
        })
    }

    /// The words.
    pub(super) fn words(&self) -> &[W] {
        // SAFETY: the mapping is of this length and page-aligned, and lives as long as
        // `self`; what else writes to it does so atomically, as `W` allows.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len) }
    }
}

impl<W> Drop for MappedArray<W> {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody has a reference any more.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.len * size_of::<W>()) };
    }
}
