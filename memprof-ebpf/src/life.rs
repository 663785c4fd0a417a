//! The life of targets: what makes their blocks and calls vanish.

use aya_ebpf::{EbpfContext as _, programs::RawTracePointContext};
use aya_log_ebpf::{info, warn};
use memprof_common::{config::NO_SLOT, counters::DropReason};

use crate::{
    counters::count,
    emit,
    in_flight::{current_thread, forget, thread_of},
    maps::{SLOTS, STATES},
};

/// `execve` succeeded: every block of the old program is gone.
#[inline(always)]
pub(crate) fn exec(ctx: &RawTracePointContext) {
    let pid = ctx.tgid();
    // SAFETY: the daemon writes the entry before it attaches anything.
    let Some(&slot) = (unsafe { SLOTS.get(pid) }) else {
        return;
    };
    if slot == NO_SLOT {
        // Another program, which may be one that is to be traced.
        let _ = SLOTS.remove(pid);
        return;
    }
    // The call that `execve` interrupted in another thread, or left in this one.
    forget(current_thread());
    // `trace_sched_process_exec(current, old_pid, bprm)` in `fs/exec.c`: the
    // thread's id before it took that of the first thread.
    let old_thread = ctx.arg::<u32>(1);
    let by_other_thread = old_thread != pid;
    if by_other_thread {
        forget(thread_of(pid, old_thread));
    }
    let Some(state) = STATES.get_ptr_mut(slot) else {
        return;
    };
    // SAFETY: a map value. A process that has reached this tracepoint has one
    // thread left, and nobody else writes its epoch.
    let epoch = unsafe {
        (*state).epoch = (*state).epoch.wrapping_add(1);
        (*state).malloc_ip = 0;
        (*state).epoch
    };
    info!(
        ctx,
        "process {} has replaced its program (epoch {})", pid, epoch
    );
    // Fails for no name that the kernel has.
    let comm = ctx.command().unwrap_or_default();
    if !emit::exec(pid, epoch, by_other_thread, comm) {
        warn!(ctx, "no room in the ring for the exec of process {}", pid);
        count(slot, DropReason::ExecRingFull);
    }
}

/// A thread that is killed inside the allocator never returns from it, and its
/// id will be another thread's.
#[inline(always)]
pub(crate) fn thread_exit() {
    forget(current_thread());
}
