//! Starts a command and holds it until its libraries are mapped, so that probes
//! are in place before its first allocation.
//!
//! # Where it is held
//!
//! Behind the first `arch_prctl(ARCH_SET_FS)` or `set_tid_address`.
//! That is when the C library sets up the main thread. Seen by strace on
//! glibc 2.36, in this order:
//!
//! - dynamic (also with a preloaded jemalloc, and redis-server with 18
//!   libraries): `execve`, `brk`, then `openat`, `mmap`s and `close` of each
//!   library, `arch_prctl(ARCH_SET_FS)`, `set_tid_address`, `set_robust_list`,
//!   `rseq`, `mprotect`s (so relocation is done only now), constructors, `main`;
//! - static: `execve`, `brk`, `brk`, `arch_prctl(ARCH_SET_FS)`,
//!   `set_tid_address`, and so on: no library is ever mapped.
//!
//! glibc before 2.34 calls `set_tid_address` only in programs with libpthread,
//! so `arch_prctl` is the one that always comes. musl's loader, which is its C
//! library, makes both calls before it maps other libraries: an allocator in one
//! of those is found only by the mapping event that follows.

use std::{
    io, mem,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus},
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{self, SigSet, SigmaskHow, Signal},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::process::{exit::ExitWatch, info::ProcessError};

/// After this many system calls a program is let go: loaders make about ten for
/// each library.
const MAX_SYSCALLS: u32 = 10_000;

/// `ARCH_SET_FS` (arch/x86/include/uapi/asm/prctl.h).
const ARCH_SET_FS: u64 = 0x1002;

/// Why a command could not be started under observation.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError<E> {
    /// There is no such command; shells exit with 127 then.
    #[error("{command}: command not found")]
    NotFound {
        /// What was to be started.
        command: String,
    },
    /// It is there and cannot be executed; shells exit with 126 then.
    #[error("{command}: cannot execute")]
    NotExecutable {
        /// What was to be started.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// No process could be made.
    #[error("cannot start a process: {0}")]
    Spawn(io::Error),
    /// A ptrace call failed.
    #[error("cannot hold the new process (ptrace): {0}")]
    Trace(#[from] Errno),
    /// The new process cannot be watched.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// It ended before its libraries were loaded.
    #[error("the command ended before it was loaded: {status}")]
    Ended {
        /// How.
        status: ExitStatus,
    },
    /// `on_loaded` failed. The command was killed before any code of its own.
    #[error(transparent)]
    OnLoaded(E),
}

impl<E> LaunchError<E> {
    /// The exit status that a shell would end with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotExecutable { .. } => 126,
            Self::Ended { status } => exit_code(*status),
            _ => 1,
        }
    }
}

/// The exit status that a shell makes of a command's: 128 and the signal's
/// number if one has ended it.
#[must_use]
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code & 0xff).ok())
        .unwrap_or(1)
}

/// Where a command was held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Its libraries were mapped, and no code but the loader's had run.
    Loaded,
    /// It was about to make another process or thread, to replace its program
    /// or to end.
    BeforeSyscall(u64),
    /// It had made 10,000 system calls: it does not use a C library we know.
    AfterManySyscalls,
}

/// A command that runs on its own.
///
/// Dropping it neither ends nor reaps the command.
#[derive(Debug)]
pub struct Launched {
    child: Child,
    watch: ExitWatch,
    held: Held,
}

impl Launched {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it was held while `on_loaded` ran.
    #[must_use]
    pub fn held(&self) -> Held {
        self.held
    }

    /// Its end: wait for [`ExitWatch::exited`], then call [`Self::try_wait`].
    #[must_use]
    pub fn watch(&self) -> &ExitWatch {
        &self.watch
    }

    /// How it ended; none while it runs.
    ///
    /// # Errors
    ///
    /// As [`Child::try_wait`].
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits for its end, and does not return before.
    ///
    /// # Errors
    ///
    /// As [`Child::wait`].
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    ///
    /// As [`Child::kill`].
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }
}

