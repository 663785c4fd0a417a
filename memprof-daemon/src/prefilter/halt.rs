//! Brings the threads of a process to a stop.

use std::{
    collections::HashSet,
    ffi::c_int,
    fs, mem, thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, unistd};

use super::{
    ptrace::{self, Change},
    step::{self, Step},
    stop::{Stopped, Thread},
    stop_error::{StopError, tracer_of},
};
use crate::process::info::{ProcessError, Stat};

/// Between two looks at threads that are to stop: at first, and at most.
const SHORTEST_PAUSE: Duration = Duration::from_micros(5);
const LONGEST_PAUSE: Duration = Duration::from_micros(50);
/// A thread that has not stopped by then may be one that never does.
const GRACE: Duration = Duration::from_millis(1);
/// `PF_IO_WORKER` and `PF_USER_WORKER` (include/linux/sched.h): threads the kernel has
/// made for the process, for io_uring or vhost; they run none of its code.
const KERNEL_WORKER: u64 = 0x10 | 0x4000;

impl Stopped {
    /// Stops all threads that do not stand yet.
    ///
    /// # Errors
    ///
    /// [`StopError`].
    pub(super) fn gather(&mut self) -> Result<(), StopError> {
        let pid = self.pid();
        let mut passed_over = Vec::new();
        // Threads that stand still make none, but one may have been made, and have ended,
        // while the list was read: two lists in a row must have none that is new.
        let mut lists_without_new = 0;
        while lists_without_new < 2 {
            let mut has_new = false;
            let known: HashSet<u32> = self.asked().collect();
            for tid in threads_of(pid)? {
                // The first thread's id goes to one that makes execve(2), so what has been
                // passed over as a zombie may live.
                let is_known =
                    known.contains(&tid) || (passed_over.contains(&tid) && runs_no_code(tid));
                if !is_known {
                    has_new = true;
                    if !self.ask(tid)? {
                        passed_over.push(tid);
                    }
                }
            }
            passed_over.extend(self.wait(self.deadline)?);
            if Instant::now() > self.deadline {
                return Err(StopError::does_not_stop(pid, self.any_tid()));
            }
            lists_without_new = if has_new { 0 } else { lists_without_new + 1 };
        }
        Ok(())
    }

    fn asked(&self) -> impl Iterator<Item = u32> {
        let standing = self.threads.iter().map(|thread| thread.tid);
        standing.chain(self.stopping.iter().copied())
    }

