//! When a process ends.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::info::ProcessError;

/// Watches one process, and never another that gets the same pid.
///
/// Open it first and read about the process after: a pid is given to another
/// process only when the first has ended, so if [`Self::is_alive`] holds after
/// the reading, all that was read is of this process.
#[derive(Debug)]
pub struct ExitWatch {
    pid: u32,
    pidfd: OwnedFd,
}

impl ExitWatch {
    /// Watches the process that has the id `pid` now.
    ///
    /// # Errors
    ///
    /// There is no such process, or `pid` is that of a thread.
    ///
    /// # Minimum kernel version
    ///
    /// 5.3
    pub fn open(pid: u32) -> Result<Self, ProcessError> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or(ProcessError::NotFound { pid })?;
        // A thread's id gives EINVAL, or from 6.9 ENOENT (kernel/fork.c,
        // `pidfd_prepare`); `ProcessInfo::read` names such a thread's process.
        let pidfd = pidfd_open(raw, PidfdFlags::empty())
            .map_err(|error| ProcessError::from_io(pid, error.into()))?;
        Ok(Self { pid, pidfd })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has not ended; a zombie has.
    ///
    /// # Errors
    ///
    /// The kernel is out of memory.
    pub fn is_alive(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            match poll(&mut fds, Some(&now)) {
                Ok(ready) => return Ok(ready == 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until it has ended. Any number of tasks may wait.
    ///
    /// # Errors
    ///
    /// File descriptors have run out.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime with I/O enabled.
    pub async fn exited(&self) -> io::Result<()> {
        // epoll takes each descriptor number once, so each waiter has its own.
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for types whose descriptor changes; an OwnedFd's does not"
        )]
        let pidfd = AsyncFd::with_interest(self.pidfd.try_clone()?, Interest::READABLE)?;
        pidfd.readable().await.map(drop)
    }
}

impl AsFd for ExitWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        process::{Command, Stdio},
        time::Duration,
    };

    /// Check that a running process counts as alive, that two waiters learn of
    /// its end, and that from then on it counts as dead, reaped or not.
    #[tokio::test]
    async fn two_waiters() {
        let mut child = Command::new("/bin/cat")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let watch = ExitWatch::open(child.id()).unwrap();
        assert!(watch.is_alive().unwrap());
        let early = tokio::time::timeout(Duration::from_millis(20), watch.exited());
        assert!(early.await.is_err());
        drop(child.stdin.take());
        let (one, two) = tokio::join!(watch.exited(), watch.exited());
        one.unwrap();
        two.unwrap();
        assert!(!watch.is_alive().unwrap());
        child.wait().unwrap();
        assert!(!watch.is_alive().unwrap());
        watch.exited().await.unwrap();
    }

    /// Check that an id that no process has is refused.
    #[test]
    fn missing_process() {
        for pid in [0, 0x3fff_ffff, u32::MAX] {
            let error = ExitWatch::open(pid).unwrap_err();
            assert!(matches!(error, ProcessError::NotFound { .. }), "{error}");
        }
    }
}
