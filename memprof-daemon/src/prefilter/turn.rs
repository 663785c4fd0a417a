//! Who stops a process waits until nobody else of this program does: a process has one tracer at
//! a time, and one that is half stopped by another looks as if a debugger had it.

use std::{
    collections::HashSet,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// The processes that are somebody's. ptrace(2) knows one tracer of a process, whatever part of
/// this program that is: so there is one list for all.
static TAKEN: Mutex<Taken> = Mutex::new(Taken(None));
static GIVEN_BACK: Condvar = Condvar::new();

struct Taken(Option<HashSet<u32>>);

/// The right to stop a process, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    pid: u32,
}

impl Turn {
    /// Waits for it. What is done with it must come to an end: others wait, too.
    #[must_use]
    pub fn wait(pid: u32) -> Self {
        let mut taken = taken();
        while !taken.0.get_or_insert_default().insert(pid) {
            taken = GIVEN_BACK
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Self { pid }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        taken().0.get_or_insert_default().remove(&self.pid);
        GIVEN_BACK.notify_all();
    }
}

fn taken() -> MutexGuard<'static, Taken> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        panic,
        sync::atomic::{AtomicU32, Ordering},
        thread,
        time::Duration,
    };

    /// No process has it.
    const PID: u32 = u32::MAX;

    /// Check that nobody has a process while another has, that other processes are not waited
    /// for, and that a turn ends with a panic, too.
    #[test]
    fn one_at_a_time() {
        let inside = AtomicU32::new(0);
        let turns = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let turn = Turn::wait(PID);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        drop(Turn::wait(PID - 1));
                        thread::sleep(Duration::from_micros(100));
                        inside.fetch_sub(1, Ordering::SeqCst);
                        turns.fetch_add(1, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert_eq!(turns.load(Ordering::SeqCst), 160);
        let panicked = panic::catch_unwind(|| {
            let _turn = Turn::wait(PID);
            panic::resume_unwind(Box::new(()));
        });
        assert!(panicked.is_err());
        drop(Turn::wait(PID));
    }
}
