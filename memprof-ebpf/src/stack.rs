//! The stack of the current call, and its name.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::BPF_F_USER_STACK, bindings::BPF_NOEXIST, helpers::generated::bpf_get_stack,
    programs::RetProbeContext,
};
use memprof_common::{
    config::{TargetConfig, Unwind},
    counters::DropReason,
    limits::{CAPTURE_BUFFERS, MAX_STACK_DEPTH},
    stack::{StackHasher, StackKey, StackRecord},
    unwind::{
        cache::RuleCache,
        walk::{END_MASK, StackEnd},
    },
};

use crate::{
    atomic,
    counters::count,
    hit::Hit,
    maps::{RULES, SCRATCH, STACKS},
    stack_copy,
    tail_calls::Turn,
    unwind::{self, Walking},
};

/// Registers of the frame that a stack begins with: the allocator's caller, as they are
/// when the call has returned to it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Start {
    pub(crate) ip: u64,
    pub(crate) sp: u64,
    pub(crate) bp: u64,
    /// A frame before that, if it is not 0: the function that was called.
    pub(crate) leaf: u64,
}

impl Start {
    /// Where a return probe has hit: then the instruction pointer is the caller's, and
    /// the callee-saved registers, the frame pointer among them, are the caller's again.
    #[inline(always)]
    pub(crate) fn at_return(ctx: &RetProbeContext) -> Self {
        // SAFETY: the context is valid for this program's run.
        unsafe {
            Self {
                ip: (*ctx.regs).rip,
                sp: (*ctx.regs).rsp,
                bp: (*ctx.regs).rbp,
                leaf: 0,
            }
        }
    }
}

/// Buffers too large for the BPF stack (512 bytes). A task claims one by an
/// atomic exchange, so that a task that preempts it takes another.
#[repr(C)]
pub(crate) struct Scratch {
    claimed: [u64; CAPTURE_BUFFERS],
    turns: [Turn; CAPTURE_BUFFERS],
    captures: [Capture; CAPTURE_BUFFERS],
}

/// A walk, and what it finds.
#[repr(C)]
pub(crate) struct Capture {
    pub(crate) walking: Walking,
    pub(crate) record: StackRecord,
}

const _: () = assert!(size_of::<Scratch>() <= 32 << 10, "per-CPU value limit");

/// A claimed buffer. To be released on every path: nothing is dropped by itself where a
/// tail call leaves.
pub(crate) struct Buffer {
    scratch: *mut Scratch,
    index: usize,
}

impl Buffer {
    /// Claims one, if one is free.
    #[inline(always)]
    pub(crate) fn claim() -> Option<Self> {
        let scratch = SCRATCH.get_ptr_mut(0)?;
        let mut index = 0;
        while index < CAPTURE_BUFFERS {
            // SAFETY: the pointer is to a map value and the index is in bounds.
            if unsafe { atomic::claim(&raw mut (*scratch).claimed[index]) } == 0 {
                break;
            }
            index += 1;
        }
        Self::at(scratch, index)
    }

    /// The one that `thread` has claimed, and has written so.
    #[inline(always)]
    pub(crate) fn of(thread: u64) -> Option<Self> {
        let scratch = SCRATCH.get_ptr_mut(0)?;
        let mut index = 0;
        while index < CAPTURE_BUFFERS {
            // SAFETY: as above. Volatile: tasks that this one has preempted write theirs.
            if unsafe { (&raw const (*scratch).turns[index].owner).read_volatile() } == thread {
                break;
            }
            index += 1;
        }
        Self::at(scratch, index)
    }

    /// The buffer at `index`, which the verifier is not to know: or it would look at all
    /// that follows once for each.
    #[inline(always)]
    fn at(scratch: *mut Scratch, index: usize) -> Option<Self> {
        if index >= CAPTURE_BUFFERS {
            return None;
        }
        // SAFETY: the pointer is to a map value and the index is in bounds; the claim
        // makes this task the record's only user, so that both words are one.
        let difference = unsafe {
            let ours = &raw const (*scratch).captures[index].record.depth;
            ours.read_volatile().wrapping_sub(ours.read_volatile())
        };
        Some(Self {
            scratch,
            index: index.wrapping_add(difference as usize) & (CAPTURE_BUFFERS - 1),
        })
    }

    /// What programs of one walk tell each other.
    #[inline(always)]
    pub(crate) fn turn(&mut self) -> &mut Turn {
        // SAFETY: the claim makes this task the only user, but for `owner`, which others
        // read and compare with themselves.
        unsafe { &mut (*self.scratch).turns[self.index] }
    }

