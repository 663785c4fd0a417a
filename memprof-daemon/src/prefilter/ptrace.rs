//! ptrace(2) and waitpid(2) for single threads.
//!
//! nix knows no real-time signals: its `waitpid` takes a stop by one and then fails,
//! and the signal is lost. So statuses and signals are plain numbers here.

use std::{ffi::c_int, ptr};

use libc::user_regs_struct;
use nix::{errno::Errno, sys::ptrace as nix_ptrace, unistd::Pid};

/// `PTRACE_EVENT_STOP` (include/uapi/linux/ptrace.h); libc has it for uclibc only.
const EVENT_STOP: c_int = 128;
/// `PTRACE_O_SUSPEND_SECCOMP` (the same file).
const SUSPEND_SECCOMP: c_int = 1 << 21;
/// `PTRACE_GETSIGMASK`, `PTRACE_SETSIGMASK`: the kernel's set is of 8 bytes.
const MASK_BYTES: usize = 8;
/// `PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG`, since Linux 6.4.
const GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
/// `NT_X86_XSTATE` (include/uapi/linux/elf.h).
const NT_X86_XSTATE: usize = 0x202;
/// More than any processor's state: that of AMX is 11 KiB.
const XSTATE_ROOM: usize = 64 * 1024;

/// What a traced thread has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It has stopped because it was asked to; by a signal for the whole process, if it is
    /// one that stops it.
    Stopped { by_group: bool },
    /// It has stopped before a signal, which it gets if it is continued with it.
    Signal(c_int),
    /// It has stopped at a system call's entry or exit.
    Syscall,
    /// It has stopped for something else.
    Other,
    /// It is no more, or not a traced thread any more.
    Gone,
}

fn raw(tid: u32) -> Pid {
    Pid::from_raw(tid.cast_signed())
}

/// Traces `tid`, without stopping it.
///
/// `PTRACE_O_TRACESYSGOOD` is more than convenience: should we die while the thread is
/// stopped at a system call, the kernel sends it the signal it has stopped with
/// (include/linux/ptrace.h, `ptrace_report_syscall`), which is then none, and would be a
/// deadly SIGTRAP otherwise.
pub(super) fn seize(tid: u32) -> Result<(), Errno> {
    nix_ptrace::seize(raw(tid), nix_ptrace::Options::PTRACE_O_TRACESYSGOOD)
}

/// Asks `tid` to stop.
pub(super) fn interrupt(tid: u32) -> Result<(), Errno> {
    nix_ptrace::interrupt(raw(tid))
}

/// Lets the stopped `tid` go on until something else happens; with `signal`, if not 0.
pub(super) fn resume(tid: u32, signal: c_int) -> Result<(), Errno> {
    // SAFETY: `PTRACE_CONT` takes a number as data and writes nothing here.
    unsafe { request(libc::PTRACE_CONT, tid, 0, number(signal)) }
}

/// Lets the stopped `tid` go on until it enters or leaves a system call.
pub(super) fn resume_to_syscall(tid: u32, signal: c_int) -> Result<(), Errno> {
    // SAFETY: as in `resume`.
    unsafe { request(libc::PTRACE_SYSCALL, tid, 0, number(signal)) }
}

/// Lets the stopped `tid` go for good.
pub(super) fn detach(tid: u32) -> Result<(), Errno> {
    nix_ptrace::detach(raw(tid), None)
}

/// Turns off the seccomp filters of the stopped `tid` until it is let go.
pub(super) fn suspend_seccomp(tid: u32) -> Result<(), Errno> {
    let options = libc::PTRACE_O_TRACESYSGOOD | SUSPEND_SECCOMP;
    // SAFETY: `PTRACE_SETOPTIONS` takes a number as data.
    unsafe { request(libc::PTRACE_SETOPTIONS, tid, 0, number(options)) }
}

/// The registers of the stopped `tid`.
pub(super) fn registers(tid: u32) -> Result<user_regs_struct, Errno> {
    nix_ptrace::getregs(raw(tid))
}

/// Sets the registers of the stopped `tid`.
pub(super) fn set_registers(tid: u32, registers: &user_regs_struct) -> Result<(), Errno> {
    nix_ptrace::setregs(raw(tid), *registers)
}

/// The signals that the stopped `tid` blocks: a bit each, signal 1 the lowest.
pub(super) fn signal_mask(tid: u32) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes `MASK_BYTES` to `mask`, which has them.
    unsafe {
        request(
            libc::PTRACE_GETSIGMASK,
            tid,
            MASK_BYTES,
            (&raw mut mask).cast(),
        )?;
    }
    Ok(mask)
}

/// Sets the signals that the stopped `tid` blocks.
pub(super) fn set_signal_mask(tid: u32, mut mask: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads `MASK_BYTES` of `mask`, which has them.
    unsafe {
        request(
            libc::PTRACE_GETSIGMASK + 1,
            tid,
            MASK_BYTES,
            (&raw mut mask).cast(),
        )
    }
}

