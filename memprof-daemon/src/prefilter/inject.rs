//! System calls made by a thread of another process.
//!
//! # How
//!
//! The thread stands still, stopped by ptrace(2). Below the red zone of its stack a frame
//! is written ([`super::frame`]) with all it needs to go on as if nothing had been. Then
//! it is *parked*: its registers are set to a `syscall; ret` of its own code, with
//! rt_sigreturn(2) for a call and that frame on its stack. Should nobody be there to hold
//! it any more, it takes the frame back and goes on.
//!
//! A call: the parked thread goes to the entry of rt_sigreturn(2), is stopped there, and
//! the call is exchanged for the one that is wanted. At its exit it is stopped again, and
//! parked again for the next. If it is let go meanwhile, the `ret` behind the call leads
//! to rt_sigreturn(2) again: the word the stack pointer is at, the first of the frame, is
//! the address of what makes it.
//!
//! No step is ever made by the processor's trap flag: SIGTRAP could change what the
//! program has that signal do.
//!
//! All signals are blocked meanwhile, so that no handler runs between; they stay pending.
//!
//! At the end it is asked to stop once more, where the kernel ends calls that have been
//! interrupted, and gets its first registers back: the kernel then makes the call again
//! that the thread was in, as after any stop.

use std::{
    thread,
    time::{Duration, Instant},
};

use libc::user_regs_struct;
use nix::errno::Errno;

use super::{
    frame::{Frame, FrameError, SCRATCH_BYTES},
    gadgets::Gadgets,
    ptrace::{self, Change},
    remote,
    step::{self, Step},
    stop::{Stopped, Thread},
    victim,
};

/// Between two looks at a thread in a call.
const SHORTEST_PAUSE: Duration = Duration::from_micros(2);
const LONGEST_PAUSE: Duration = Duration::from_micros(50);
/// For a call, also where little of the time to stop is left: to let go in its midst
/// costs more than to wait.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Results from here on are negated errors (include/linux/err.h, `MAX_ERRNO`).
const FIRST_ERROR: u64 = (-4095_i64).cast_unsigned();
const RT_SIGRETURN: u64 = libc::SYS_rt_sigreturn.cast_unsigned();
const ENOSYS: u64 = (-(libc::ENOSYS as i64)).cast_unsigned();
/// `orig_rax` of a thread that is in no call.
const NO_CALL: u64 = u64::MAX;

/// Why calls were not made. The process goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The code that calls are made with is nowhere.
    #[error("pid {pid} maps no file with the instructions `syscall; ret` and rt_sigreturn")]
    NoGadgets {
        /// The process.
        pid: u32,
    },
    /// No thread is fit for it now.
    #[error("no thread of pid {pid} stands where calls can be made on its own stack")]
    NoVictim {
        /// The process.
        pid: u32,
    },
    /// It is under seccomp, and the kernel does not suspend it.
    #[error("pid {pid} is under seccomp, which this kernel does not suspend: {source}")]
    Seccomp {
        /// The process.
        pid: u32,
        /// What it said.
        source: Errno,
    },
    /// No frame can be made.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A call failed in the target.
    #[error("{what} in the target: {source}")]
    Call {
        /// Which.
        what: String,
        /// How.
        source: Errno,
    },
    /// A call does not end.
    #[error("{what} in the target does not end")]
    Timeout {
        /// Which.
        what: String,
    },
    /// More than the scratch memory holds.
    #[error("{bytes} bytes do not fit the {SCRATCH_BYTES} of scratch memory")]
    Scratch {
        /// How many.
        bytes: usize,
    },
    /// It has ended.
    #[error("pid {pid} has ended")]
    Ended {
        /// The process.
        pid: u32,
    },
    /// A request failed.
    #[error("cannot make calls in thread {tid} of pid {pid}: {source}")]
    Trace {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
        /// What the kernel said.
        source: Errno,
    },
}

