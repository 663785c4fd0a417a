//! The stack of the current call, and its name.

use aya_ebpf::{
    EbpfContext as _, bindings::BPF_F_USER_STACK, bindings::BPF_NOEXIST,
    helpers::generated::bpf_get_stack, programs::RetProbeContext,
};
use memprof_common::{
    config::{TargetConfig, Unwind},
    counters::DropReason,
    limits::MAX_STACK_DEPTH,
    stack::{StackHasher, StackKey, StackRecord},
    unwind::walk::{END_MASK, StackEnd},
};

use crate::{
    atomic,
    counters::count,
    hit::Hit,
    maps::{SCRATCH, STACKS},
    stack_copy,
    unwind::{self, Walking},
};

/// How many tasks can capture a stack on one CPU at the same time, each but the
/// last preempted in the middle.
const BUFFERS: usize = 4;

/// Buffers too large for the BPF stack (512 bytes). A task claims one by an
/// atomic exchange, so that a task that preempts it takes another.
#[repr(C)]
pub(crate) struct Scratch {
    claimed: [u64; BUFFERS],
    walks: [Walking; BUFFERS],
    records: [StackRecord; BUFFERS],
}

const _: () = assert!(size_of::<Scratch>() <= 32 << 10, "per-CPU value limit");

/// Captures the stack and returns its name, [`StackKey::UNKNOWN`] if that
/// failed; the cause is counted.
///
/// To be called at return: then the instruction pointer is the caller's, and the
/// callee-saved registers, the frame pointer among them, are the caller's again.
/// At entry a frame-pointer walk skips the caller.
#[inline(always)]
pub(crate) fn capture(ctx: &RetProbeContext, hit: &Hit) -> StackKey {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return StackKey::UNKNOWN;
    };
    let mut index = 0;
    while index < BUFFERS {
        // SAFETY: the pointer is to a map value and the index is in bounds.
        if unsafe { atomic::claim(&raw mut (*scratch).claimed[index]) } == 0 {
            break;
        }
        index += 1;
    }
    if index >= BUFFERS {
        count(hit.slot, DropReason::ScratchBusy);
        return StackKey::UNKNOWN;
    }
    // SAFETY: the claim makes this task the walk's and the record's only user.
    let index = unsafe { hide(index, &raw const (*scratch).records[index].depth) };
    // SAFETY: as above.
    let (walk, record) = unsafe { (&mut (*scratch).walks[index], &mut (*scratch).records[index]) };
    let key = capture_into(ctx, hit, walk, record);
    // SAFETY: as for the claim. A plain store of an aligned word.
    unsafe { (&raw mut (*scratch).claimed[index]).write_volatile(0) };
    key
}

/// `index`, of which the verifier does not know any more which it is: or it would look at
/// all that follows once for each buffer. `ours` is a place that nobody else writes.
#[inline(always)]
unsafe fn hide(index: usize, ours: *const u32) -> usize {
    // SAFETY: the caller's.
    let (once, twice) = unsafe { (ours.read_volatile(), ours.read_volatile()) };
    index.wrapping_add(once.wrapping_sub(twice) as usize) & (BUFFERS - 1)
}

#[inline(always)]
fn capture_into(
    ctx: &RetProbeContext,
    hit: &Hit,
    walk: &mut Walking,
    record: &mut StackRecord,
) -> StackKey {
    let slot = hit.slot;
    let key = if !unwind::is_possible() || hit.target.unwind == Unwind::FramePointers as u32 {
        ask_kernel(ctx, hit.target, record)
    } else {
        Some(unwind::walk(ctx, hit, walk, record))
    };
    let Some(key) = key else {
        count(slot, DropReason::StackUnreadable);
        return StackKey::UNKNOWN;
    };
    if let Some(reason) = loss(record.end) {
        count(slot, reason);
    }
    stack_copy::send(ctx, hit, record);

    // A known stack is the common case.
    if STACKS.get_ptr(key).is_some() {
        return key;
    }
    if STACKS.insert(key, &*record, u64::from(BPF_NOEXIST)).is_err()
        // Another CPU may have been faster.
        && STACKS.get_ptr(key).is_none()
    {
        count(slot, DropReason::StackMapFull);
        return StackKey::UNKNOWN;
    }
    key
}

/// What an end means for the losses; none of a stack that is whole, or of which
/// nothing is known.
#[inline(always)]
fn loss(end: u32) -> Option<DropReason> {
    const TRUNCATED: u32 = StackEnd::Truncated as u32;
    const NO_UNWIND_INFO: u32 = StackEnd::NoUnwindInfo as u32;
    const UNKNOWN_MAPPING: u32 = StackEnd::UnknownMapping as u32;
    const UNSUPPORTED_RULE: u32 = StackEnd::UnsupportedRule as u32;
    const UNREADABLE: u32 = StackEnd::Unreadable as u32;
    const BROKEN_CHAIN: u32 = StackEnd::BrokenChain as u32;
    const STALE_TABLES: u32 = StackEnd::StaleTables as u32;
    const RETURN_PROBE: u32 = StackEnd::ReturnProbe as u32;
    Some(match end & END_MASK {
        TRUNCATED => DropReason::StackTruncated,
        NO_UNWIND_INFO => DropReason::CutNoUnwindInfo,
        UNKNOWN_MAPPING => DropReason::CutUnknownMapping,
        UNSUPPORTED_RULE => DropReason::CutUnsupportedRule,
        UNREADABLE => DropReason::CutUnreadable,
        BROKEN_CHAIN => DropReason::CutBrokenChain,
        STALE_TABLES => DropReason::CutStaleTables,
        RETURN_PROBE => DropReason::CutReturnProbe,
        _ => return None,
    })
}

/// Has the kernel follow frame pointers. None if it could not.
#[inline(always)]
fn ask_kernel(
    ctx: &RetProbeContext,
    target: &TargetConfig,
    record: &mut StackRecord,
) -> Option<StackKey> {
    let wanted = target.stack_depth as u64;
    // One frame more than wanted tells whether the stack goes on.
    let mut bytes = (wanted + 1) * 8;
    if bytes > (MAX_STACK_DEPTH * 8) as u64 {
        bytes = (MAX_STACK_DEPTH * 8) as u64;
    }
    // SAFETY: `bytes` is at most the size of `frames`.
    let got = unsafe {
        bpf_get_stack(
            ctx.as_ptr(),
            record.frames.as_mut_ptr().cast(),
            bytes as u32,
            u64::from(BPF_F_USER_STACK),
        )
    };
    if got < 8 {
        return None;
    }
    let mut depth = (got as u64) / 8;
    let mut end = StackEnd::Unverified;
    if depth > wanted || depth >= MAX_STACK_DEPTH as u64 {
        end = StackEnd::Truncated;
        if depth > wanted {
            depth = wanted;
        }
    }
    let mut hasher = StackHasher::new(target.stack_seed);
    let mut index = 0;
    while index < MAX_STACK_DEPTH {
        if index as u64 >= depth {
            break;
        }
        hasher.push(record.frames[index]);
        index += 1;
    }
    record.depth = depth as u32;
    record.end = end as u32;
    Some(hasher.finish(record.depth, record.end))
}
