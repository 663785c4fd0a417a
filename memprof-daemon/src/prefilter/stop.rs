//! Stops a process: every thread of it, those it makes meanwhile too.

use std::{
    ffi::c_int,
    fs,
    marker::PhantomData,
    mem,
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use libc::user_regs_struct;
use nix::{errno::Errno, unistd};

use super::{
    gadgets::Gadgets,
    ptrace::{self, Change},
    remote, restart, sharing,
    step::{self, Step},
    stop_error::{StopError, tracer_of},
    tracer::{Traced, Tracer},
    within,
};
use crate::process::{
    info::{ProcessError, Stat},
    maps::{MapsEntry, read_maps},
};

/// Between two looks at threads that are to stop: at first, and at most.
const SHORTEST_PAUSE: Duration = Duration::from_micros(5);
const LONGEST_PAUSE: Duration = Duration::from_micros(50);
/// A thread that has not stopped by then may be one that never does.
const GRACE: Duration = Duration::from_millis(1);
/// `PF_IO_WORKER` and `PF_USER_WORKER` (include/linux/sched.h): threads the kernel has
/// made for the process, for io_uring or vhost; they run none of its code.
const KERNEL_WORKER: u64 = 0x10 | 0x4000;
const PAGE: u64 = 4096;
const WORD: u64 = 8;

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
    stopping: Vec<u32>,
    /// By somebody else's doing: it is not let go here.
    pub(super) is_held: bool,
    begun: Instant,
    pub(super) deadline: Instant,
    pub(super) gadgets: Option<Gadgets>,
    traced: Traced,
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
        let mut passed_over = Vec::new();
        // Threads that stand still make none, but one may have been made, and have ended,
        // while the list was read: two lists in a row must have none that is new.
        let mut lists_without_new = 0;
        while lists_without_new < 2 {
            let mut has_new = false;
            for tid in threads_of(pid)? {
                // The first thread's id goes to one that makes execve(2), so what has been
                // passed over as a zombie may live.
                let is_known =
                    stopped.has(tid) || (passed_over.contains(&tid) && runs_no_code(tid));
                if !is_known {
                    has_new = true;
                    if !stopped.ask(tid)? {
                        passed_over.push(tid);
                    }
                }
            }
            passed_over.extend(stopped.wait()?);
            if Instant::now() > deadline {
                return Err(StopError::does_not_stop(pid, stopped.any_tid()));
            }
            lists_without_new = if has_new { 0 } else { lists_without_new + 1 };
        }
        stopped.check()?;
        sharing::check(pid, stopped.any_tid())?;
        step::done(Step::Stopped);
        Ok(stopped)
    }

    /// Stops one thread of `pid`, in which calls can be made; the others run on.
    ///
    /// # Errors
    ///
    /// [`StopError`]; the process goes on then.
    pub fn one(tracer: &Tracer, pid: u32, deadline: Instant) -> Result<Self, StopError> {
        let mut last = StopError::Ended { pid };
        for tid in threads_of(pid)? {
            let mut stopped = Self::begin(tracer, pid, deadline)?;
            if !stopped.ask(tid)? {
                continue;
            }
            // Others may stop where this one does not: do not spend all the time on it.
            let left = deadline.saturating_duration_since(Instant::now());
            stopped.deadline = Instant::now() + left / 4;
            let waited = stopped.wait();
            stopped.deadline = deadline;
            match waited.and_then(|_| stopped.check()) {
                Ok(()) if stopped.can_call() => {
                    step::done(Step::Stopped);
                    return Ok(stopped);
                }
                Ok(()) => last = StopError::NoRoom { pid },
                Err(error) => last = error,
            }
        }
        Err(last)
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
            deadline,
            not_elsewhere: PhantomData,
        })
    }

    fn has(&self, tid: u32) -> bool {
        self.stopping.contains(&tid) || self.threads.iter().any(|thread| thread.tid == tid)
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
                    return Err(StopError::forbidden(self.pid, tid));
                }
                Err(error) => return Err(StopError::trace(self.pid, tid, "trace it", error)),
            }
        }
        self.stopping.push(tid);
        if tid != self.pid {
            self.traced.add(tid);
        }
        step::done(Step::Seized);
        match ptrace::interrupt(tid) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(StopError::trace(self.pid, tid, "interrupt it", error)),
        }
        step::done(Step::Interrupted);
        Ok(true)
    }

    /// Waits until all that were asked have stopped; those that need not, after all.
    fn wait(&mut self) -> Result<Vec<u32>, StopError> {
        let mut passed_over = Vec::new();
        let begun = Instant::now();
        let mut pause = SHORTEST_PAUSE;
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
            if begun.elapsed() > GRACE {
                self.forget_the_dead()?;
                let (no_code, stopping) = mem::take(&mut self.stopping)
                    .into_iter()
                    .partition(|&tid| runs_no_code(tid));
                self.stopping = stopping;
                passed_over.extend::<Vec<u32>>(no_code);
            }
            let Some(&tid) = self.stopping.first() else {
                return Ok(passed_over);
            };
            if Instant::now() > self.deadline {
                return Err(StopError::does_not_stop(self.pid, tid));
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Takes note of threads that have been killed as they stood: one that makes execve(2)
    /// kills the others, and waits until their tracer knows.
    fn forget_the_dead(&mut self) -> Result<(), StopError> {
        let pid = self.pid;
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
        let failed = |error| StopError::trace(self.pid, tid, "wait for it", error);
        match ptrace::change(self.pid, tid).map_err(failed)? {
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
            Err(error) => Err(StopError::trace(self.pid, tid, "continue it", error)),
        }
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

    /// What it maps.
    ///
    /// # Errors
    ///
    /// It was killed, or the kernel's text cannot be understood.
    pub fn maps(&self) -> Result<Vec<MapsEntry>, StopError> {
        Ok(read_maps(self.any_tid())?)
    }

    /// Whether a thread is within one of `ranges`, or may come back there: its instruction
    /// pointer or a word on its stack is an address behind the first byte and before the
    /// end of one.
    ///
    /// # Errors
    ///
    /// The process was killed.
    pub fn is_anyone_within(&self, ranges: &[Range<u64>]) -> Result<bool, StopError> {
        within::is_anyone_within(&self.threads, &self.maps()?, ranges)
            .map_err(|(tid, error)| StopError::trace(self.pid, tid, "read its stack", error))
    }

    /// Fills `buffer` with its memory from `address` on.
    ///
    /// # Errors
    ///
    /// It is not all mapped and readable.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), StopError> {
        let tid = self.any_tid();
        remote::read(tid, address, buffer)
            .map_err(|error| StopError::trace(self.pid, tid, "read its memory", error))
    }

    /// Writes five bytes of code in place of others, in one write, and reads them back.
    ///
    /// # Errors
    ///
    /// Others are there than `expected`; or [`StopError::CrossesPage`].
    pub fn write_code(
        &self,
        address: u64,
        expected: &[u8; 5],
        bytes: &[u8; 5],
    ) -> Result<(), StopError> {
        let tid = self.any_tid();
        let failed = |error| StopError::trace(self.pid, tid, "change its code", error);
        let end_of_page = (address & !(PAGE - 1)).saturating_add(PAGE);
        let word_at = address.min(end_of_page.saturating_sub(WORD));
        let skipped = usize::try_from(address - word_at).unwrap_or(usize::MAX);
        let part = skipped..skipped.saturating_add(bytes.len());
        let compare = |word: [u8; 8], expected: &[u8; 5]| {
            let found = word.get(part.clone());
            let found: [u8; 5] = found
                .and_then(|found| found.try_into().ok())
                .ok_or(StopError::CrossesPage { address })?;
            if found == *expected {
                return Ok(());
            }
            Err(StopError::OtherCode {
                pid: self.pid,
                address,
                expected: *expected,
                found,
            })
        };
        let mut word = ptrace::peek(tid, word_at).map_err(failed)?;
        compare(word, expected)?;
        for (to, from) in word.iter_mut().skip(skipped).zip(bytes) {
            *to = *from;
        }
        ptrace::poke(tid, word_at, word).map_err(failed)?;
        step::done(Step::CodeWritten);
        compare(ptrace::peek(tid, word_at).map_err(failed)?, bytes)
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

/// Whether a thread never runs code of its process, any more or at all.
fn runs_no_code(tid: u32) -> bool {
    match Stat::read(tid) {
        Ok(stat) => matches!(stat.state, 'Z' | 'X') || stat.flags & KERNEL_WORKER != 0,
        Err(_) => true,
    }
}

/// The kernel names a tracer by its thread's id.
fn own_tid() -> u32 {
    unistd::gettid().as_raw().cast_unsigned()
}

/// A thread whose memory is the process's: the first thread's is none any more if it has
/// ended before the others.
fn living_thread(pid: u32) -> Result<u32, StopError> {
    if !runs_no_code(pid) {
        return Ok(pid);
    }
    let living = threads_of(pid)?.into_iter().find(|&tid| !runs_no_code(tid));
    living.ok_or(StopError::Ended { pid })
}

fn threads_of(pid: u32) -> Result<Vec<u32>, StopError> {
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

#[cfg(test)]
#[path = "stop_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "refusal_tests.rs"]
mod refusal_tests;
