//! Whether threads are, or may come back, within ranges of code.
//!
//! What a thread comes back to stands on its stack: return addresses, and what signal
//! frames save. Stale words may look the same, so a yes may be wrong, and the process is
//! let go and stopped again; a no is not, for stacks up to the bound below.

use std::ops::Range;

use nix::errno::Errno;

use super::{remote, stop::Thread};
use crate::process::maps::MapsEntry;

/// How much of a stack is looked at: the usual limit of one.
const MOST_STACK: u64 = 8 << 20;
/// Below the stack pointer, what a leaf function may use (x86-64 ABI, 3.2.2).
const RED_ZONE: u64 = 128;
const CHUNK: usize = 256 << 10;

/// Whether `address` is behind the first byte and before the end of a range.
pub(super) fn is_within(ranges: &[Range<u64>], address: u64) -> bool {
    ranges
        .iter()
        .any(|range| range.start < address && address < range.end)
}

/// Whether a thread is there, or may come back.
pub(super) fn is_anyone_within(
    threads: &[Thread],
    maps: &[MapsEntry],
    ranges: &[Range<u64>],
) -> Result<bool, (u32, Errno)> {
    let mut threads_at = threads.iter().map(|thread| thread.registers.rip);
    if threads_at.any(|address| is_within(ranges, address)) {
        return Ok(true);
    }
    may_anyone_return(threads, maps, ranges)
}

/// Whether a thread may come back.
pub(super) fn may_anyone_return(
    threads: &[Thread],
    maps: &[MapsEntry],
    ranges: &[Range<u64>],
) -> Result<bool, (u32, Errno)> {
    let mut chunk = vec![0; CHUNK];
    for thread in threads.iter().filter(|thread| !thread.is_kernels) {
        let rsp = thread.registers.rsp;
        let Some(stack) = mapping_at(maps, rsp) else {
            // Nowhere to look: nothing can be said of it.
            return Ok(true);
        };
        let mut at = rsp.saturating_sub(RED_ZONE).max(stack.start.0) & !7;
        let end = stack.end.0.min(rsp.saturating_add(MOST_STACK));
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            let words = chunk.get_mut(..len).unwrap_or_default();
            remote::read(thread.tid, at, words).map_err(|error| (thread.tid, error))?;
            let mut words = words.as_chunks().0.iter();
            if words.any(|word| is_within(ranges, u64::from_ne_bytes(*word))) {
                return Ok(true);
            }
            at += len as u64;
        }
    }
    Ok(false)
}

/// The mapping that `address` is in; `maps` as the kernel sorts them.
pub(super) fn mapping_at(maps: &[MapsEntry], address: u64) -> Option<&MapsEntry> {
    let index = maps.partition_point(|entry| entry.end.0 <= address);
    maps.get(index).filter(|entry| entry.start.0 <= address)
}
