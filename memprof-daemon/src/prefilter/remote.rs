//! The memory of another process.

use std::io::{IoSlice, IoSliceMut};

use nix::{
    errno::Errno,
    sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev},
    unistd::Pid,
};

/// What one call takes (`UIO_MAXIOV`, include/uapi/linux/uio.h).
const MOST_PLACES: usize = 1024;

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

fn vectors(addresses: &[u64], len: usize) -> Result<Vec<RemoteIoVec>, Errno> {
    let vectors = addresses.iter().map(|&address| {
        let base = usize::try_from(address).map_err(|_| Errno::EFAULT)?;
        Ok(RemoteIoVec { base, len })
    });
    vectors.collect()
}

/// Reads the words at `addresses`.
pub(super) fn read_words(tid: u32, addresses: &[u64]) -> Result<Vec<u64>, Errno> {
    const WORD: usize = size_of::<u64>();
    let pid = Pid::from_raw(tid.cast_signed());
    let mut words = Vec::with_capacity(addresses.len());
    let mut buffer = vec![0; WORD * MOST_PLACES.min(addresses.len())];
    for places in addresses.chunks(MOST_PLACES) {
        let bytes = buffer.get_mut(..WORD * places.len()).unwrap_or_default();
        let remote = vectors(places, WORD)?;
        if process_vm_readv(pid, &mut [IoSliceMut::new(bytes)], &remote)? != bytes.len() {
            return Err(Errno::EFAULT);
        }
        words.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|word| u64::from_ne_bytes(*word)),
        );
    }
    Ok(words)
}

/// Writes the same two words to each of `addresses`.
pub(super) fn write_pairs(tid: u32, addresses: &[u64], pair: [u64; 2]) -> Result<(), Errno> {
    let pid = Pid::from_raw(tid.cast_signed());
    let pair = pair.map(u64::to_ne_bytes);
    let pair = pair.as_flattened();
    for places in addresses.chunks(MOST_PLACES) {
        let bytes = pair.repeat(places.len());
        let remote = vectors(places, pair.len())?;
        if process_vm_writev(pid, &[IoSlice::new(&bytes)], &remote)? != bytes.len() {
            return Err(Errno::EFAULT);
        }
    }
    Ok(())
}