/// The processor's extended state of the stopped `tid`, as XSAVE writes it.
pub(super) fn extended_state(tid: u32) -> Result<Vec<u8>, Errno> {
    let mut state = vec![0_u8; XSTATE_ROOM];
    let mut vector = libc::iovec {
        iov_base: state.as_mut_ptr().cast(),
        iov_len: state.len(),
    };
    // SAFETY: the kernel writes at most `iov_len` bytes to `state`, and to `vector` how many.
    unsafe {
        request(
            libc::PTRACE_GETREGSET,
            tid,
            NT_X86_XSTATE,
            (&raw mut vector).cast(),
        )?;
    }
    state.truncate(vector.iov_len);
    Ok(state)
}

/// Whether the stopped `tid` has the kernel turn its system calls into signals
/// (prctl(2), `PR_SET_SYSCALL_USER_DISPATCH`). Kernels before 6.4 cannot be asked.
pub(super) fn dispatches_syscalls(tid: u32) -> bool {
    // struct ptrace_sud_config: mode, selector, offset, len.
    let mut config = [0_u64; 4];
    // SAFETY: the kernel writes the 32 bytes that it is told of to `config`.
    let asked = unsafe {
        request(
            GET_SYSCALL_USER_DISPATCH_CONFIG,
            tid,
            size_of_val(&config),
            config.as_mut_ptr().cast(),
        )
    };
    asked.is_ok() && config.first().is_some_and(|&mode| mode != 0)
}

/// Reads 8 bytes at `address`, also where the program itself may not read.
pub(super) fn peek(tid: u32, address: u64) -> Result<[u8; 8], Errno> {
    nix_ptrace::read(raw(tid), ptr::without_provenance_mut(at(address)?)).map(i64::to_ne_bytes)
}

/// Writes 8 bytes at `address`, also where the program itself may not write.
pub(super) fn poke(tid: u32, address: u64, bytes: [u8; 8]) -> Result<(), Errno> {
    let place = ptr::without_provenance_mut(at(address)?);
    nix_ptrace::write(raw(tid), place, i64::from_ne_bytes(bytes))
}

/// What `tid` of process `pid` has done since it was last asked, if anything.
pub(super) fn change(pid: u32, tid: u32) -> Result<Option<Change>, Errno> {
    // The end of a process is for its parent to learn, which the daemon may be.
    if tid == pid && has_ended(tid)? {
        return Ok(Some(Change::Gone));
    }
    let mut status: c_int = 0;
    // SAFETY: the kernel writes one number, to `status`.
    let waited = unsafe {
        libc::waitpid(
            tid.cast_signed(),
            &raw mut status,
            libc::__WALL | libc::WNOHANG,
        )
    };
    match Errno::result(waited) {
        Ok(0) | Err(Errno::EINTR) => Ok(None),
        // Its id went when another thread of its process made execve(2).
        Err(Errno::ECHILD) => Ok(Some(Change::Gone)),
        Err(error) => Err(error),
        Ok(_) => Ok(Some(change_of(status))),
    }
}

fn change_of(status: c_int) -> Change {
    if !libc::WIFSTOPPED(status) {
        return Change::Gone;
    }
    match (status >> 16, libc::WSTOPSIG(status)) {
        (EVENT_STOP, signal) => Change::Stopped {
            by_group: signal != libc::SIGTRAP,
        },
        (0, signal) if signal == libc::SIGTRAP | 0x80 => Change::Syscall,
        (0, signal) => Change::Signal(signal),
        _ => Change::Other,
    }
}

/// Takes note of the end of a traced thread that has ended, also for another thread of
/// ours that traces it. Whether there is nothing more to wait for.
pub(super) fn reap_if_ended(tid: u32) -> bool {
    match has_ended(tid) {
        Ok(true) => {
            // SAFETY: nothing is written. An end is final: this takes no stop from anyone.
            unsafe {
                libc::waitpid(
                    tid.cast_signed(),
                    std::ptr::null_mut(),
                    libc::__WALL | libc::WNOHANG,
                );
            }
            true
        }
        Ok(false) => false,
        Err(_) => true,
    }
}

/// Whether the process has ended; its status stays for its parent.
fn has_ended(pid: u32) -> Result<bool, Errno> {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: an all-zero `siginfo_t` is one, and the kernel writes nothing else.
    let (waited, info) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let waited = libc::waitid(libc::P_PID, pid, &raw mut info, options);
        (waited, info)
    };
    match Errno::result(waited) {
        // Stops of traced threads are told too, whatever is asked for (kernel/exit.c,
        // `wait_consider_task`); with nothing to tell, the code is 0.
        Ok(_) => Ok(matches!(
            info.si_code,
            libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED
        )),
        Err(Errno::ECHILD) => Ok(true),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error),
    }
}

fn at(address: u64) -> Result<usize, Errno> {
    usize::try_from(address).map_err(|_| Errno::EFAULT)
}

fn number(value: c_int) -> *mut libc::c_void {
    ptr::without_provenance_mut(usize::try_from(value).unwrap_or(0))
}

/// # Safety
///
/// `data` is what the request takes: a number, or alive and as long as it says.
unsafe fn request(
    request: u32,
    tid: u32,
    address: usize,
    data: *mut libc::c_void,
) -> Result<(), Errno> {
    // SAFETY: the caller's duty; `address` is a number in all requests made here.
    let result = unsafe {
        libc::ptrace(
            request,
            tid.cast_signed(),
            ptr::without_provenance_mut::<libc::c_void>(address),
            data,
        )
    };
    Errno::result(result).map(drop)
}