/// Starts `command`, calls `on_loaded` with its pid and where it is held while it is
/// held, and lets it go.
///
/// It blocks, and runs on the calling thread from start to end, `on_loaded`
/// included: Linux takes ptrace calls from the thread that traces only, and
/// that is the one which started the process. In asynchronous code, call it in
/// `spawn_blocking`.
///
/// The command has the standard streams that `command` says, no signal blocked,
/// SIGPIPE at its default (`std::process` sees to both: the Rust runtime ignores
/// SIGPIPE), and ignores what memprof was started ignoring, as under `nohup`.
/// Signals that reach it while it is held are delivered. If this process dies
/// meanwhile, the command dies with it; once let go it lives on.
///
/// # Errors
///
/// The command cannot be executed, ends early, or `on_loaded` fails; no process
/// is left behind then.
pub fn launch<E>(
    mut command: Command,
    on_loaded: impl FnOnce(u32, Held) -> Result<(), E>,
) -> Result<Launched, LaunchError<E>> {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed;
    // `trace_me` makes two bare system calls, and making an io::Error of an
    // errno allocates nothing.
    unsafe { command.pre_exec(|| trace_me().map_err(io::Error::from)) };
    let child = command
        .spawn()
        .map_err(|source| spawn_error(&command, source))?;
    let mut tracee = Tracee {
        child: Some(child),
        stop_signals: Vec::new(),
    };
    let watch = ExitWatch::open(tracee.pid())?;
    let held = tracee.run_to_loaded()?;
    on_loaded(tracee.pid(), held).map_err(LaunchError::OnLoaded)?;
    Ok(Launched {
        child: tracee.release()?,
        watch,
        held,
    })
}

fn spawn_error<E>(command: &Command, source: io::Error) -> LaunchError<E> {
    let name = command.get_program().to_string_lossy().into_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => LaunchError::NotFound { command: name },
        Some(
            libc::EACCES
            | libc::EPERM
            | libc::ENOEXEC
            | libc::EISDIR
            | libc::ELOOP
            | libc::ETXTBSY
            | libc::ENAMETOOLONG
            | libc::E2BIG,
        ) => LaunchError::NotExecutable {
            command: name,
            source,
        },
        _ => LaunchError::Spawn(source),
    }
}

/// Runs in the new process.
///
/// From TRACEME on a signal stops it until its tracer answers, but the tracer
/// still waits in `spawn` for it to exec: so all signals wait till then, but for
/// SIGTRAP, by which exec stops.
fn trace_me() -> Result<(), Errno> {
    let mut mask = SigSet::all();
    mask.remove(Signal::SIGTRAP);
    signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
    ptrace::traceme()
}

/// `PTRACE_SETSIGMASK` with the empty mask that `std::process` gives to
/// commands.
fn unblock_signals(pid: Pid) -> Result<(), Errno> {
    let mask = 0_u64;
    // SAFETY: the request reads as many bytes as the third argument says, and
    // `mask` is that long (kernel/ptrace.c, `ptrace_setsigmask`).
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_SETSIGMASK,
            pid.as_raw(),
            size_of_val(&mask),
            &raw const mask,
        )
    };
    Errno::result(result).map(drop)
}

/// A child that is traced by this thread. Unless it is released it is killed and
/// reaped.
struct Tracee {
    child: Option<Child>,
    /// Stop signals (such as Ctrl-Z) to send once it is released: a process that
    /// is traced this way cannot be stopped and traced on.
    stop_signals: Vec<Signal>,
}

impl Tracee {
    fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    fn nix_pid(&self) -> Pid {
        Pid::from_raw(self.pid().cast_signed())
    }

