//! System calls that end when their thread is stopped, and are made again.
//!
//! The kernel itself makes most interrupted calls again, if no signal handler has run.
//! Those below it ends with EINTR whenever their thread is stopped (signal(7),
//! "Interruption of system calls and library functions by stop signals"), and their
//! programs may take that for a signal. So a thread at the exit of such a call, with
//! EINTR and no signal to take, is set back to the call. Nothing has been done by a call
//! that ends with EINTR, **but its time-out begins anew**.

use std::ffi::c_long;

use nix::errno::Errno;

use super::{
    ptrace, remote,
    step::{self, Step},
    stop::Thread,
};
use crate::process::info::read_status;

const EINTR: u64 = (-(libc::EINTR as i64)).cast_unsigned();
/// `syscall`, the instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Always, or on sockets that have a time-out (`SO_RCVTIMEO`, `SO_SNDTIMEO`), or of
/// drivers and file systems that know no better.
const CALLS: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    libc::SYS_io_uring_enter,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
];

/// Sets a thread back to the call that the stop has ended, if it was one of these.
pub(super) fn set_back(thread: &Thread) -> Result<(), Errno> {
    let registers = &thread.registers;
    let is_ended = registers.rax == EINTR
        && CALLS
            .iter()
            .any(|call| call.cast_unsigned() == registers.orig_rax);
    // A signal had stopped the whole process before: that has ended the call.
    if !is_ended || thread.by_group || has_signal(thread.tid) {
        return Ok(());
    }
    let at = registers.rip.wrapping_sub(SYSCALL.len() as u64);
    let mut instruction = [0; SYSCALL.len()];
    if remote::read(thread.tid, at, &mut instruction).is_err() || instruction != SYSCALL {
        return Ok(());
    }
    // The mask of epoll_pwait is in force still, and the thread's own saved. That is
    // restored first: else a signal could come in now whose handler runs before the call
    // begins anew, which would then wait for what has been. Begun anew, it sees it.
    let mask = ptrace::signal_mask(thread.tid)?;
    let mut again = *registers;
    again.rip = at;
    again.rax = registers.orig_rax;
    // No call: nothing for the kernel to make again.
    again.orig_rax = u64::MAX;
    ptrace::set_registers(thread.tid, &again)?;
    ptrace::set_signal_mask(thread.tid, mask)?;
    step::done(Step::SetBack);
    Ok(())
}

/// Whether a signal is pending that the thread does not block now. It ends the call for
/// its own sake. Also if that cannot be told.
fn has_signal(tid: u32) -> bool {
    let Ok(status) = read_status(tid) else {
        return true;
    };
    let set = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    match (set("SigPnd:"), set("ShdPnd:"), set("SigBlk:")) {
        (Some(own), Some(shared), Some(blocked)) => (own | shared) & !blocked != 0,
        _ => true,
    }
}
