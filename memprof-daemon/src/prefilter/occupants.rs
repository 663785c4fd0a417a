//! Whether threads of a stopped process are in an image, or will come back to it.
//!
//! Addresses of the image on a stack do not tell: a call that has returned leaves one
//! behind, which may stand there for as long as its thread sleeps. The stubs tell. A call
//! that they follow to its return is marked in the private block of the thread's shard
//! (`PRIVATE_CALL`), from before the allocator is called until after its return. Those of
//! threads for which there was no shard are marked in none, but counted (`HEADER_UNMARKED`):
//! while there is one, every word counts. Besides, a signal can have interrupted a thread in
//! the image: then its handler's frame, which the kernel lays out, has an address of the image
//! as that to go on at.

use std::ops::Range;

use memprof_common::prefilter::{
    HEADER_UNMARKED, PRIVATE_CALL, PRIVATE_OWNER, SHARD_PROBES, home_shard,
};

use super::{
    attach::Image,
    remote,
    stop::{Stopped, Thread},
    stop_error::StopError,
    within::mapping_at,
};
use crate::process::maps::MapsEntry;

/// How much of a stack is searched for signal frames.
const MOST_STACK: u64 = 8 << 20;
const CHUNK: usize = 256 << 10;
const WORD: u64 = 8;
/// `orig_rax` of a thread that is in no call.
const NO_CALL: u64 = u64::MAX;
/// From a signal frame's start to the saved instruction pointer: `pretcode`, then in the
/// `ucontext` flags, link, stack (3 words) and 16 registers (include/uapi/asm/sigcontext.h).
const FRAME_TO_IP: u64 = 8 * (1 + 2 + 3 + 16);

/// Whether anyone is, or comes back.
///
/// # Errors
///
/// The process was killed.
pub(super) fn is_anyone_in(stopped: &Stopped, image: &Image) -> Result<bool, StopError> {
    let is_in = |address: u64| image.has_code_at(address);
    if stopped.threads().any(|thread| is_in(thread.registers.rip)) {
        return Ok(true);
    }
    if image.is_wiped {
        // A forked child: its marks are gone. Any address counts, also one left behind.
        let ranges: Vec<Range<u64>> = image
            .code
            .iter()
            .map(|range| range.start.saturating_sub(1)..range.end)
            .collect();
        return stopped.is_anyone_within(&ranges);
    }
    let maps = stopped.maps()?;
    // Any thread may be in such a call, also one that has a shard by now. Unmapped by the
    // process itself there are none.
    let unmarked = word(stopped, image.data.range.start + HEADER_UNMARKED as u64);
    let words = if unmarked.is_some_and(|calls| calls != 0) {
        Words::All
    } else {
        Words::SignalFrames
    };
    for thread in stopped.threads() {
        if call_of(image, thread).is_some_and(|frame| !has_left(thread, &maps, frame)) {
            return Ok(true);
        }
        if leads_back(stopped, &maps, thread, words, &is_in)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a thread is in the image, or in a call that is followed, and would go on at once if
/// it ran: it is not in a system call.
pub(super) fn is_passing(image: &Image, maps: &[MapsEntry], thread: &Thread) -> bool {
    let is_followed = || {
        !image.is_wiped
            && call_of(image, thread).is_some_and(|frame| !has_left(thread, maps, frame))
    };
    thread.registers.orig_rax == NO_CALL
        && (image.has_code_at(thread.registers.rip) || is_followed())
}

/// Which words of a stack lead back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Words {
    /// Those that the frame of a signal handler goes on at.
    SignalFrames,
    /// All.
    All,
}

/// The frame of the thread's outermost call that the stubs follow, if a shard has its mark.
fn call_of(image: &Image, thread: &Thread) -> Option<u64> {
    const CALL: usize = PRIVATE_CALL - PRIVATE_OWNER;
    let pointer = thread.registers.fs_base;
    let shards = image.data.geometry.shards;
    let home = home_shard(pointer, shards) as usize;
    for probe in 0..SHARD_PROBES {
        let owner_at = image.data.owner_at((home + probe) % shards as usize);
        let mut words = [0; CALL + WORD as usize];
        // Unmapped by the process itself: nobody follows anything.
        remote::read(thread.tid, owner_at, &mut words).ok()?;
        let [owner, call] = [words.first_chunk(), words.last_chunk()]
            .map(|word| u64::from_ne_bytes(word.copied().unwrap_or_default()));
        if owner == pointer {
            return (call != pointer && call != 0).then_some(call);
        }
        // Its own would be before this one.
        if owner == 0 {
            return None;
        }
    }
    None
}

/// Whether the thread has left the call with this frame by `longjmp` or an exception: it
/// stands above it on the same stack.
fn has_left(thread: &Thread, maps: &[MapsEntry], frame: u64) -> bool {
    let stack_pointer = thread.registers.rsp;
    stack_pointer > frame
        && mapping_at(maps, stack_pointer).map(|stack| stack.start)
            == mapping_at(maps, frame).map(|stack| stack.start)
}

/// Whether a word on the thread's stack leads back into the image.
fn leads_back(
    stopped: &Stopped,
    maps: &[MapsEntry],
    thread: &Thread,
    words: Words,
    is_in: &impl Fn(u64) -> bool,
) -> Result<bool, StopError> {
    let stack_pointer = thread.registers.rsp;
    let Some(stack) = mapping_at(maps, stack_pointer) else {
        return Ok(true);
    };
    let mut at = stack_pointer.max(stack.start.0) & !(WORD - 1);
    let end = stack.end.0.min(stack_pointer.saturating_add(MOST_STACK));
    let mut chunk = vec![0; CHUNK];
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
        let bytes = chunk.get_mut(..length).unwrap_or_default();
        stopped.read(at, bytes)?;
        for (number, bytes) in bytes.as_chunks().0.iter().enumerate() {
            let place = at + number as u64 * WORD;
            if is_in(u64::from_ne_bytes(*bytes))
                && (words == Words::All || is_restorer(stopped, place.wrapping_sub(FRAME_TO_IP)))
            {
                return Ok(true);
            }
        }
        at += length as u64;
    }
    Ok(false)
}

/// Whether a signal frame begins here: with the address of what makes `rt_sigreturn`.
fn is_restorer(stopped: &Stopped, frame: u64) -> bool {
    /// `mov $15,%rax; syscall` and `mov $15,%eax; syscall`.
    const RESTORERS: [&[u8]; 2] = [
        &[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05],
        &[0xb8, 15, 0, 0, 0, 0x0f, 0x05],
    ];
    let Some(address) = word(stopped, frame) else {
        return false;
    };
    let mut code = [0; 9];
    stopped.read(address, &mut code).is_ok()
        && RESTORERS.iter().any(|restorer| code.starts_with(restorer))
}

fn word(stopped: &Stopped, address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    stopped.read(address, &mut bytes).ok()?;
    Some(u64::from_ne_bytes(bytes))
}
