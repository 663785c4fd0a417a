//! A sample by tail calls, where the kernel has no `bpf_loop`: each program walks a few
//! frames and calls the next, which is given nothing but the context. All else is in the
//! buffer that the first of them has claimed, and the last gives back.
//!
//! Tail calls are one run to the kernel, which lets no run move to another CPU. So the
//! buffer is in this CPU's memory, and is the one whose owner is the running thread: no
//! thread has two, since probe programs do not interrupt themselves.

use core::ffi::c_void;

use aya_ebpf::programs::RetProbeContext;
use memprof_common::{counters::DropReason, limits::MAX_STACK_DEPTH, stack::StackKey};

use crate::{
    alloc::{self, SampledBlock},
    counters::count,
    hit::Hit,
    in_flight::current_thread,
    maps::WALK_ON,
    stack::{self, Buffer, Start},
    unwind::{self, Plan},
};

/// Frames that one program walks, which every verifier has to look through.
const STEPS: usize = 5;

/// How many tail calls a run can make: `MAX_TAIL_CALL_CNT` (include/linux/bpf.h), which
/// was 32 before Linux 5.17 and is 33 since.
const TAIL_CALLS: usize = 32;

const _: () = assert!(
    STEPS * TAIL_CALLS > MAX_STACK_DEPTH,
    "the step after the last frame tells whether the stack is whole"
);

/// What the programs of one walk tell each other.
#[repr(C)]
pub(crate) struct Turn {
    /// The thread that walks; 0 while none does.
    pub(crate) owner: u64,
    plan: Plan,
    /// Where it began.
    start: Start,
    /// What the stack is wanted for.
    block: SampledBlock,
}

impl Turn {
    /// Volatile: others read it, and it is to be 0 before the buffer is free.
    #[inline(always)]
    fn set_owner(&mut self, thread: u64) {
        // SAFETY: a valid reference.
        unsafe { (&raw mut self.owner).write_volatile(thread) };
    }
}

/// Begins the walk to the caller of the block's allocator.
#[inline(always)]
pub(crate) fn begin(ctx: *mut c_void, start: &Start, hit: &Hit, block: &SampledBlock) {
    let Some(mut buffer) = Buffer::claim() else {
        count(hit.slot, DropReason::ScratchBusy);
        alloc::keep(hit, block, StackKey::UNKNOWN);
        return;
    };
    if stack::is_kernels(hit) {
        let key = stack::ask_kernel(ctx, start, hit.target, buffer.walk().1);
        keep(start, hit, buffer, block, key);
        return;
    }
    let (walking, record) = buffer.walk();
    let plan = unwind::begin(start, hit, walking, record);
    let turn = buffer.turn();
    turn.start = *start;
    turn.block = *block;
    turn.plan = plan;
    turn.set_owner(current_thread());
    pass_on(ctx, start, hit, buffer, &plan, block);
}

/// Goes on with the walk that the running thread has begun.
#[inline(always)]
pub(crate) fn go_on(ctx: *mut c_void) {
    let (hit, buffer) = (Hit::new(ctx), Buffer::of(current_thread()));
    let (hit, mut buffer) = match (hit, buffer) {
        (Some(hit), Some(buffer)) => (hit, buffer),
        // Neither can be: both were there when the walk began.
        (None, Some(buffer)) => return release(buffer),
        (Some(hit), None) => return count(hit.slot, DropReason::ScratchBusy),
        (None, None) => return,
    };
    let turn = buffer.turn();
    let (plan, start, block) = (turn.plan, turn.start, turn.block);
    let mut step = 0;
    while step < STEPS {
        let (walking, record) = buffer.walk();
        if !unwind::step(walking, record, &plan) {
            finish(&start, &hit, buffer, &plan, &block);
            return;
        }
        step += 1;
    }
    pass_on(ctx, &start, &hit, buffer, &plan, &block);
}

/// Has the next program go on; what it needs is in the buffer.
#[inline(always)]
fn pass_on(
    ctx: *mut c_void,
    start: &Start,
    hit: &Hit,
    mut buffer: Buffer,
    plan: &Plan,
    block: &SampledBlock,
) {
    // SAFETY: nothing here waits to be dropped.
    unsafe { WALK_ON.tail_call(&RetProbeContext::new(ctx), 0) };
    // There have been too many, or the daemon is ending and has taken the program away.
    buffer.walk().0.cut();
    finish(start, hit, buffer, plan, block);
}

/// The walk is over.
#[inline(always)]
fn finish(start: &Start, hit: &Hit, mut buffer: Buffer, plan: &Plan, block: &SampledBlock) {
    let (walking, record) = buffer.walk();
    let key = unwind::end(hit, walking, record, plan);
    keep(start, hit, buffer, block, Some(key));
}

/// The stack has been captured, or could not be.
#[inline(always)]
fn keep(start: &Start, hit: &Hit, mut buffer: Buffer, block: &SampledBlock, key: Option<StackKey>) {
    let stack = stack::remember(start, hit, buffer.walk().1, key);
    release(buffer);
    alloc::keep(hit, block, stack);
}

/// Nobody's first, free then: its next user is not to be found by our name.
#[inline(always)]
fn release(mut buffer: Buffer) {
    buffer.turn().set_owner(0);
    buffer.release();
}
