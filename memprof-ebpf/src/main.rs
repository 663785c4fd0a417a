//! memprof's BPF programs: probes on the entries and returns of a target's
//! allocator, and two tracepoints on its life.
//!
//! Read it in the order of the data path: this file's entry points, then
//! `alloc` (an allocating call from entry to return), `placed` (the same of functions that
//! may throw, and those of pools), `free`, `site` (what the prefilter passes on of both), and
//! what they use:
//! `hit` and `claim` (whose call it is), `totals` (what every call adds to), `in_flight`
//! (calls between entry and return), `stack` and `unwind`, `tail_calls` (the same for old
//! kernels), `live` (sampled blocks not yet freed) and `emit` (the ring).
//!
//! Probe programs run in process context and can be preempted: by another task
//! on the same CPU, never by themselves. So nothing here keeps state in per-CPU
//! memory that another task could overwrite, except behind an atomic claim.

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(
    stable_features,
    reason = "the feature is unstable in the compilers this is built with today"
)]

mod alloc;
mod atomic;
mod claim;
mod counters;
mod emit;
mod free;
mod hit;
mod in_flight;
mod life;
mod live;
mod maps;
mod occupancy;
mod placed;
mod site;
mod stack;
mod stack_copy;
mod tail_calls;
mod totals;
mod unwind;

use core::ffi::c_void;

use aya_ebpf::programs::{ProbeContext, RawTracePointContext, RetProbeContext};

use crate::{alloc::Return, hit::Hit};

/// Entry of a function that hands out blocks, where return probes are attached
/// apart.
///
/// The entry points are written by hand: aya's `#[uprobe]` throws the result
/// away, which the kernel gives a meaning in sessions.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn alloc_entry(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        let _ = alloc::entry(&ProbeContext::new(ctx), &hit);
    }
    0
}

/// Return from a function that hands out blocks.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uretprobe")]
pub extern "C" fn alloc_return(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        alloc::on_return::<false>(&RetProbeContext::new(ctx), &hit);
    }
    0
}

/// As [`alloc_return`], for kernels without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uretprobe")]
pub extern "C" fn alloc_return_tail(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        alloc::on_return::<true>(&RetProbeContext::new(ctx), &hit);
    }
    0
}

/// What [`alloc_return_tail`] calls, and then itself.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uretprobe")]
pub extern "C" fn walk_on(ctx: *mut c_void) -> u32 {
    tail_calls::go_on(ctx);
    0
}

/// Entry of a function that hands out blocks and return from it, by
/// `uprobe.session` (Linux 6.13): a result of 1 at entry says that the return is
/// not to be probed, which spares an unsampled call the second trap.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn alloc_session(ctx: *mut c_void) -> u32 {
    // At return the result means nothing.
    let Some(hit) = Hit::new(ctx) else {
        return 1;
    };
    let entry = ProbeContext::new(ctx);
    if hit.is_entry(&entry) {
        return match alloc::entry(&entry, &hit) {
            Return::Needed => 0,
            Return::NotNeeded => 1,
        };
    }
    alloc::on_return::<false>(&RetProbeContext::new(ctx), &hit);
    0
}

/// Entry of a function that gives blocks up.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn free_entry(ctx: *mut c_void) -> u32 {
    free::entry(&ProbeContext::new(ctx));
    0
}

/// The place at which a function that gives blocks up passes a block on to another that is
/// probed, too: it is one call.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn free_passes_on(ctx: *mut c_void) -> u32 {
    free::passes_on(&ProbeContext::new(ctx));
    0
}

/// Entry of a function that hands out blocks and may throw.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn placed_entry(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        placed::entry(&ProbeContext::new(ctx), &hit);
    }
    0
}

/// A `ret` of such a function.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn placed_return(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        placed::on_return::<false>(&ProbeContext::new(ctx), &hit);
    }
    0
}

/// As [`placed_return`], for kernels without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn placed_return_tail(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        placed::on_return::<true>(&ProbeContext::new(ctx), &hit);
    }
    0
}

/// Return from a pool's function, where it is seen by a return probe.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uretprobe")]
pub extern "C" fn placed_exit(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        placed::on_exit::<false>(&RetProbeContext::new(ctx), &hit);
    }
    0
}

/// As [`placed_exit`], for kernels without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uretprobe")]
pub extern "C" fn placed_exit_tail(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        placed::on_exit::<true>(&RetProbeContext::new(ctx), &hit);
    }
    0
}

/// Entry of a pool's function that gives blocks up.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn placed_free(ctx: *mut c_void) -> u32 {
    if let Some(hit) = Hit::new(ctx) {
        placed::free(&ProbeContext::new(ctx), &hit);
    }
    0
}

/// A site of the prefilter's image, in each way of attaching: which one, the cookie says.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn prefilter_site(ctx: *mut c_void) -> u32 {
    site::pass::<false>(ctx);
    0
}

/// As [`prefilter_site`], for kernels without `bpf_loop`.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn prefilter_site_tail(ctx: *mut c_void) -> u32 {
    site::pass::<true>(ctx);
    0
}

/// Does nothing: the floor that the benchmarks measure against, and the trial of
/// what a return probe does to a program under a seccomp filter.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn empty_entry(_ctx: *mut c_void) -> u32 {
    0
}

/// As [`empty_entry`], at return.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uretprobe")]
pub extern "C" fn empty_return(_ctx: *mut c_void) -> u32 {
    0
}

/// As [`empty_entry`], and in a session the return is not probed.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn empty_session(_ctx: *mut c_void) -> u32 {
    1
}

/// A process has replaced its program.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/sched_process_exec")]
pub extern "C" fn process_exec(ctx: *mut c_void) -> u32 {
    life::exec(&RawTracePointContext::new(ctx));
    0
}

/// A thread ends.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp/sched_process_exit")]
pub extern "C" fn thread_exit(_ctx: *mut c_void) -> u32 {
    life::thread_exit();
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lets only GPL-compatible programs call some of the helpers used
/// here; this section is how a program says so.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
