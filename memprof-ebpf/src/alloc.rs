//! An allocating call: the decision at entry, the sample at return.

use core::{ffi::c_void, hint::black_box};

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_probe_read_user, generated::bpf_ktime_get_ns},
    programs::{ProbeContext, RetProbeContext},
};
use memprof_common::{
    counters::DropReason, function::Function, live::LiveValue, sampler::should_sample,
    stack::StackKey,
};

use crate::{
    counters::count,
    hit::Hit,
    in_flight::{self, CALL_FREES, CALL_NESTS, CALL_TAKEN, InFlightCall, TakenBlock},
    live,
    stack::{self, Start},
    tail_calls, totals,
};

const MALLOC: u8 = Function::Malloc as u8;
const CALLOC: u8 = Function::Calloc as u8;
const REALLOC: u8 = Function::Realloc as u8;
const REALLOCARRAY: u8 = Function::Reallocarray as u8;
const POSIX_MEMALIGN: u8 = Function::PosixMemalign as u8;
const ALIGNED_ALLOC: u8 = Function::AlignedAlloc as u8;
const MEMALIGN: u8 = Function::Memalign as u8;
const MALLOCX: u8 = Function::Mallocx as u8;
const XALLOCX: u8 = Function::Xallocx as u8;
const REALLOCF: u8 = Function::Reallocf as u8;
const HEAP_CALLOC: u8 = Function::HeapCalloc as u8;
const HEAP_REALLOC: u8 = Function::HeapRealloc as u8;
const HEAP_REALLOCN: u8 = Function::HeapReallocn as u8;
const HEAP_REALLOCF: u8 = Function::HeapReallocf as u8;

/// Bytes that the call asks for. A product that overflows is larger than any
/// allocator grants; the call will fail.
#[inline(always)]
fn requested_bytes(ctx: &ProbeContext, function: u8) -> u64 {
    let argument = |n: usize| ctx.arg::<u64>(n).unwrap_or(0);
    match function {
        CALLOC => saturating_product(argument(0), argument(1)),
        REALLOCARRAY => saturating_product(argument(1), argument(2)),
        HEAP_CALLOC => saturating_product(argument(1), argument(2)),
        HEAP_REALLOCN => saturating_product(argument(2), argument(3)),
        REALLOC | ALIGNED_ALLOC | MEMALIGN | XALLOCX | REALLOCF => argument(1),
        POSIX_MEMALIGN | HEAP_REALLOC | HEAP_REALLOCF => argument(2),
        _ => argument(0),
    }
}

/// The block that the call gives up for the one it asks for; 0 if there is none.
#[inline(always)]
fn old_block(ctx: &ProbeContext, function: u8) -> u64 {
    // Opaque, or the compiler makes one load of the two, at a place that it computes, which the
    // verifier refuses.
    let first = black_box(ctx.arg::<u64>(0).unwrap_or(0));
    let second = black_box(ctx.arg::<u64>(1).unwrap_or(0));
    match function {
        REALLOC | REALLOCARRAY | XALLOCX | REALLOCF => first,
        HEAP_REALLOC | HEAP_REALLOCN | HEAP_REALLOCF => second,
        _ => 0,
    }
}

/// `a.saturating_mul(b)` without the 128-bit product that BPF lacks.
#[inline(always)]
pub(crate) fn saturating_product(a: u64, b: u64) -> u64 {
    let (small, large) = if a < b { (a, b) } else { (b, a) };
    if small >> 32 != 0 {
        return u64::MAX;
    }
    let low = small * (large & 0xffff_ffff);
    // Opaque, or the compiler recognizes the 128-bit product.
    let high = black_box(small * (large >> 32) + (low >> 32));
    if high >> 32 != 0 {
        return u64::MAX;
    }
    high << 32 | low & 0xffff_ffff
}

/// Whether a call's return must be seen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Return {
    Needed,
    NotNeeded,
}

/// At entry: count, and sample or skip.
#[inline(always)]
pub(crate) fn entry(ctx: &ProbeContext, hit: &Hit) -> Return {
    let function = hit.cookie.function_code();
    // SAFETY: the context is valid for this program's run.
    let stack_pointer = unsafe { (*ctx.regs).rsp };
    if hit.may_be_nested()
        && in_flight::is_nested(in_flight::current_thread(), hit.cookie.0, stack_pointer)
    {
        return Return::NotNeeded;
    }

    let size_bytes = requested_bytes(ctx, function);
    let Some(mut draws) = totals::count_alloc(hit, size_bytes) else {
        return Return::NotNeeded;
    };
    // One read, so that decision and weight agree while the daemon changes it.
    let interval = hit.target.sample_interval_bytes;
    let sampled = should_sample(size_bytes, interval, || draws.draw());
    // `malloc` calls no other function of the family, unless one module's calls
    // another's: nothing to remember.
    let nests = (function != MALLOC || hit.target.malloc_nests != 0) && function != MALLOCX;
    if !sampled && !nests {
        return Return::NotNeeded;
    }

    let thread = in_flight::current_thread();
    let mut call = InFlightCall {
        cookie: hit.cookie.0,
        stack_pointer,
        size_bytes,
        sample_interval_bytes: if sampled { interval } else { 0 },
        address: 0,
        flags: if nests { CALL_NESTS } else { 0 },
        return_address: 0,
    };
    if function == POSIX_MEMALIGN {
        call.address = ctx.arg::<u64>(0).unwrap_or(0);
    }
    let mut lost = false;
    let old = old_block(ctx, function);
    if old != 0 {
        totals::count_free(hit);
        call.flags |= CALL_FREES;
        call.address = old;
        // Now, not at return: another thread may be given the old address
        // before this call returns.
        let key = live::key_of(hit, old);
        if let Some(value) = live::remove(hit.slot, &key) {
            // If there is no room to keep it, a failure cannot give it back.
            if in_flight::keep_taken(thread, &TakenBlock { key, value }) {
                call.flags |= CALL_TAKEN;
            } else {
                lost = true;
            }
        }
    }
    let remembered = in_flight::enter(hit, thread, &call);
    if lost || !remembered {
        count(hit.slot, DropReason::InFlightFull);
    }
    if remembered {
        Return::Needed
    } else {
        Return::NotNeeded
    }
}

