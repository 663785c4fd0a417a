//! bpf(2), for what aya does not do.

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
};

/// bpf(2) with a command that makes a file descriptor.
pub(super) fn bpf<T>(command: u32, attr: &T) -> io::Result<OwnedFd> {
    let fd = bpf_number(command, attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2) with any command; what it returns.
pub(super) fn bpf_number<T>(command: u32, attr: &T) -> io::Result<RawFd> {
    // SAFETY: `attr` is as long as said, and the kernel reads it only; what it
    // points to is alive in the callers, who borrow it.
    let number = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(number).map_err(io::Error::other)
}

/// An address for the kernel.
pub(super) fn address<T>(pointer: *const T) -> u64 {
    pointer.addr() as u64
}

/// A length for the kernel.
pub(super) fn length(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}
