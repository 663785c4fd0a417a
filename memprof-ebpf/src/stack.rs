//! The stack of the current call, and its name.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_USER_STACK, BPF_NOEXIST},
    helpers::generated::bpf_get_stack,
    programs::RetProbeContext,
};
use memprof_common::{
    config::TargetConfig,
    counters::DropReason,
    limits::MAX_STACK_DEPTH,
    stack::{StackHasher, StackKey, StackRecord},
};

use crate::{
    atomic,
    counters::count,
    maps::{SCRATCH, STACKS},
};

/// How many tasks can capture a stack on one CPU at the same time, each but the
/// last preempted in the middle.
const BUFFERS: usize = 4;

/// Buffers too large for the BPF stack (512 bytes). A task claims one by an
/// atomic exchange, so that a task that preempts it takes another.
#[repr(C)]
pub(crate) struct Scratch {
    claimed: [u64; BUFFERS],
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
pub(crate) fn capture(ctx: &RetProbeContext, slot: u32, target: &TargetConfig) -> StackKey {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return StackKey::UNKNOWN;
    };
    let mut index = 0;
    while index < BUFFERS {
        // SAFETY: the pointer is to a map value and the index is in bounds.
        if unsafe { atomic::claim(&raw mut (*scratch).claimed[index]) } == 0 {
            // SAFETY: the claim makes this task the record's only user.
            let record = unsafe { &mut (*scratch).records[index] };
            let key = capture_into(ctx, slot, target, record);
            // SAFETY: as for the claim. A plain store of an aligned word.
            unsafe { (&raw mut (*scratch).claimed[index]).write_volatile(0) };
            return key;
        }
        index += 1;
    }
    count(slot, DropReason::ScratchBusy);
    StackKey::UNKNOWN
}

#[inline(always)]
fn capture_into(
    ctx: &RetProbeContext,
    slot: u32,
    target: &TargetConfig,
    record: &mut StackRecord,
) -> StackKey {
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
        count(slot, DropReason::StackUnreadable);
        return StackKey::UNKNOWN;
    }
    let mut depth = (got as u64) / 8;
    let truncated = depth > wanted || depth >= MAX_STACK_DEPTH as u64;
    if truncated {
        count(slot, DropReason::StackTruncated);
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
    let key = hasher.finish(depth);

    // A known stack is the common case.
    if STACKS.get_ptr(key).is_some() {
        return key;
    }
    record.depth = depth as u32;
    record.truncated = truncated as u32;
    if STACKS.insert(key, &*record, u64::from(BPF_NOEXIST)).is_err()
        // Another CPU may have been faster.
        && STACKS.get_ptr(key).is_none()
    {
        count(slot, DropReason::StackMapFull);
        return StackKey::UNKNOWN;
    }
    key
}
