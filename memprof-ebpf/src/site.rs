//! The sites of the prefilter's image: what its stubs in the target pass for sampled
//! blocks alone.
//!
//! All that is read here was written by the target, which may be hostile to itself: it
//! can spoil its own profile, and nothing else.

use core::{ffi::c_void, mem::offset_of};

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_probe_read_user, generated::bpf_get_prandom_u32},
    programs::ProbeContext,
};
use memprof_common::{
    counters::DropReason,
    function::Function,
    limits::MAX_SAMPLE_INTERVAL_BYTES,
    prefilter::{SITE_FRAME_OFFSET, SiteFrame, SiteKind},
    sampler::should_sample,
};

use crate::{
    alloc::{self, SampledBlock},
    counters::count,
    hit::Hit,
    in_flight::{self, TakenBlock, current_thread},
    live,
    stack::Start,
};

const ALLOC: u8 = SiteKind::Alloc as u8;
const FREE: u8 = SiteKind::Free as u8;
const TAKE: u8 = SiteKind::Take as u8;
const RESTORE: u8 = SiteKind::Restore as u8;

/// A site is passed. With `BY_TAIL_CALLS` on kernels without `bpf_loop`.
#[inline(always)]
pub(crate) fn pass<const BY_TAIL_CALLS: bool>(ctx: *mut c_void) {
    let Some(hit) = Hit::new(ctx) else {
        return;
    };
    let ctx = &ProbeContext::new(ctx);
    match hit.cookie.function_code() {
        ALLOC => {
            let Some((block, start)) = sampled(ctx, &hit) else {
                return;
            };
            alloc::capture::<BY_TAIL_CALLS>(ctx.as_ptr(), &start, &hit, &block);
        }
        FREE => {
            let _ = live::remove(hit.slot, &hit.live_key(argument(ctx)));
        }
        TAKE => take(&hit, argument(ctx)),
        RESTORE => restore(ctx, &hit),
        _ => {}
    }
}

/// The block that a site is about, where there is no frame.
#[inline(always)]
fn argument(ctx: &ProbeContext) -> u64 {
    ctx.arg::<u64>(0).unwrap_or(0)
}

/// Where the stub has written what is to be known of the call: a [`SiteFrame`].
#[inline(always)]
fn frame(ctx: &ProbeContext) -> u64 {
    // SAFETY: the context is valid for this program's run.
    unsafe { (*ctx.regs).rsp }.wrapping_add(SITE_FRAME_OFFSET)
}

/// What is at `place`. None, and counted, if that is no memory.
#[inline(always)]
fn read<T>(hit: &Hit, place: u64) -> Option<T> {
    // SAFETY: reads the target's memory, and says so if that fails.
    match unsafe { bpf_probe_read_user(place as *const T) } {
        Ok(value) => Some(value),
        Err(_) => {
            count(hit.slot, DropReason::ResultUnreadable);
            None
        }
    }
}

/// The block that was handed out, if it is sampled, and the frame of the caller.
#[inline(always)]
fn sampled(ctx: &ProbeContext, hit: &Hit) -> Option<(SampledBlock, Start)> {
    let place = frame(ctx);
    let frame: SiteFrame = read(hit, place)?;
    let is_function = Function::from_code(frame.function as u8).is_some();
    if frame.address == 0 || frame.function > u32::from(u8::MAX) || !is_function {
        count(hit.slot, DropReason::ResultUnreadable);
        return None;
    }
    let mut interval = frame.interval_bytes;
    if interval == 0 {
        // The stub had no gap left. The process has no memory, so that what is decided
        // afresh goes with what the gaps before and after decide. No call is counted here
        // that would give random bits as elsewhere.
        //
        // One read, so that decision and weight agree while the daemon changes it.
        interval = hit.target.sample_interval_bytes;
        // SAFETY: takes nothing, returns a number.
        if !should_sample(frame.size_bytes, interval, || unsafe {
            bpf_get_prandom_u32()
        }) {
            return None;
        }
    }
    if interval > MAX_SAMPLE_INTERVAL_BYTES {
        interval = MAX_SAMPLE_INTERVAL_BYTES;
    }
    let block = SampledBlock {
        address: frame.address,
        size_bytes: frame.size_bytes,
        sample_interval_bytes: interval,
        function: frame.function,
        reserved: 0,
    };
    let start = Start {
        ip: frame.return_address,
        // The return address is the frame's last word.
        sp: place.wrapping_add(size_of::<SiteFrame>() as u64),
        // SAFETY: the context is valid for this program's run.
        bp: unsafe { (*ctx.regs).rbp },
        leaf: 0,
    };
    Some((block, start))
}

/// A `realloc` begins. Its old block leaves the live map now: another thread may be given
/// the address before the call returns.
#[inline(always)]
fn take(hit: &Hit, old: u64) {
    let thread = current_thread();
    let key = hit.live_key(old);
    match live::remove(hit.slot, &key) {
        // If there is no room to keep it, a failure cannot give it back.
        Some(value) => {
            if !in_flight::keep_taken(thread, &TakenBlock { key, value }) {
                count(hit.slot, DropReason::InFlightFull);
            }
        }
        // What an earlier call took, which did not fail, is not this one's.
        None => in_flight::drop_taken(thread),
    }
}

/// A `realloc` has failed: the block that it took is as it was.
#[inline(always)]
fn restore(ctx: &ProbeContext, hit: &Hit) {
    let Some(mut taken) = in_flight::hand_back(current_thread()) else {
        return;
    };
    // This word alone: two programs that call each other have 512 bytes of stack.
    let place = frame(ctx).wrapping_add(offset_of!(SiteFrame, old_pointer) as u64);
    let Some(old_pointer) = read(hit, place) else {
        return;
    };
    if taken.key == hit.live_key(old_pointer) {
        live::restore(hit.slot, &taken.key, &mut taken.value);
    }
}
