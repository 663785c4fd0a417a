//! Stops a process: every thread of it, those it makes meanwhile too.

use std::{
    marker::PhantomData,
    mem,
    time::{Duration, Instant},
};

use libc::user_regs_struct;
use nix::errno::Errno;

use super::{
    gadgets::Gadgets,
    halt::{living_thread, own_tid},
    ptrace, remote, restart, sharing,
    step::{self, Step},
    stop_error::{StopError, tracer_of},
    tracer::{Traced, Tracer},
};

/// What a stop may take at least, however little of the allowed time is left: threads that
/// were let go a moment ago may wait for a processor, which is no reason to call them
/// unstoppable.
const LEAST: Duration = Duration::from_millis(250);

/// A thread that stands still.
#[derive(Clone, Debug)]
pub struct Thread {
    /// Its id.
    pub tid: u32,
    /// Its registers.
    pub registers: user_regs_struct,
    /// The whole process had been stopped by a signal before.
    pub(super) by_group: bool,
    /// Made by the kernel, for io_uring or vhost: it runs none of the process's code.
    pub(super) is_kernels: bool,
}

/// A process that stands still, until this is dropped.
#[derive(Debug)]
pub struct Stopped {
    pid: u32,
    pub(super) threads: Vec<Thread>,
    /// Traced, and have not stopped yet.
    pub(super) stopping: Vec<u32>,
    /// By somebody else's doing: it is not let go here.
    pub(super) is_held: bool,
    begun: Instant,
    pub(super) deadline: Instant,
    pub(super) gadgets: Option<Gadgets>,
    pub(super) traced: Traced,
    /// Bound to the thread of the [`Tracer`].
    not_elsewhere: PhantomData<*const ()>,
}

impl Stopped {
    /// Stops every thread of `pid`.
    ///
    /// # Errors
    ///
    /// [`StopError`]; the process goes on then.
    pub fn all(tracer: &Tracer, pid: u32, deadline: Instant) -> Result<Self, StopError> {
        let mut stopped = Self::begin(tracer, pid, deadline)?;
        stopped.gather()?;
        stopped.check()?;
        let tids: Vec<u32> = stopped.threads.iter().map(|thread| thread.tid).collect();
        sharing::check(pid, &tids)?;
        step::done(Step::Stopped);
        Ok(stopped)
    }

    /// The only thread of `pid`, which the calling thread has made (by `PTRACE_TRACEME`) and
    /// holds at the exit of a system call. It stays held.
    ///
    /// # Errors
    ///
    /// [`StopError`].
    pub fn held(tracer: &Tracer, pid: u32, deadline: Instant) -> Result<Self, StopError> {
        let mut stopped = Self::begin(tracer, pid, deadline)?;
        stopped.is_held = true;
        let registers = ptrace::registers(pid)
            .map_err(|error| StopError::trace(pid, pid, "read its registers", error))?;
        stopped.threads.push(Thread {
            tid: pid,
            registers,
            by_group: false,
            is_kernels: false,
        });
        stopped.check()?;
        Ok(stopped)
    }

    fn begin(tracer: &Tracer, pid: u32, deadline: Instant) -> Result<Self, StopError> {
        if let Some((tracer_pid, name)) = tracer_of(pid)
            && tracer_pid != own_tid()
        {
            return Err(StopError::Traced {
                pid,
                tracer_pid,
                tracer: name,
            });
        }
        Ok(Self {
            pid,
            threads: Vec::new(),
            stopping: Vec::new(),
            is_held: false,
            // Reads code, so before anything stops.
            gadgets: Gadgets::find(living_thread(pid)?)?,
            traced: tracer.traced.clone(),
            begun: Instant::now(),
            deadline: deadline.max(Instant::now() + LEAST),
            not_elsewhere: PhantomData,
        })
    }

    /// Refuses what an image could not be used with.
    fn check(&self) -> Result<(), StopError> {
        if self.threads.is_empty() {
            return Err(StopError::Ended { pid: self.pid });
        }
        for thread in self.threads.iter().filter(|thread| !thread.is_kernels) {
            let pointer = thread.registers.fs_base;
            // A thread that begins or ends may have none yet or any more, in code that
            // allocates nothing; but a thread is not known to.
            if pointer == 0 || remote::read_word(thread.tid, pointer) != Ok(pointer) {
                return Err(StopError::NoThreadPointer {
                    pid: self.pid,
                    tid: thread.tid,
                });
            }
        }
        Ok(())
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How long it has stood still, or has been brought to.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The threads, with their registers as they stand.
    pub fn threads(&self) -> impl Iterator<Item = &Thread> {
        self.threads.iter()
    }

    /// A thread to ask about the process by: the first may have ended before the others.
    pub(super) fn any_tid(&self) -> u32 {
        self.threads.first().map_or(self.pid, |thread| thread.tid)
    }

    /// Lets the process go on; how long it stood still.
    ///
    /// # Errors
    ///
    /// A thread could not be let go. It is at the latest when the [`Tracer`]'s work ends.
    pub fn release(mut self) -> Result<Duration, StopError> {
        self.let_go()?;
        Ok(self.begun.elapsed())
    }

    fn let_go(&mut self) -> Result<(), StopError> {
        let mut result = Ok(());
        let threads = mem::take(&mut self.threads);
        if self.is_held {
            return Ok(());
        }
        for thread in threads {
            let let_go = restart::set_back(&thread).and_then(|()| ptrace::detach(thread.tid));
            step::done(Step::LetGo);
            match let_go {
                // Killed while it stood still.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    result = Err(StopError::trace(self.pid, thread.tid, "let it go", error));
                }
            }
        }
        result
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.traced.clear();
        if let Err(error) = self.let_go() {
            tracing::warn!(%error, "let go when the tracing thread ends");
        }
        // Those that have stopped since they were last looked at. The rest are let go
        // by the end of the tracing thread.
        for tid in mem::take(&mut self.stopping) {
            if ptrace::detach(tid).is_err() {
                tracing::debug!(tid, "does not stop, let go when the tracing thread ends");
            }
        }
    }
}

#[cfg(test)]
#[path = "stop_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "refusal_tests.rs"]
mod refusal_tests;