    /// Asks a thread to stop. False if it need not: it ends, or is the kernel's.
    fn ask(&mut self, tid: u32) -> Result<bool, StopError> {
        let mut refused = 0;
        loop {
            match ptrace::seize(tid) {
                Ok(()) => break,
                Err(Errno::ESRCH) => return Ok(false),
                Err(Errno::EPERM) if runs_no_code(tid) => return Ok(false),
                // Already ours: it has made execve(2) and got the id of the first thread.
                Err(Errno::EPERM)
                    if tracer_of(tid).is_some_and(|(tracer, _)| tracer == own_tid()) =>
                {
                    break;
                }
                // It may have been the first thread, ended, and be another by now.
                Err(Errno::EPERM) if refused < 3 => {
                    refused += 1;
                    thread::sleep(LONGEST_PAUSE);
                }
                Err(Errno::EPERM | Errno::EACCES) => {
                    return Err(StopError::forbidden(self.pid(), tid));
                }
                Err(error) => return Err(StopError::trace(self.pid(), tid, "trace it", error)),
            }
        }
        self.stopping.push(tid);
        if tid != self.pid() {
            self.traced.add(tid);
        }
        step::done(Step::Seized);
        match ptrace::interrupt(tid) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(StopError::trace(self.pid(), tid, "interrupt it", error)),
        }
        step::done(Step::Interrupted);
        Ok(true)
    }

    /// Waits until all that were asked have stopped; those that need not, after all.
    ///
    /// # Errors
    ///
    /// [`StopError`]; what does not stop until `deadline` is among what is to stop still.
    pub(super) fn wait(&mut self, deadline: Instant) -> Result<Vec<u32>, StopError> {
        let mut passed_over = Vec::new();
        let begun = Instant::now();
        let mut pause = SHORTEST_PAUSE;
        let mut next_look = begun + GRACE;
        loop {
            for tid in mem::take(&mut self.stopping) {
                match self.look_at(tid) {
                    Ok(true) => {}
                    Ok(false) => self.stopping.push(tid),
                    Err(error) => {
                        self.stopping.push(tid);
                        return Err(error);
                    }
                }
            }
            let now = Instant::now();
            if now > next_look {
                self.forget_the_dead()?;
                let (no_code, stopping) = mem::take(&mut self.stopping)
                    .into_iter()
                    .partition(|&tid| runs_no_code(tid));
                self.stopping = stopping;
                passed_over.extend::<Vec<u32>>(no_code);
                // It takes the processor from threads that are about to stop.
                next_look = Instant::now() + GRACE.max(4 * now.elapsed());
            }
            let Some(&tid) = self.stopping.first() else {
                return Ok(passed_over);
            };
            if Instant::now() > deadline {
                return Err(StopError::does_not_stop(self.pid(), tid));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Takes note of threads that have been killed as they stood: one that makes execve(2)
    /// kills the others, and waits until their tracer knows.
    fn forget_the_dead(&mut self) -> Result<(), StopError> {
        let pid = self.pid();
        let mut dead = Vec::new();
        for thread in &self.threads {
            let failed = |error| StopError::trace(pid, thread.tid, "wait for it", error);
            if ptrace::change(pid, thread.tid).map_err(failed)? == Some(Change::Gone) {
                dead.push(thread.tid);
            }
        }
        self.threads.retain(|thread| !dead.contains(&thread.tid));
        Ok(())
    }

    /// Whether `tid` is through with stopping: it stands still, or is no more.
    fn look_at(&mut self, tid: u32) -> Result<bool, StopError> {
        let failed = |error| StopError::trace(self.pid(), tid, "wait for it", error);
        match ptrace::change(self.pid(), tid).map_err(failed)? {
            None => Ok(false),
            Some(Change::Gone) => Ok(true),
            Some(Change::Stopped { by_group }) => {
                match ptrace::registers(tid) {
                    Ok(registers) => self.threads.push(Thread {
                        tid,
                        registers,
                        by_group,
                        // Such threads have no stack (arch/x86/kernel/process.c,
                        // `copy_thread`).
                        is_kernels: registers.rsp == 0 && runs_no_code(tid),
                    }),
                    // Killed meanwhile: the next list may have it, as a zombie.
                    Err(Errno::ESRCH) => {}
                    Err(error) => return Err(failed(error)),
                }
                Ok(true)
            }
            // It was on its way to a signal before it was asked. It takes the signal, and
            // stops where its handler begins.
            Some(Change::Signal(signal)) => self.go_on(tid, signal).map(|()| false),
            Some(Change::Syscall | Change::Other) => self.go_on(tid, 0).map(|()| false),
        }
    }

    fn go_on(&self, tid: u32, signal: c_int) -> Result<(), StopError> {
        match ptrace::resume(tid, signal).and_then(|()| ptrace::interrupt(tid)) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(StopError::trace(self.pid(), tid, "continue it", error)),
        }
    }
}

/// Whether a thread never runs code of its process, any more or at all.
pub(super) fn runs_no_code(tid: u32) -> bool {
    match Stat::read(tid) {
        Ok(stat) => matches!(stat.state, 'Z' | 'X') || stat.flags & KERNEL_WORKER != 0,
        Err(_) => true,
    }
}

/// The kernel names a tracer by its thread's id.
pub(super) fn own_tid() -> u32 {
    unistd::gettid().as_raw().cast_unsigned()
}

/// A thread whose memory is the process's: the first thread's is none any more if it has
/// ended before the others.
pub(super) fn living_thread(pid: u32) -> Result<u32, StopError> {
    if !runs_no_code(pid) {
        return Ok(pid);
    }
    let living = threads_of(pid)?.into_iter().find(|&tid| !runs_no_code(tid));
    living.ok_or(StopError::Ended { pid })
}

pub(super) fn threads_of(pid: u32) -> Result<Vec<u32>, StopError> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(|error| ProcessError::from_io(pid, error))?;
    let mut threads = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| ProcessError::from_io(pid, error))?;
        threads.extend(
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok()),
        );
    }
    Ok(threads)
}
