//! bpf(2), for what aya does not do.

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

/// bpf(2) with a command that makes a file descriptor.
pub(super) fn bpf<T>(command: u32, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is as long as said, and the kernel reads it only; what it
    // points to is alive in the callers, who borrow it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An address for the kernel.
pub(super) fn address<T>(pointer: *const T) -> u64 {
    pointer.addr() as u64
}

/// A length for the kernel.
pub(super) fn length(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}
