//! Functions that no return probe may be put on, since they may throw. Their returns are
//! seen by ordinary probes on their own `ret`s, and the places of their arguments are in the
//! cookie.
//!
//! In programs of their own, so that those of `malloc` and its kin have nothing to do with it.

use core::hint::black_box;

use aya_ebpf::{EbpfContext as _, helpers::bpf_probe_read_user, programs::ProbeContext};
use memprof_common::{counters::DropReason, sampler::should_sample};

use crate::{
    alloc::{self, SampledBlock, saturating_product},
    counters::count,
    hit::Hit,
    in_flight::{self, CALL_PLACED, InFlightCall},
    stack::{self, Start},
    tail_calls, totals,
};

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

/// At entry: count, and sample or skip.
#[inline(always)]
pub(crate) fn entry(ctx: &ProbeContext, hit: &Hit) {
    // SAFETY: the context is valid for this program's run.
    let stack_pointer = unsafe { (*ctx.regs).rsp };
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
    if !should_sample(size_bytes, interval, || draws.draw()) {
        in_flight::drop_placed(hit, thread, stack_pointer);
        return;
    }
    let call = InFlightCall {
        cookie: hit.cookie.0,
        stack_pointer,
        size_bytes,
        sample_interval_bytes: interval,
        address: places.out.map_or(0, |place| argument(ctx, place)),
        // An allocator's own `new` calls no other function but to throw: what is allocated for
        // the exception is a call of its own.
        flags: CALL_PLACED,
        return_address: in_flight::return_address(stack_pointer),
    };
    if !in_flight::enter(hit, thread, &call) {
        count(hit.slot, DropReason::InFlightFull);
    }
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
    if call.sample_interval_bytes == 0 {
        return;
    }
    let address = if call.address != 0 {
        // SAFETY: reads the target's memory, and says so if that fails.
        match unsafe { bpf_probe_read_user(call.address as *const u64) } {
            Ok(address) => address,
            Err(_) => return count(hit.slot, DropReason::ResultUnreadable),
        }
    } else {
        result
    };
    if address == 0 {
        return;
    }
    let function = memprof_common::config::AttachCookie(call.cookie).function_code();
    let block = SampledBlock {
        address,
        size_bytes: call.size_bytes,
        sample_interval_bytes: call.sample_interval_bytes,
        function: u32::from(function),
        reserved: 0,
    };
    // As it is for the caller behind the `ret`, before which the callee-saved registers are
    // the caller's already.
    let start = Start {
        ip: call.return_address,
        sp: stack_pointer.wrapping_add(8),
        bp,
    };
    if BY_TAIL_CALLS {
        tail_calls::begin(ctx.as_ptr(), &start, hit, &block);
    } else {
        let stack = stack::capture(ctx.as_ptr(), &start, hit);
        alloc::keep(hit, &block, stack);
    }
}
