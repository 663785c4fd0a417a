//! Processes under a seccomp filter, and kernels on which a return probe kills
//! them.
//!
//! Since Linux 6.11 a probed function of an x86-64 process returns through a
//! system call (`uretprobe`, number 335), which filters do not know and may end
//! the process for. Linux 6.14 lets it pass, and so do stable kernels with that
//! fix; version numbers do not tell. So it is tried out, on a child of our own.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::{
        signal::{self, Signal},
        wait::{WaitStatus, waitpid},
    },
    unistd::{self, ForkResult, Pid},
};
use thiserror::Error;

use crate::process::maps::read_maps;

/// Why a confined process is not probed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SeccompError {
    /// The child of the trial was killed.
    #[error(
        "the process is under a seccomp filter, and this kernel would kill it when a probed \
         function returns; not traced (mended in Linux 6.14 and in stable kernels with its fix)"
    )]
    Deadly,
    /// It is not known what would happen.
    #[error(
        "the process is under a seccomp filter, and whether this kernel would kill it when a \
         probed function returns could not be tried out: {0}; not traced"
    )]
    Untried(String),
}

/// Whether a thread of the process is under seccomp: such a system call could be
/// its last.
#[must_use]
pub fn is_confined(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().any(|thread| {
        fs::read_to_string(thread.path().join("status")).is_ok_and(|status| {
            status
                .lines()
                .find_map(|line| line.strip_prefix("Seccomp:"))
                .is_some_and(|mode| mode.trim() != "0")
        })
    })
}

/// What the child exits with if it is let live; no shell's or signal's number.
const ALIVE: i32 = 42;

/// Calls a probed function in a child under a filter. `probe` attaches something
/// to the return of the function at an offset of a file, in the given process;
/// what it returns holds the probe.
///
/// # Errors
///
/// [`SeccompError`].
pub fn try_out<Held, E: std::fmt::Display>(
    probe: impl FnOnce(&Path, u64, u32) -> Result<Held, E>,
) -> Result<(), SeccompError> {
    let untried = |reason: &dyn std::fmt::Display| SeccompError::Untried(reason.to_string());
    let (path, file_offset) = function_in_file().map_err(|error| untried(&error))?;
    let (go, start) = unistd::pipe().map_err(|error| untried(&error))?;
    let child = Child::fork(&go).map_err(|error| untried(&error))?;
    drop(go);
    let held = probe(
        Path::new(path),
        file_offset,
        child.pid.as_raw().cast_unsigned(),
    )
    .map_err(|error| untried(&error))?;
    match unistd::write(&start, b"!") {
        // It is dead already; its status tells how it died.
        Ok(_) | Err(Errno::EPIPE) => {}
        Err(error) => return Err(untried(&error)),
    }
    let end = child.wait().map_err(|error| untried(&error))?;
    drop(held);
    match end {
        WaitStatus::Exited(_, ALIVE) => Ok(()),
        WaitStatus::Signaled(..) => Err(SeccompError::Deadly),
        other => Err(untried(&format_args!("the child ended with {other:?}"))),
    }
}

/// The function that the child calls.
#[inline(never)]
extern "C" fn trial_function(number: u64) -> u64 {
    std::hint::black_box(number)
}

/// Our own file, and where in it [`trial_function`] is.
fn function_in_file() -> io::Result<(&'static str, u64)> {
    let address = (trial_function as *const ()).addr() as u64;
    let maps = read_maps(std::process::id()).map_err(io::Error::other)?;
    let entry = maps
        .iter()
        .find(|entry| (entry.start.0..entry.end.0).contains(&address))
        .ok_or_else(|| io::Error::other("our own code is not mapped"))?;
    Ok((
        "/proc/self/exe",
        address - entry.start.0 + entry.file_offset.0,
    ))
}

/// A child that waits for a byte, confines itself, calls the function and exits.
struct Child {
    pid: Pid,
    reaped: bool,
}

impl Child {
    fn fork(go: &OwnedFd) -> Result<Self, Errno> {
        let filter = filter();
        // SAFETY: the child makes system calls only, none of which allocates or
        // takes a lock, and ends without running any destructor.
        match unsafe { unistd::fork() }? {
            ForkResult::Child => run_child(go, &filter),
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                reaped: false,
            }),
        }
    }

    fn wait(mut self) -> Result<WaitStatus, Errno> {
        let status = self.reap();
        self.reaped = true;
        status
    }

    fn reap(&self) -> Result<WaitStatus, Errno> {
        loop {
            match waitpid(self.pid, None) {
                Err(Errno::EINTR) => {}
                status => return status,
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            // Not reaped, so the pid is its own still.
            let _ = signal::kill(self.pid, Signal::SIGKILL);
            let _ = self.reap();
        }
    }
}

/// Lets nothing pass but the end of the process (`include/uapi/linux/filter.h`).
fn filter() -> [libc::sock_filter; 4] {
    let code = |code: u32| u16::try_from(code).unwrap_or(0);
    let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
    let equal = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let ret = code(libc::BPF_RET | libc::BPF_K);
    let statement = |code, k| libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    };
    [
        // The number of the system call: first in `struct seccomp_data`.
        statement(load, 0),
        libc::sock_filter {
            code: equal,
            jt: 0,
            jf: 1,
            k: u32::try_from(libc::SYS_exit_group).unwrap_or(u32::MAX),
        },
        statement(ret, libc::SECCOMP_RET_ALLOW),
        statement(ret, libc::SECCOMP_RET_KILL_PROCESS),
    ]
}

fn run_child(go: &OwnedFd, filter: &[libc::sock_filter; 4]) -> ! {
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_ptr().cast_mut(),
    };
    let mut byte = [0_u8];
    // SAFETY: system calls on a descriptor and on values that are alive; the
    // kernel reads `program` only.
    unsafe {
        let read = libc::read(go.as_fd().as_raw_fd(), byte.as_mut_ptr().cast(), 1);
        if read != 1
            || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
                0,
                0,
            ) != 0
        {
            libc::_exit(1);
        }
        trial_function(1);
        libc::_exit(ALIVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that this test's process is not confined, and that a child is found
    /// alive that nobody probes.
    #[test]
    fn unprobed_child_lives() {
        assert!(!is_confined(std::process::id()));
        let trial = try_out(|_, _, pid| {
            assert!(!is_confined(pid), "it confines itself later");
            Ok::<_, io::Error>(())
        });
        assert_eq!(trial, Ok(()));
    }

    /// Check that a child that is killed counts as deadly, and that one whose
    /// probe fails leaves nobody behind.
    #[test]
    fn killed_child_is_deadly() {
        let trial =
            try_out(|_, _, pid| signal::kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSYS));
        assert_eq!(trial, Err(SeccompError::Deadly));
        let trial = try_out(|_, _, _| Err::<(), _>("no probe today"));
        assert!(matches!(trial, Err(SeccompError::Untried(why)) if why.contains("today")));
    }
}