    fn run_to_loaded<E>(&mut self) -> Result<Held, LaunchError<E>> {
        let pid = self.nix_pid();
        // The stop after exec.
        self.wait_for_stop()?;
        ptrace::setoptions(
            pid,
            Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACESYSGOOD,
        )?;
        unblock_signals(pid)?;
        let mut signal = None;
        let mut stops = 0;
        // Each call stops twice, at its entry and at its exit.
        while stops < 2 * MAX_SYSCALLS {
            ptrace::syscall(pid, signal.take())?;
            let stop = self.wait_for_stop()?;
            match stop {
                Stop::Syscall => {
                    let registers = ptrace::getregs(pid)?;
                    match held_at(&registers) {
                        Some(Held::Loaded) => return self.finish_call(),
                        Some(held) => return Ok(held),
                        None => {}
                    }
                    stops += 1;
                }
                Stop::Signal(other) => self.pass_on(other, &mut signal),
            }
        }
        Ok(Held::AfterManySyscalls)
    }

    /// Lets the system call that it is held before take place: from then on the thread
    /// has its thread pointer, and can be made to do other calls.
    fn finish_call<E>(&mut self) -> Result<Held, LaunchError<E>> {
        let mut signal = None;
        loop {
            ptrace::syscall(self.nix_pid(), signal.take())?;
            match self.wait_for_stop()? {
                Stop::Syscall => return Ok(Held::Loaded),
                Stop::Signal(other) => self.pass_on(other, &mut signal),
            }
        }
    }

    /// A signal that has come: to be handed on when the process goes on.
    fn pass_on(&mut self, stop: Signal, signal: &mut Option<Signal>) {
        match stop {
            Signal::SIGSTOP | Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU => {
                self.stop_signals.push(stop);
            }
            other => *signal = Some(other),
        }
    }

    fn wait_for_stop<E>(&mut self) -> Result<Stop, LaunchError<E>> {
        loop {
            match waitpid(self.nix_pid(), None) {
                Ok(WaitStatus::PtraceSyscall(_)) => return Ok(Stop::Syscall),
                Ok(WaitStatus::Stopped(_, signal) | WaitStatus::PtraceEvent(_, signal, _)) => {
                    return Ok(Stop::Signal(signal));
                }
                Ok(WaitStatus::Exited(_, code)) => return Err(self.ended(code << 8)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Err(self.ended(signal as i32)),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// It has been reaped, so its pid may be another's already.
    fn ended<E>(&mut self, raw_status: i32) -> LaunchError<E> {
        self.child = None;
        let status = ExitStatus::from_raw(raw_status);
        LaunchError::Ended { status }
    }

    fn release<E>(mut self) -> Result<Child, LaunchError<E>> {
        let pid = self.nix_pid();
        match ptrace::detach(pid, None) {
            // Killed while it was held: its status tells.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
        for signal in mem::take(&mut self.stop_signals) {
            // Not yet reaped, so the pid is still its own.
            signal::kill(pid, signal)?;
        }
        self.child.take().ok_or(LaunchError::Trace(Errno::ESRCH))
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGKILL ends a process also when it is held.
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                tracing::warn!(pid = child.id(), %error, "cannot end the command");
            }
        }
    }
}

enum Stop {
    Syscall,
    Signal(Signal),
}

/// Whether the system call that is about to be made is one to hold before.
fn held_at(registers: &libc::user_regs_struct) -> Option<Held> {
    // At entry the kernel presets the result to ENOSYS (arch/x86/entry/
    // entry_64.S). A call that ends so has been looked at when it began.
    let is_entry = registers.rax == (-i64::from(libc::ENOSYS)).cast_unsigned();
    is_entry.then_some(())?;
    // The code segment of 32-bit programs (`__USER32_CS`), whose system calls
    // have other numbers.
    if registers.cs == 0x23 {
        return Some(Held::BeforeSyscall(registers.orig_rax));
    }
    match i64::try_from(registers.orig_rax).unwrap_or(-1) {
        libc::SYS_set_tid_address => Some(Held::Loaded),
        libc::SYS_arch_prctl if registers.rdi == ARCH_SET_FS => Some(Held::Loaded),
        libc::SYS_clone
        | libc::SYS_clone3
        | libc::SYS_fork
        | libc::SYS_vfork
        | libc::SYS_execve
        | libc::SYS_execveat
        | libc::SYS_exit
        | libc::SYS_exit_group => Some(Held::BeforeSyscall(registers.orig_rax)),
        _ => None,
    }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
mod tests;
