//! Functions that no return probe may be put on, since they may throw. Their returns are
//! seen by ordinary probes on their own `ret`s, and the places of their arguments are in the
//! cookie.
//!
//! And those of pools, which the user has named. They may throw too, and only where it is known
//! that they do not, and not at which instructions they return, they have a return probe. What
//! they call is no call of the program's. So they are remembered whether or not they are
//! sampled; also those that give blocks up, which may give up memory that was not counted.
//!
//! In programs of their own, so that those of `malloc` and its kin have nothing to do with it.

use core::hint::black_box;

use aya_ebpf::{
    EbpfContext as _,
    helpers::bpf_probe_read_user,
    programs::{ProbeContext, RetProbeContext},
};
use memprof_common::{
    config::AttachCookie, counters::DropReason, function::Function, live::POOL_BLOCK,
    sampler::should_sample,
};

use crate::{
    alloc::{self, SampledBlock, saturating_product},
    counters::count,
    hit::Hit,
    in_flight::{self, CALL_NESTS, CALL_PLACE_SHIFT, CALL_PLACED, InFlightCall},
    live,
    stack::Start,
    totals,
};

const POOL: u8 = Function::Pool as u8;

/// Argument number `place`.
#[inline(always)]
fn argument(ctx: &ProbeContext, place: u8) -> u64 {
    // Opaque, or the compiler makes one load of them, at a place that it computes, which the
    // verifier refuses.
    let at = |n: usize| black_box(ctx.arg::<u64>(n).unwrap_or(0));
    let (a, b, c, d, e, f) = (at(0), at(1), at(2), at(3), at(4), at(5));
    match place {
        0 => a,
        1 => b,
        2 => c,
        3 => d,
        4 => e,
        _ => f,
    }
}

/// What is remembered of a call of a pool's function, which is at `ip`.
#[inline(always)]
fn pool_flags(hit: &Hit, ip: u64) -> u64 {
    // Its return address is not where it was any more if there is a return probe.
    let placed = if hit.cookie.has_return_probe() {
        0
    } else {
        CALL_PLACED
    };
    ip << CALL_PLACE_SHIFT | CALL_NESTS | placed
}

/// At entry: count, and sample or skip.
#[inline(always)]
pub(crate) fn entry(ctx: &ProbeContext, hit: &Hit) {
    // SAFETY: the context is valid for this program's run.
    let (ip, stack_pointer) = unsafe { ((*ctx.regs).rip, (*ctx.regs).rsp) };
    let thread = in_flight::current_thread();
    if hit.may_be_nested() && in_flight::is_nested(thread, hit.cookie.0, stack_pointer) {
        return;
    }
    let places = hit.cookie.places();
    let mut size_bytes = argument(ctx, places.size);
    if let Some(place) = places.count {
        size_bytes = saturating_product(size_bytes, argument(ctx, place));
    }
    let Some(mut draws) = totals::count_alloc(hit, size_bytes) else {
        return;
    };
    // One read, so that decision and weight agree while the daemon changes it.
    let interval = hit.target.sample_interval_bytes;
    let sampled = should_sample(size_bytes, interval, || draws.draw());
    let is_pool = hit.cookie.function_code() == POOL;
    if !sampled && !is_pool {
        in_flight::drop_placed(hit, thread, stack_pointer);
        return;
    }
    let call = InFlightCall {
        cookie: hit.cookie.0,
        stack_pointer,
        size_bytes,
        sample_interval_bytes: if sampled { interval } else { 0 },
        address: places.out.map_or(0, |place| argument(ctx, place)),
        // An allocator's own `new` calls no other function but to throw: what is allocated for
        // the exception is a call of its own.
        flags: if is_pool {
            pool_flags(hit, ip)
        } else {
            CALL_PLACED
        },
        return_address: in_flight::return_address(stack_pointer),
    };
    if !in_flight::enter(hit, thread, &call) {
        count(hit.slot, DropReason::InFlightFull);
    }
}

