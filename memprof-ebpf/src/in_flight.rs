//! Calls that have entered the allocator and not returned.
//!
//! One a thread: the outermost. An allocator that calls itself inside a probed
//! call (`calloc` calling `malloc` in musl, `realloc(NULL, n)` calling `malloc`
//! in glibc, an interposed library calling libc's) is doing one allocation.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_probe_read_user};
use memprof_common::{
    config::{AttachCookie, TargetState},
    live::{LiveKey, LiveValue},
};

use crate::{
    atomic,
    hit::Hit,
    maps::{IN_FLIGHT, STATES, TAKEN},
};

/// What the return must know of its entry.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct InFlightCall {
    /// The probe site, as its cookie.
    pub(crate) cookie: u64,
    /// Stack pointer at entry: names the call among those of its thread.
    pub(crate) stack_pointer: u64,
    /// Bytes asked for.
    pub(crate) size_bytes: u64,
    /// The interval that the decision was made with; 0 if not sampled.
    pub(crate) sample_interval_bytes: u64,
    /// `posix_memalign`, and others that do as it does: where it stores the address. `realloc`:
    /// its old block.
    pub(crate) address: u64,
    /// `CALL_*`; of a pool's function its place from [`CALL_PLACE_SHIFT`] on.
    pub(crate) flags: u64,
    /// With [`CALL_PLACED`]: where it returns to.
    pub(crate) return_address: u64,
}

/// Counted in [`TargetState::nesting_calls`].
pub(crate) const CALL_NESTS: u64 = 1;
/// A `realloc` of a block; its free is counted already.
pub(crate) const CALL_FREES: u64 = 2;
/// Its old block was in the live map, and is in `TAKEN`.
pub(crate) const CALL_TAKEN: u64 = 4;

/// Its return is seen at the function's own instructions, and it may never come to them: it
/// may throw. So what is remembered of it holds only as long as its return address is where
/// it was.
pub(crate) const CALL_PLACED: u64 = 8;

/// The first of the bits of a pool's function's place. No address of a program has more than 56.
pub(crate) const CALL_PLACE_SHIFT: u32 = 8;

impl InFlightCall {
    /// Whether it may still be under way. Where an exception has ended it, what was called
    /// since has written over its place on the stack.
    #[inline(always)]
    pub(crate) fn may_be_under_way(&self) -> bool {
        self.flags & CALL_PLACED == 0 || return_address(self.stack_pointer) == self.return_address
    }
}

/// The return address of a call with this stack pointer at its entry; 0 if it cannot be read.
#[inline(always)]
pub(crate) fn return_address(stack_pointer: u64) -> u64 {
    // SAFETY: reads the target's memory, and says so if that fails.
    unsafe { bpf_probe_read_user(stack_pointer as *const u64) }.unwrap_or(0)
}

/// A block that a `realloc` under way has taken out of the live map.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct TakenBlock {
    pub(crate) key: LiveKey,
    pub(crate) value: LiveValue,
}

/// The current thread, unique on the host.
#[inline(always)]
pub(crate) fn current_thread() -> u64 {
    bpf_get_current_pid_tgid()
}

/// As [`current_thread`], of any thread.
#[inline(always)]
pub(crate) const fn thread_of(pid: u32, thread: u32) -> u64 {
    (pid as u64) << 32 | thread as u64
}

/// Whether a call of `thread` at `cookie` with this stack pointer runs inside
/// another call in flight.
///
/// The stack grows down, so a call inside another has a lower stack pointer.
/// The same stack pointer at another site is a tail call (`reallocarray` jumps
/// to `realloc`): still the same call. The same or a higher one at the same
/// site is a new call, and the one in flight never returned through its probe
/// (`longjmp` or an exception out of it, or the probe came after its entry).
#[inline(always)]
pub(crate) fn is_nested(thread: u64, cookie: u64, stack_pointer: u64) -> bool {
    // SAFETY: only this thread writes the entry.
    match unsafe { IN_FLIGHT.get(thread) } {
        Some(outer) => {
            (stack_pointer < outer.stack_pointer
                || (stack_pointer == outer.stack_pointer && cookie != outer.cookie))
                && outer.flags & (CALL_NESTS | CALL_PLACED) != CALL_PLACED
                && outer.may_be_under_way()
        }
        None => false,
    }
}

