//! Why a process cannot be stopped.

use std::{fs, io};

use nix::errno::Errno;

use crate::process::info::{ProcessError, Stat, read_status, status_field};

/// Why a process was not stopped, or a stopped one not used. It goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// It cannot be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// It has ended, or ends.
    #[error("pid {pid} has ended")]
    Ended {
        /// The id.
        pid: u32,
    },
    /// Only one can trace a process.
    #[error("pid {pid} is being traced by {tracer} (pid {tracer_pid})")]
    Traced {
        /// The id.
        pid: u32,
        /// The tracer's id.
        tracer_pid: u32,
        /// The tracer's name.
        tracer: String,
    },
    /// The kernel forbids it.
    #[error("the kernel does not let thread {tid} of pid {pid} be traced: {reason}")]
    Forbidden {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
        /// Why, as far as can be told.
        reason: String,
    },
    /// A thread waits in the kernel for what cannot be interrupted.
    #[error(
        "thread {tid} ({comm}) of pid {pid} does not stop: its state is {state}{}",
        if *.state == 'D' { ", it waits in the kernel for a device or a child of vfork" } else { "" }
    )]
    DoesNotStop {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
        /// Its name.
        comm: String,
        /// Its state as `/proc/PID/stat` has it.
        state: char,
    },
    /// A thread was let run out of the way, and waits for something.
    #[error("thread {tid} of pid {pid} is in the way")]
    InTheWay {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
    },
    /// Another process would see all that is changed, and is not stopped.
    #[error("pid {pid} shares its memory with another process, {other} ({comm})")]
    SharesMemory {
        /// The process.
        pid: u32,
        /// The other one.
        other: u32,
        /// Its name.
        comm: String,
    },
    /// A thread that has no thread pointer of its own.
    #[error("thread {tid} of pid {pid} has no thread pointer as the x86-64 ABI wants it")]
    NoThreadPointer {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
    },
    /// The code is not what it is thought to be.
    #[error("the code of pid {pid} at {address:#x} is {found:02x?}, not {expected:02x?}")]
    OtherCode {
        /// The process.
        pid: u32,
        /// Where.
        address: u64,
        /// What should be there.
        expected: [u8; 5],
        /// What is.
        found: [u8; 5],
    },
    /// Bytes that one write cannot change at once.
    #[error("the bytes at {address:#x} cross a page")]
    CrossesPage {
        /// Where.
        address: u64,
    },
    /// Calls cannot be made in the threads that could be stopped.
    #[error("no thread of pid {pid} stands where calls can be made on its own stack")]
    NoRoom {
        /// The process.
        pid: u32,
    },
    /// A request failed.
    #[error("cannot {what} (thread {tid} of pid {pid})")]
    Trace {
        /// The process.
        pid: u32,
        /// The thread.
        tid: u32,
        /// What for.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

impl StopError {
    /// What a failed request means.
    pub(super) fn trace(pid: u32, tid: u32, what: &'static str, source: Errno) -> Self {
        match source {
            // A traced thread that does not stand still: killed.
            Errno::ESRCH => Self::Ended { pid },
            _ => Self::Trace {
                pid,
                tid,
                what,
                source,
            },
        }
    }

    /// What it means that `tid` did not stop in time.
    pub(super) fn does_not_stop(pid: u32, tid: u32) -> Self {
        match Stat::read(tid) {
            Ok(stat) => Self::DoesNotStop {
                pid,
                tid,
                comm: stat.comm,
                state: stat.state,
            },
            Err(error) => error.into(),
        }
    }

    /// What it means that `tid` may not be traced.
    pub(super) fn forbidden(pid: u32, tid: u32) -> Self {
        if let Some((tracer_pid, tracer)) = tracer_of(tid) {
            return Self::Traced {
                pid,
                tracer_pid,
                tracer,
            };
        }
        let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        Self::Forbidden {
            pid,
            tid,
            reason: reason(yama),
        }
    }
}

fn reason(yama_scope: io::Result<String>) -> String {
    match yama_scope.as_deref().map(str::trim) {
        Ok("3") => "kernel.yama.ptrace_scope is 3, nobody may trace until the next boot",
        Ok("2") => "kernel.yama.ptrace_scope is 2, which needs CAP_SYS_PTRACE",
        Ok("1") => "kernel.yama.ptrace_scope is 1, which needs CAP_SYS_PTRACE for others' children",
        _ => "it needs CAP_SYS_PTRACE, and leave of the security modules",
    }
    .to_owned()
}

/// Who traces `tid`, and its name.
pub(super) fn tracer_of(tid: u32) -> Option<(u32, String)> {
    let status = read_status(tid).ok()?;
    let tracer = u32::try_from(status_field(&status, "TracerPid:")?).ok()?;
    (tracer != 0).then_some(())?;
    let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
    Some((tracer, name.trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that each of Yama's scopes is named as the reason, and that a kernel
    /// without Yama has another.
    #[test]
    fn reasons() {
        for scope in ["1", "2", "3"] {
            let text = reason(Ok(format!("{scope}\n")));
            assert!(text.contains(&format!("ptrace_scope is {scope}")), "{text}");
        }
        let none = reason(Err(io::ErrorKind::NotFound.into()));
        assert!(none.contains("CAP_SYS_PTRACE") && !none.contains("yama"));
    }
}