/// A thread that makes calls.
#[derive(Debug)]
pub struct Calls {
    pid: u32,
    original: Thread,
    mask: u64,
    frame: Frame,
    gadgets: Gadgets,
    /// It does not stand where it was first stopped any more.
    has_moved: bool,
    /// It was held at a system call's exit, and stays so.
    is_held: bool,
    deadline: Instant,
}

impl Stopped {
    /// Makes calls in one of its threads.
    ///
    /// # Errors
    ///
    /// [`InjectError`], or what `work` fails with. The thread goes on as before.
    pub fn inject<T>(
        &mut self,
        work: impl FnOnce(&mut Calls) -> Result<T, InjectError>,
    ) -> Result<T, InjectError> {
        let mut calls = Calls::begin(self)?;
        let result = work(&mut calls);
        let ended = calls.end();
        // What has gone wrong first is the cause of the rest.
        let result = result?;
        ended.map(|()| result)
    }
}

impl Calls {
    fn begin(stopped: &Stopped) -> Result<Self, InjectError> {
        let pid = stopped.pid();
        let gadgets = stopped.gadgets.ok_or(InjectError::NoGadgets { pid })?;
        let original = stopped.victim().ok_or(InjectError::NoVictim { pid })?;
        let tid = original.tid;
        if !gadgets.are_there(tid) {
            return Err(InjectError::NoGadgets { pid });
        }
        if stopped.is_held && victim::is_confined(tid) {
            // To suspend them would replace the options of who holds it.
            return Err(InjectError::Seccomp {
                pid,
                source: Errno::EBUSY,
            });
        }
        if victim::is_confined(tid) {
            ptrace::suspend_seccomp(tid).map_err(|source| InjectError::Seccomp { pid, source })?;
        }
        let failed = |error| failed(pid, tid, error);
        let mask = ptrace::signal_mask(tid).map_err(failed)?;
        let state = ptrace::extended_state(tid).map_err(failed)?;
        let frame = Frame::new(&original.registers, mask, &state, gadgets.sigreturn)?;
        remote::write(tid, frame.address, &frame.bytes).map_err(failed)?;
        step::done(Step::FrameWritten);
        let calls = Self {
            pid,
            original,
            mask,
            frame,
            gadgets,
            has_moved: false,
            is_held: stopped.is_held,
            deadline: stopped.deadline.max(Instant::now() + CALL_TIMEOUT),
        };
        // In this order: the frame has the thread's own mask, so a parked thread with all
        // signals blocked can be let go, but one that is not parked could not.
        calls.park()?;
        ptrace::set_signal_mask(tid, u64::MAX).map_err(failed)?;
        step::done(Step::SignalsBlocked);
        Ok(calls)
    }

    fn tid(&self) -> u32 {
        self.original.tid
    }

    fn failed(&self, error: Errno) -> InjectError {
        failed(self.pid, self.tid(), error)
    }

    /// Sets the thread to take its frame back when it is let go.
    fn park(&self) -> Result<(), InjectError> {
        let registers = user_regs_struct {
            rip: self.gadgets.call,
            rax: RT_SIGRETURN,
            orig_rax: NO_CALL,
            rsp: self.frame.stack_pointer_to_return(),
            ..self.original.registers
        };
        ptrace::set_registers(self.tid(), &registers).map_err(|error| self.failed(error))?;
        step::done(Step::Parked);
        Ok(())
    }