    /// The walk and what it finds.
    #[inline(always)]
    pub(crate) fn walk(&mut self) -> (&mut Walking, &mut StackRecord) {
        let Capture { walking, record } = self.capture();
        (walking, record)
    }

    #[inline(always)]
    fn capture(&mut self) -> &mut Capture {
        // SAFETY: the claim makes this task the only user.
        unsafe { &mut (*self.scratch).captures[self.index] }
    }

    /// The rules that walks in this buffer have found. It is there.
    #[inline(always)]
    fn rules(&mut self) -> Option<*mut RuleCache> {
        RULES.get_ptr_mut(self.index as u32)
    }

    /// Gives it back.
    #[inline(always)]
    pub(crate) fn release(self) {
        // SAFETY: as for the claim. A plain store of an aligned word.
        unsafe { (&raw mut (*self.scratch).claimed[self.index]).write_volatile(0) };
    }
}

/// Captures the stack and returns its name, [`StackKey::UNKNOWN`] if that
/// failed; the cause is counted.
#[inline(always)]
pub(crate) fn capture(ctx: *mut c_void, start: &Start, hit: &Hit) -> StackKey {
    let Some(mut buffer) = Buffer::claim() else {
        count(hit.slot, DropReason::ScratchBusy);
        return StackKey::UNKNOWN;
    };
    let rules = buffer.rules();
    let capture = buffer.capture();
    let key = if !unwind::is_possible() || is_kernels(hit) {
        ask_kernel(ctx, start, hit.target, &mut capture.record)
    } else {
        rules.map(|rules| unwind::walk(start, hit, capture, rules))
    };
    let key = remember(start, hit, &capture.record, key);
    buffer.release();
    key
}

/// Whether the kernel is to walk.
#[inline(always)]
pub(crate) fn is_kernels(hit: &Hit) -> bool {
    hit.target.unwind == Unwind::FramePointers as u32
}

/// Puts a captured stack, which is called `key`, into the map of stacks. Its name there;
/// none has a name if it could not be captured.
#[inline(always)]
pub(crate) fn remember(
    start: &Start,
    hit: &Hit,
    record: &StackRecord,
    key: Option<StackKey>,
) -> StackKey {
    let slot = hit.slot;
    let Some(key) = key else {
        count(slot, DropReason::StackUnreadable);
        return StackKey::UNKNOWN;
    };
    if let Some(reason) = loss(record.end) {
        count(slot, reason);
    }
    stack_copy::send(start, hit, record);

    // A known stack is the common case.
    if STACKS.get_ptr(key).is_some() {
        return key;
    }
    if STACKS.insert(key, record, u64::from(BPF_NOEXIST)).is_err()
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
///
/// The kernel begins with the instruction pointer and goes on with what the frame pointer
/// leads to. So the first frame alone may be another than the one to begin with, which
/// has the same frame pointer.
#[inline(always)]
pub(crate) fn ask_kernel(
    ctx: *mut c_void,
    start: &Start,
    target: &TargetConfig,
    record: &mut StackRecord,
) -> Option<StackKey> {
    let mut wanted = target.stack_depth as u64;
    // One frame more than wanted tells whether the stack goes on.
    let mut bytes = (wanted + 1) * 8;
    let mut depth = 0;
    let got;
    if start.leaf == 0 {
        if bytes > (MAX_STACK_DEPTH * 8) as u64 {
            bytes = (MAX_STACK_DEPTH * 8) as u64;
        }
        // SAFETY: `bytes` is at most the size of `frames`.
        got = unsafe {
            bpf_get_stack(
                ctx,
                record.frames.as_mut_ptr().cast(),
                bytes as u32,
                u64::from(BPF_F_USER_STACK),
            )
        };
        record.frames[0] = start.ip;
    } else {
        if bytes > (MAX_STACK_DEPTH * 8 - 8) as u64 {
            bytes = (MAX_STACK_DEPTH * 8 - 8) as u64;
        }
        // SAFETY: `bytes` is at most the size of `frames` without the first.
        got = unsafe {
            bpf_get_stack(
                ctx,
                record.frames.as_mut_ptr().add(1).cast(),
                bytes as u32,
                u64::from(BPF_F_USER_STACK),
            )
        };
        record.frames[0] = start.leaf;
        record.frames[1] = start.ip;
        depth = 1;
        wanted += 1;
    }
    if got < 8 {
        return None;
    }
    depth += (got as u64) / 8;
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
