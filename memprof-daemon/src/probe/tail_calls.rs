//! The array of programs that tail calls find their program in: `WALK_ON`, see
//! `memprof-ebpf/src/tail_calls.rs`.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use super::syscall::{address, bpf_number};

/// The program that goes on with a walk.
pub(super) const WALK_ON: &str = "walk_on";
/// The array that it is found in.
pub(super) const ARRAY: &str = "WALK_ON";

/// `union bpf_attr` of `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    /// 0.
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

const BPF_MAP_UPDATE_ELEM: u32 = 2;

/// Puts the program into the array. The kernel empties it when the last descriptor of
/// the array is closed (`bpf_map_put_uref` in kernel/bpf/syscall.c).
pub(super) fn fill(array: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (0_u32, program.as_raw_fd().cast_unsigned());
    let attr = MapUpdate {
        map_fd: array.as_raw_fd().cast_unsigned(),
        reserved: 0,
        key: address(&raw const key),
        value: address(&raw const value),
        flags: 0,
    };
    bpf_number(BPF_MAP_UPDATE_ELEM, &attr).map(drop)
}
