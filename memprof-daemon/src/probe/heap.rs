//! memprof's own heap.
//!
//! What a job takes for a moment, such as megabytes for the unwind table of a large library,
//! is to be the system's again when it is done. glibc gives a large block a mapping of its
//! own, which goes with it, but moves the limit: once a block of 20 MiB has been freed, only
//! larger ones are mapped (`M_MMAP_THRESHOLD` in mallopt(3), up to 32 MiB). From then on such
//! blocks lie in the heaps of its arenas, eight a processor, one for each thread at work; and
//! a heap keeps what is free at its end as long as it is less than twice that limit. So tens
//! of megabytes stay with each thread that ever was busy.
//!
//! Small blocks that are freed leave holes between others, which glibc keeps until it is asked.

/// From so many bytes on a block has a mapping of its own: where glibc's limit is at first.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Has large blocks given back when they are freed. To be called before there are threads.
pub fn give_back_large() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes numbers only, and no other thread allocates meanwhile. A limit that is
        // set does not move any more, nor does that of what a heap keeps (malloc/malloc.c,
        // `do_set_mmap_threshold`). It cannot fail below 32 MiB, and would change nothing.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES) };
    }
}

/// Gives whole free pages between blocks back. Takes milliseconds, in which threads that
/// allocate may wait.
pub fn give_back_holes() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it takes a number only, and each heap's lock while it looks at that.
        unsafe { libc::malloc_trim(0) };
    }
}
