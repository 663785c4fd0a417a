//! What a program knows of the call that hit its probe, before it looks at it.

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_get_attach_cookie, bpf_get_func_ip},
    programs::ProbeContext,
};
use memprof_common::{
    config::{AttachCookie, TargetConfig, TargetState},
    function::Function,
    live::LiveKey,
    totals::totals_index,
};

use crate::{
    claim,
    maps::{STATES, TARGETS},
};

/// One hit.
pub(crate) struct Hit {
    pub(crate) cookie: AttachCookie,
    pub(crate) slot: u32,
    /// The process.
    pub(crate) pid: u32,
    pub(crate) target: &'static TargetConfig,
    pub(crate) state: *mut TargetState,
    /// The program that the target runs.
    pub(crate) epoch: u32,
}

impl Hit {
    /// None if the daemon has not told of the target, which it does before it
    /// attaches anything; or, of a probe that is every process's, if the process is to be
    /// left alone, or no slot is free.
    #[inline(always)]
    pub(crate) fn new(ctx: *mut core::ffi::c_void) -> Option<Self> {
        // SAFETY: `ctx` is the context that the kernel gave to this program.
        let mut cookie = AttachCookie(unsafe { bpf_get_attach_cookie(ctx) });
        let mut process = 0;
        if cookie.is_shared() {
            process = claim::current_process();
            cookie = cookie.in_slot(claim::slot_of(process)?);
        }
        let slot = cookie.slot();
        let target = TARGETS.get(slot)?;
        let state = STATES.get_ptr_mut(slot)?;
        Some(Self {
            cookie,
            slot,
            // A slot that was claimed a moment ago has no pid in it.
            pid: if process == 0 { target.pid } else { process },
            target,
            state,
            // SAFETY: a map value; written while the target has no other thread.
            epoch: unsafe { (*state).epoch },
        })
    }

    /// In a session: whether this is the entry, not the return. The instruction
    /// pointer is the probe's place at entry, and in the caller at return.
    ///
    /// The kernel tells the place, but asking costs a call; so that of `malloc`,
    /// nearly all of the hits, is remembered. It is no return address as
    /// well: no call ends where the probed instruction begins, as long as the
    /// allocator is not unloaded and its place taken by other code.
    #[inline(always)]
    pub(crate) fn is_entry(&self, ctx: &ProbeContext) -> bool {
        // SAFETY: the context is valid for this program's run.
        let ip = unsafe { (*ctx.regs).rip };
        // SAFETY: a map value, of which every thread writes the same.
        let malloc_ip = unsafe { &raw mut (*self.state).malloc_ip };
        // SAFETY: as above.
        if ip == unsafe { malloc_ip.read_volatile() } {
            return true;
        }
        // SAFETY: the context is the one that the kernel gave to this program.
        if ip != unsafe { bpf_get_func_ip(ctx.as_ptr()) } {
            return false;
        }
        if self.cookie.function_code() == Function::Malloc as u8 {
            // SAFETY: as above.
            unsafe { malloc_ip.write_volatile(ip) };
        }
        true
    }

    /// Whether a call of the target may be inside another.
    #[inline(always)]
    pub(crate) fn may_be_nested(&self) -> bool {
        // SAFETY: a map value. The call that this one may be inside is the same
        // thread's, so its count is visible.
        unsafe { (&raw const (*self.state).nesting_calls).read_volatile() != 0 }
    }

    /// The block at `addr` in the target's present program.
    #[inline(always)]
    pub(crate) fn live_key(&self, addr: u64) -> LiveKey {
        LiveKey {
            pid: self.pid,
            epoch: self.epoch,
            addr,
        }
    }

    /// Where the totals of the target's present program are.
    #[inline(always)]
    pub(crate) fn totals_index(&self) -> u32 {
        totals_index(self.slot, self.epoch)
    }
}
