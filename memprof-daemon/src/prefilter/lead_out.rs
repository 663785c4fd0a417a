//! Leads threads out of code that is to be exchanged, or to go.
//!
//! With many threads that allocate all the time, one of them is always within the first
//! instructions of an allocator. To let them all go on and stop them anew would find others
//! there. So a thread that stands where the same can be done elsewhere (`moves.rs`) is set to go
//! on there. One that does not runs for a moment, alone with a processor, while the others
//! stand. It makes no single steps: SIGTRAP could change what a program has it do.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{
    halt::runs_no_code,
    ptrace,
    step::{self, Step},
    stop::{Stopped, Thread},
    stop_error::StopError,
};

/// How long one thread runs: longer than any stub takes.
const MOMENT: Duration = Duration::from_micros(20);
/// For all threads that run in one stop: the others wait.
const MOST: Duration = Duration::from_millis(5);
/// For a thread that has run to stop again.
const STOPS_WITHIN: Duration = Duration::from_millis(3);
/// One that is still there after so many turns waits for something.
const TURNS: usize = 4;

/// Threads that were set to go on elsewhere, and their instruction pointers before.
#[derive(Debug, Default)]
pub(super) struct Moved(Vec<(u32, u64)>);

impl Stopped {
    /// Sets each thread that stands where `goal` has another place for to go on there.
    ///
    /// # Errors
    ///
    /// A request fails; then none is moved.
    pub(super) fn move_threads(
        &mut self,
        goal: impl Fn(u64) -> Option<u64>,
    ) -> Result<Moved, StopError> {
        let mut moved = Moved::default();
        for place in 0..self.threads.len() {
            let Some(thread) = self.threads.get(place).filter(|thread| !thread.is_kernels) else {
                continue;
            };
            let (tid, from) = (thread.tid, thread.registers.rip);
            let Some(to) = goal(from) else {
                continue;
            };
            if let Err(error) = self.set_place(place, to) {
                self.move_back(moved)?;
                return Err(error);
            }
            moved.0.push((tid, from));
            step::done(Step::Moved);
        }
        Ok(moved)
    }

    /// Sets threads to go on where they stood.
    ///
    /// # Errors
    ///
    /// A request fails: those threads go on where they were set to.
    pub(super) fn move_back(&mut self, moved: Moved) -> Result<(), StopError> {
        let mut result = Ok(());
        for (tid, from) in moved.0 {
            let place = self.threads.iter().position(|thread| thread.tid == tid);
            if let Some(place) = place {
                result = result.and(self.set_place(place, from));
            }
        }
        result
    }

    fn set_place(&mut self, place: usize, to: u64) -> Result<(), StopError> {
        let pid = self.pid();
        let Some(thread) = self.threads.get_mut(place) else {
            return Ok(());
        };
        let mut registers = thread.registers;
        registers.rip = to;
        match ptrace::set_registers(thread.tid, &registers) {
            Ok(()) => {
                thread.registers = registers;
                Ok(())
            }
            // Killed as it stood.
            Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(StopError::trace(pid, thread.tid, "move it", error)),
        }
    }

    /// Lets threads run, one after the other and each for a moment, that are in the way, until
    /// none is, or until that takes too long. Whether any ran: it may have done anything since,
    /// also have replaced the program.
    ///
    /// # Errors
    ///
    /// [`StopError`]. A thread that does not stop again at once is an error of its own.
    pub(super) fn let_run(
        &mut self,
        in_the_way: impl Fn(&Thread) -> bool,
    ) -> Result<bool, StopError> {
        let begun = Instant::now();
        let mut ran = false;
        for _ in 0..TURNS {
            let those: Vec<u32> = self
                .threads
                .iter()
                .filter(|thread| !thread.is_kernels && in_the_way(thread))
                .map(|thread| thread.tid)
                .collect();
            for tid in those {
                if begun.elapsed() > MOST {
                    break;
                }
                self.run_for_a_moment(tid)?;
                ran = true;
            }
        }
        if ran {
            // It may have made others.
            self.gather()?;
        }
        Ok(ran)
    }

    fn run_for_a_moment(&mut self, tid: u32) -> Result<(), StopError> {
        let pid = self.pid();
        let Some(place) = self.threads.iter().position(|thread| thread.tid == tid) else {
            return Ok(());
        };
        let by_group = self.threads.swap_remove(place).by_group;
        self.stopping.push(tid);
        let let_run = ptrace::resume(tid, 0).and_then(|()| {
            thread::sleep(MOMENT);
            ptrace::interrupt(tid)
        });
        match let_run {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(StopError::trace(pid, tid, "let it run", error)),
        }
        match self.wait(Instant::now() + STOPS_WITHIN) {
            Ok(_) => {}
            // It is on its way: what is done now is done by the next stop.
            Err(StopError::DoesNotStop { .. }) if !runs_no_code(tid) => {
                return Err(StopError::InTheWay { pid, tid });
            }
            Err(error) => return Err(error),
        }
        if let Some(thread) = self.threads.iter_mut().find(|thread| thread.tid == tid) {
            thread.by_group |= by_group;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "lead_out_tests.rs"]
mod tests;
