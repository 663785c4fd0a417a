//! Memory that the kernel writes records into.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

/// Bytes of each CPU's buffer. A record is some 120 bytes, so this holds the
/// libraries of some 2,000 processes that start between two drains.
pub const BUFFER_BYTES: usize = 256 << 10;

/// Places in `struct perf_event_mmap_page` (include/uapi/linux/perf_event.h).
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

/// One CPU's buffer: a page of control, then `BUFFER_BYTES` of records.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) fd: OwnedFd,
    control: NonNull<u8>,
    page_bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only
// reached through this value; `take` is the only reader and `&mut MmapEvents` is
// needed to call it.
unsafe impl Send for Buffer {}

impl Buffer {
    pub(super) fn map(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: sysconf has no preconditions.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page_bytes = usize::try_from(page_bytes).map_err(io::Error::other)?;
        // SAFETY: a new mapping at a place of the kernel's choice touches no
        // memory in use.
        let control = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                page_bytes + BUFFER_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if control == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let control = NonNull::new(control.cast::<u8>())
            .ok_or_else(|| io::Error::other("mmap gave a null pointer"))?;
        Ok(Self {
            fd,
            control,
            page_bytes,
        })
    }

    fn position(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `at` is `DATA_HEAD` or `DATA_TAIL`, a multiple of 8 within the
        // first, page-aligned page of the mapping, which lives as long as
        // `self`; the kernel and this process only access it atomically.
        unsafe { AtomicU64::from_ptr(self.control.as_ptr().add(at).cast()) }
    }

    /// Moves all that was recorded into `bytes`, and gives the room back. False
    /// if the kernel claims to have recorded more than there is room for.
    pub(super) fn take(&self, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        // Acquire: pairs with the kernel's barrier before it publishes the head
        // (kernel/events/ring_buffer.c, `perf_output_put_handle`), so that the
        // records before it are visible.
        let head = self.position(DATA_HEAD).load(Ordering::Acquire);
        // Only this side writes the tail.
        let tail = self.position(DATA_TAIL).load(Ordering::Relaxed);
        // Both count bytes for ever; the buffer's size is a power of two.
        let length = usize::try_from(head.wrapping_sub(tail)).unwrap_or(usize::MAX);
        if (1..=BUFFER_BYTES).contains(&length) {
            let from = (tail % BUFFER_BYTES as u64) as usize;
            let first = length.min(BUFFER_BYTES - from);
            bytes.reserve(length);
            // SAFETY: `from + first` and `length - first` are at most
            // `BUFFER_BYTES`, the length of the data that follows the control
            // page, so both sources are within the mapping; `bytes` has room for
            // `first + (length - first)`. The kernel does not write between tail
            // and head until the tail is moved, below.
            unsafe {
                let data = self.control.as_ptr().add(self.page_bytes);
                let to = bytes.as_mut_ptr();
                to.copy_from_nonoverlapping(data.add(from), first);
                to.add(first).copy_from_nonoverlapping(data, length - first);
                bytes.set_len(length);
            }
        }
        // Release: the copy is complete before the kernel may overwrite it.
        self.position(DATA_TAIL).store(head, Ordering::Release);
        length <= BUFFER_BYTES
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and no reference into it
        // outlives `self`.
        unsafe {
            libc::munmap(self.control.as_ptr().cast(), self.page_bytes + BUFFER_BYTES);
        }
    }
}
