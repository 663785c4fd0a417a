//! A call that gives a block up.

use aya_ebpf::{EbpfContext as _, programs::ProbeContext};

use crate::{
    hit::Hit,
    in_flight::{current_thread, is_nested},
    live, totals,
};

/// At entry: if the block was sampled, take it out. A free inside another call
/// takes its block out too, though it is no call of the program's: `realloc` has
/// taken its old block out already, and one that calls another module's finds it
/// gone.
#[inline(always)]
pub(crate) fn entry(ctx: &ProbeContext) {
    let addr = ctx.arg::<u64>(0).unwrap_or(0);
    if addr == 0 {
        return;
    }
    let Some(hit) = Hit::new(ctx.as_ptr()) else {
        return;
    };
    // SAFETY: the context is valid for this program's run.
    let stack_pointer = unsafe { (*ctx.regs).rsp };
    if !hit.may_be_nested() || !is_nested(current_thread(), hit.cookie.0, stack_pointer) {
        totals::count_free(&hit);
    }
    let _ = live::remove(hit.slot, &live::key_of(&hit, addr));
}

/// At the place at which a function passes its block on to another that is probed: the call
/// counts there.
#[inline(always)]
pub(crate) fn passes_on(ctx: &ProbeContext) {
    if ctx.arg::<u64>(0).unwrap_or(0) == 0 {
        return;
    }
    let Some(hit) = Hit::new(ctx.as_ptr()) else {
        return;
    };
    // SAFETY: the context is valid for this program's run.
    let stack_pointer = unsafe { (*ctx.regs).rsp };
    if !hit.may_be_nested() || !is_nested(current_thread(), hit.cookie.0, stack_pointer) {
        totals::uncount_free(&hit);
    }
}