/// At the entry of a pool's function that gives a block up.
#[inline(always)]
pub(crate) fn free(ctx: &ProbeContext, hit: &Hit) {
    let address = argument(ctx, hit.cookie.places().size);
    if address == 0 {
        return;
    }
    // SAFETY: the context is valid for this program's run.
    let stack_pointer = unsafe { (*ctx.regs).rsp };
    let thread = in_flight::current_thread();
    if !hit.may_be_nested() || !in_flight::is_nested(thread, hit.cookie.0, stack_pointer) {
        totals::count_free(hit);
        let call = InFlightCall {
            cookie: hit.cookie.0,
            stack_pointer,
            size_bytes: 0,
            sample_interval_bytes: 0,
            address: 0,
            flags: pool_flags(hit, 0),
            return_address: in_flight::return_address(stack_pointer),
        };
        if !in_flight::enter(hit, thread, &call) {
            count(hit.slot, DropReason::InFlightFull);
        }
    }
    let _ = live::remove(hit.slot, &hit.live_key(address | POOL_BLOCK));
}

/// At a `ret`. With `BY_TAIL_CALLS` on kernels without `bpf_loop`.
#[inline(always)]
pub(crate) fn on_return<const BY_TAIL_CALLS: bool>(ctx: &ProbeContext, hit: &Hit) {
    // SAFETY: the context is valid for this program's run.
    let (stack_pointer, result, bp) =
        unsafe { ((*ctx.regs).rsp, (*ctx.regs).rax, (*ctx.regs).rbp) };
    let thread = in_flight::current_thread();
    let Some(call) = in_flight::leave_placed(hit, thread, stack_pointer) else {
        return;
    };
    // As it is for the caller behind the `ret`, before which the callee-saved registers are
    // the caller's already.
    let start = Start {
        ip: call.return_address,
        sp: stack_pointer.wrapping_add(8),
        bp,
        leaf: leaf(&call),
    };
    if let Some(block) = settle(hit, &call, result) {
        alloc::capture::<BY_TAIL_CALLS>(ctx.as_ptr(), &start, hit, &block);
    }
}

/// At the return probe of a pool's function. With `BY_TAIL_CALLS` on kernels without
/// `bpf_loop`.
#[inline(always)]
pub(crate) fn on_exit<const BY_TAIL_CALLS: bool>(ctx: &RetProbeContext, hit: &Hit) {
    // SAFETY: the context is valid for this program's run.
    let stack_pointer = unsafe { (*ctx.regs).rsp };
    let thread = in_flight::current_thread();
    let Some(call) = in_flight::leave(hit, thread, stack_pointer) else {
        return;
    };
    let start = Start {
        leaf: leaf(&call),
        ..Start::at_return(ctx)
    };
    if let Some(block) = settle(hit, &call, ctx.ret()) {
        alloc::capture::<BY_TAIL_CALLS>(ctx.as_ptr(), &start, hit, &block);
    }
}

/// The frame of a pool's function that was called, as if a call returned to behind its first
/// byte; 0 of another function.
#[inline(always)]
fn leaf(call: &InFlightCall) -> u64 {
    match call.flags >> CALL_PLACE_SHIFT {
        0 => 0,
        place => place + 1,
    }
}

/// The block that a call has handed out, if it is sampled.
#[inline(always)]
fn settle(hit: &Hit, call: &InFlightCall, result: u64) -> Option<SampledBlock> {
    if call.sample_interval_bytes == 0 {
        return None;
    }
    let cookie = AttachCookie(call.cookie);
    let mut address = result;
    if cookie.places().out.is_some() {
        // SAFETY: reads the target's memory, and says so if that fails.
        match unsafe { bpf_probe_read_user(call.address as *const u64) } {
            Ok(stored) => address = stored,
            Err(_) => {
                count(hit.slot, DropReason::ResultUnreadable);
                return None;
            }
        }
    }
    if address == 0 {
        return None;
    }
    let function = cookie.function_code();
    if function == POOL {
        address |= POOL_BLOCK;
    }
    Some(SampledBlock {
        address,
        size_bytes: call.size_bytes,
        sample_interval_bytes: call.sample_interval_bytes,
        function: u32::from(function),
        reserved: 0,
    })
}