/// A block to be put into the live map.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct SampledBlock {
    pub(crate) address: u64,
    pub(crate) size_bytes: u64,
    pub(crate) sample_interval_bytes: u64,
    /// Code of the [`Function`] that was called.
    pub(crate) function: u32,
    /// 0.
    pub(crate) reserved: u32,
}

/// At return: the block's address is known, and the stack is the caller's. With
/// `BY_TAIL_CALLS` on kernels without `bpf_loop`.
#[inline(always)]
pub(crate) fn on_return<const BY_TAIL_CALLS: bool>(ctx: &RetProbeContext, hit: &Hit) {
    if let Some(block) = settle(ctx, hit) {
        capture::<BY_TAIL_CALLS>(ctx.as_ptr(), &Start::at_return(ctx), hit, &block);
    }
}

/// Captures the stack of a block that is sampled, and keeps both.
#[inline(always)]
pub(crate) fn capture<const BY_TAIL_CALLS: bool>(
    ctx: *mut c_void,
    start: &Start,
    hit: &Hit,
    block: &SampledBlock,
) {
    if BY_TAIL_CALLS {
        tail_calls::begin(ctx, start, hit, block);
    } else {
        keep(hit, block, stack::capture(ctx, start, hit));
    }
}

/// Ends the call in flight. The block that it has handed out, if that is sampled.
#[inline(always)]
fn settle(ctx: &RetProbeContext, hit: &Hit) -> Option<SampledBlock> {
    // SAFETY: the context is valid for this program's run.
    let stack_pointer = unsafe { (*ctx.regs).rsp };
    let thread = in_flight::current_thread();
    let call = in_flight::leave(hit, thread, stack_pointer)?;
    let slot = hit.slot;
    let function = hit.cookie.function_code();
    let result: u64 = ctx.ret();

    let addr = if function == POSIX_MEMALIGN {
        // Returns an `int`: the upper half of the register is anything.
        if result as u32 != 0 {
            return None;
        }
        if call.sample_interval_bytes == 0 {
            return None;
        }
        // SAFETY: reads the target's memory, and says so if that fails.
        match unsafe { bpf_probe_read_user(call.address as *const u64) } {
            Ok(addr) => addr,
            Err(_) => {
                count(slot, DropReason::ResultUnreadable);
                return None;
            }
        }
    } else if function == XALLOCX {
        // The size that the block has now, where it was.
        if result >= call.size_bytes {
            call.address
        } else {
            0
        }
    } else {
        result
    };

    if call.flags & CALL_FREES != 0 {
        // A failed realloc leaves the old block as it was. realloc(p, 0) that
        // returns NULL has freed it (glibc; C17 lets both happen, and a
        // library that keeps the block returns its address). So has reallocf.
        let failed =
            addr == 0 && call.size_bytes != 0 && function != REALLOCF && function != HEAP_REALLOCF;
        if failed {
            totals::uncount_free(hit);
        }
        if call.flags & CALL_TAKEN != 0
            && let Some(mut taken) = in_flight::hand_back(thread)
            && failed
        {
            live::restore(slot, &taken.key, &mut taken.value);
        }
    }
    if addr == 0 {
        return None;
    }
    if call.sample_interval_bytes == 0 {
        return None;
    }
    Some(SampledBlock {
        address: addr,
        size_bytes: call.size_bytes,
        sample_interval_bytes: call.sample_interval_bytes,
        function: u32::from(function),
        reserved: 0,
    })
}

/// Puts a block and its stack into the live map, and tells of it.
#[inline(always)]
pub(crate) fn keep(hit: &Hit, block: &SampledBlock, stack: StackKey) {
    let mut value = LiveValue {
        // SAFETY: takes nothing, returns a number.
        timestamp_ns: unsafe { bpf_ktime_get_ns() },
        size_bytes: block.size_bytes,
        sample_interval_bytes: block.sample_interval_bytes,
        stack,
        flags: 0,
        function: block.function,
    };
    live::insert(hit.slot, &hit.live_key(block.address), &mut value);
}
