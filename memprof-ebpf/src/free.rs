//! A call that gives a block up.

use aya_ebpf::{EbpfContext as _, programs::ProbeContext};

use crate::{alloc::site_and_target, live};

/// At entry: if the block was sampled, take it out. Frees inside another call
/// need no look at the calls in flight: `realloc` has taken its old block out
/// already, and a free that calls another module's finds it gone.
#[inline(always)]
pub(crate) fn entry(ctx: &ProbeContext) {
    let addr = ctx.arg::<u64>(0).unwrap_or(0);
    if addr == 0 {
        return;
    }
    let Some((cookie, target)) = site_and_target(ctx.as_ptr()) else {
        return;
    };
    let _ = live::remove(cookie.slot(), &live::key(cookie.slot(), target, addr));
}