    /// Makes the system call `number`, and gives back what it returns.
    ///
    /// # Errors
    ///
    /// [`InjectError::Call`] if it fails in the target; or it could not be made.
    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Result<u64, InjectError> {
        let what = || format!("system call {number}");
        if self.has_moved {
            self.park()?;
        }
        self.has_moved = true;
        self.go(ptrace::resume_to_syscall)?;
        let mut registers = self.wait(Change::Syscall, &what)?;
        step::done(Step::AtEntry);
        if (registers.orig_rax, registers.rax) != (RT_SIGRETURN, ENOSYS) {
            // Another stop than it was thought to be: nothing is exchanged then.
            return Err(self.failed(Errno::EPROTO));
        }
        registers.orig_rax = number.cast_unsigned();
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        registers.rdi = rdi;
        registers.rsi = rsi;
        registers.rdx = rdx;
        registers.r10 = r10;
        registers.r8 = r8;
        registers.r9 = r9;
        registers.rsp = self.frame.stack_pointer_before_ret();
        ptrace::set_registers(self.tid(), &registers).map_err(|error| self.failed(error))?;
        step::done(Step::CallChosen);
        self.go(ptrace::resume_to_syscall)?;
        step::done(Step::CallMade);
        let result = self.wait(Change::Syscall, &what)?.rax;
        step::done(Step::AtExit);
        if result >= FIRST_ERROR {
            let errno = i32::try_from(result.wrapping_neg()).unwrap_or(0);
            return Err(InjectError::Call {
                what: what(),
                source: Errno::from_raw(errno),
            });
        }
        Ok(result)
    }

    /// The address of memory for what calls point to; [`Self::write`] fills it.
    #[must_use]
    pub fn scratch(&self) -> u64 {
        self.frame.scratch()
    }

    /// Writes to the scratch memory, from its start on.
    ///
    /// # Errors
    ///
    /// It does not fit.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), InjectError> {
        if bytes.len() as u64 > SCRATCH_BYTES {
            return Err(InjectError::Scratch { bytes: bytes.len() });
        }
        remote::write(self.tid(), self.scratch(), bytes).map_err(|error| self.failed(error))
    }

    /// Gives the thread back what it had.
    fn end(self) -> Result<(), InjectError> {
        let tid = self.tid();
        // A held thread's own call is over, and not to be made again: the exit of one is like
        // that of another.
        if self.has_moved && !self.is_held {
            self.park()?;
            ptrace::interrupt(tid).map_err(|error| self.failed(error))?;
            step::done(Step::Interrupting);
            self.go(ptrace::resume)?;
            let what = || "the end of calls".to_owned();
            self.wait(Change::Stopped { by_group: false }, &what)?;
            step::done(Step::AtLastStop);
        }
        // In this order, as at the beginning.
        ptrace::set_signal_mask(tid, self.mask).map_err(|error| self.failed(error))?;
        step::done(Step::SignalsRestored);
        ptrace::set_registers(tid, &self.original.registers).map_err(|error| self.failed(error))?;
        step::done(Step::RegistersRestored);
        Ok(())
    }

    fn go(&self, how: impl Fn(u32, i32) -> Result<(), Errno>) -> Result<(), InjectError> {
        how(self.tid(), 0).map_err(|error| self.failed(error))
    }

    /// Waits until the thread stands as wanted.
    fn wait(
        &self,
        wanted: Change,
        what: &dyn Fn() -> String,
    ) -> Result<user_regs_struct, InjectError> {
        let is_wanted = |change| match wanted {
            Change::Stopped { .. } => matches!(change, Change::Stopped { .. }),
            _ => change == wanted,
        };
        // The way to where it is wanted.
        let go = match wanted {
            Change::Syscall => ptrace::resume_to_syscall,
            _ => ptrace::resume,
        };
        let mut pause = SHORTEST_PAUSE;
        loop {
            let change = ptrace::change(self.pid, self.tid());
            match change.map_err(|error| self.failed(error))? {
                None if Instant::now() > self.deadline => {
                    return Err(InjectError::Timeout { what: what() });
                }
                None => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Some(Change::Gone) => return Err(InjectError::Ended { pid: self.pid }),
                Some(change) if is_wanted(change) => {
                    return ptrace::registers(self.tid()).map_err(|error| self.failed(error));
                }
                // SIGSTOP cannot be blocked. It stops the others when they are let go,
                // and this one too.
                Some(Change::Signal(signal)) => self.go(|tid, _| go(tid, signal))?,
                Some(_) => self.go(go)?,
            }
        }
    }
}

fn failed(pid: u32, tid: u32, source: Errno) -> InjectError {
    match source {
        Errno::ESRCH => InjectError::Ended { pid },
        _ => InjectError::Trace { pid, tid, source },
    }
}
