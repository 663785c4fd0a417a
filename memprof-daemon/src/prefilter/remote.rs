//! The memory of another process.

use std::io::{IoSlice, IoSliceMut};

use nix::{
    errno::Errno,
    sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev},
    unistd::Pid,
};

fn vector(address: u64, len: usize) -> Result<[RemoteIoVec; 1], Errno> {
    let base = usize::try_from(address).map_err(|_| Errno::EFAULT)?;
    Ok([RemoteIoVec { base, len }])
}

/// Reads what can be read from `address` on; how many bytes, at least one.
pub(super) fn read_some(tid: u32, address: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    let remote = vector(address, buffer.len())?;
    let pid = Pid::from_raw(tid.cast_signed());
    process_vm_readv(pid, &mut [IoSliceMut::new(buffer)], &remote)
}

/// Fills `buffer` from `address` on.
pub(super) fn read(tid: u32, address: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    match read_some(tid, address, buffer)? {
        read if read == buffer.len() => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// Reads a word.
pub(super) fn read_word(tid: u32, address: u64) -> Result<u64, Errno> {
    let mut word = [0; 8];
    read(tid, address, &mut word)?;
    Ok(u64::from_ne_bytes(word))
}

/// Writes `bytes` where the program itself may write.
pub(super) fn write(tid: u32, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    let remote = vector(address, bytes.len())?;
    let pid = Pid::from_raw(tid.cast_signed());
    match process_vm_writev(pid, &[IoSlice::new(bytes)], &remote)? {
        written if written == bytes.len() => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}
