//! This process's own heap.

/// Gives memory back to the kernel that was freed and is kept for what may be allocated next.
///
/// glibc does so by itself at the end of its main heap only, and not in the heaps that it has
/// for threads.
pub fn give_back_free() {
    #[cfg(target_env = "gnu")]
    // SAFETY: any thread may call it at any time; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