/// Remembers a call. False if the map is full.
#[inline(always)]
pub(crate) fn enter(hit: &Hit, thread: u64, call: &InFlightCall) -> bool {
    // Only a call that never returned through its probe is still there.
    let replaces_nesting = hit.may_be_nested()
        // SAFETY: only this thread writes the entry.
        && match unsafe { IN_FLIGHT.get(thread) } {
            Some(stale) => stale.flags & CALL_NESTS != 0,
            None => false,
        };
    if IN_FLIGHT.insert(thread, call, 0).is_err() {
        return false;
    }
    let nests = call.flags & CALL_NESTS != 0;
    if nests && !replaces_nesting {
        count_nesting(hit.state, 1);
    }
    if !nests && replaces_nesting {
        count_nesting(hit.state, u64::MAX);
    }
    true
}

/// Takes back the call that returns to `stack_pointer`, if it is the one
/// remembered.
#[inline(always)]
pub(crate) fn leave(hit: &Hit, thread: u64, stack_pointer: u64) -> Option<InFlightCall> {
    // SAFETY: only this thread writes the entry.
    let call = unsafe { IN_FLIGHT.get(thread) }?;
    // The `ret` has popped the return address.
    if call.cookie != hit.cookie.0 || call.stack_pointer.wrapping_add(8) != stack_pointer {
        return None;
    }
    let call = *call;
    if IN_FLIGHT.remove(thread).is_ok() && call.flags & CALL_NESTS != 0 {
        count_nesting(hit.state, u64::MAX);
    }
    Some(call)
}

/// Takes back the call of a function whose returns are seen at its own instructions, at one
/// of which the thread is. Several functions can have it in common.
#[inline(always)]
pub(crate) fn leave_placed(hit: &Hit, thread: u64, stack_pointer: u64) -> Option<InFlightCall> {
    // SAFETY: only this thread writes the entry.
    let call = unsafe { IN_FLIGHT.get(thread) }?;
    if call.flags & CALL_PLACED == 0
        || call.stack_pointer != stack_pointer
        || AttachCookie(call.cookie).slot() != hit.slot
        || !call.may_be_under_way()
    {
        return None;
    }
    let call = *call;
    if IN_FLIGHT.remove(thread).is_ok() && call.flags & CALL_NESTS != 0 {
        count_nesting(hit.state, u64::MAX);
    }
    Some(call)
}

/// A call of such a function begins, and is not remembered: one that an exception has ended
/// is not to be taken for it when it returns.
#[inline(always)]
pub(crate) fn drop_placed(hit: &Hit, thread: u64, stack_pointer: u64) {
    // SAFETY: only this thread writes the entry.
    let Some(call) = (unsafe { IN_FLIGHT.get(thread) }) else {
        return;
    };
    let flags = call.flags;
    if flags & CALL_PLACED != 0
        && call.stack_pointer <= stack_pointer
        && IN_FLIGHT.remove(thread).is_ok()
        && flags & CALL_NESTS != 0
    {
        count_nesting(hit.state, u64::MAX);
    }
}

#[inline(always)]
fn count_nesting(state: *mut TargetState, calls: u64) {
    // SAFETY: the pointer is to a map value.
    unsafe { atomic::add(&raw mut (*state).nesting_calls, calls) };
}

/// Remembers the block that the thread's call has taken. False if the map is
/// full.
#[inline(always)]
pub(crate) fn keep_taken(thread: u64, block: &TakenBlock) -> bool {
    TAKEN.insert(thread, block, 0).is_ok()
}

/// Hands back the block that the thread's call has taken.
#[inline(always)]
pub(crate) fn hand_back(thread: u64) -> Option<TakenBlock> {
    // SAFETY: only this thread writes the entry.
    let block = *unsafe { TAKEN.get(thread) }?;
    let _ = TAKEN.remove(thread);
    Some(block)
}

/// Drops the block that the thread's call has taken. To look costs less than to remove.
#[inline(always)]
pub(crate) fn drop_taken(thread: u64) {
    if TAKEN.get_ptr(thread).is_some() {
        let _ = TAKEN.remove(thread);
    }
}

/// Drops whatever is remembered of a thread.
#[inline(always)]
pub(crate) fn forget(thread: u64) {
    drop_taken(thread);
    // SAFETY: only this thread writes the entry.
    let Some(call) = (unsafe { IN_FLIGHT.get(thread) }) else {
        return;
    };
    let (cookie, flags) = (AttachCookie(call.cookie), call.flags);
    if IN_FLIGHT.remove(thread).is_ok()
        && flags & CALL_NESTS != 0
        && let Some(state) = STATES.get_ptr_mut(cookie.slot())
    {
        count_nesting(state, u64::MAX);
    }
}
