//! The thread that traces.
//!
//! ptrace(2) binds a traced thread to the one OS thread that traces it. And a traced
//! thread that does not stop (it waits in the kernel for a device, or for a child of
//! vfork) cannot be let go either: it would stop for nobody, later. The kernel lets go of
//! everything a thread traces when that thread ends. So tracing is done on a thread made
//! for it, which ends with it.
//!
//! The thread that waits for it meanwhile takes note of traced threads that end. The tracing
//! one could not always: `PTRACE_SEIZE` waits while the process makes execve(2), which waits
//! until the tracer of its other threads knows of their end (kernel/ptrace.c and fs/exec.c,
//! `cred_guard_mutex` and `de_thread`).

use std::{
    io,
    marker::PhantomData,
    panic,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use super::ptrace;

/// Between two looks at traced threads that may have ended.
const WATCH: Duration = Duration::from_millis(1);

/// The threads that are traced now, but not the first of a process, whose end is told to
/// its parent.
#[derive(Clone, Debug, Default)]
pub(super) struct Traced(Arc<Mutex<Vec<u32>>>);

impl Traced {
    pub(super) fn add(&self, tid: u32) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(tid);
    }

    pub(super) fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    fn take_note_of_ended(&self) {
        let mut tids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tids.retain(|&tid| !ptrace::reap_if_ended(tid));
    }
}

/// The right to trace, on this thread.
#[derive(Debug)]
pub struct Tracer {
    pub(super) traced: Traced,
    /// Neither `Send` nor `Sync`.
    not_elsewhere: PhantomData<*const ()>,
}

impl Tracer {
    /// For the thread that holds a process by ptrace already, and goes on doing so.
    pub(crate) fn that_holds() -> Self {
        Self {
            // One thread, the first of its process.
            traced: Traced::default(),
            not_elsewhere: PhantomData,
        }
    }
}

/// Runs `work` on a thread that may trace. Whatever it still traces at its end goes on.
///
/// # Errors
///
/// No thread can be made.
///
/// # Panics
///
/// If `work` does.
pub fn with_tracer<T: Send>(work: impl FnOnce(&Tracer) -> T + Send) -> io::Result<T> {
    let traced = Traced::default();
    let watched = traced.clone();
    thread::scope(|scope| {
        let run = move || {
            hurry();
            work(&Tracer {
                traced,
                not_elsewhere: PhantomData,
            })
        };
        let thread = thread::Builder::new()
            .name("memprof-tracer".to_owned())
            .spawn_scoped(scope, run)?;
        while !thread.is_finished() {
            watched.take_note_of_ended();
            thread::park_timeout(WATCH);
        }
        Ok(thread
            .join()
            .unwrap_or_else(|panic| panic::resume_unwind(panic)))
    })
}

/// While this thread waits for a processor, a process stands still: threads that are let go
/// before others would take it, of a process with more of them than there are processors. It
/// sleeps between two looks, so it keeps nobody from running for long. Without the privilege it
/// has to wait like others.
fn hurry() {
    const MOST: libc::c_int = -20;
    // Sleeps are for some microseconds, to which the kernel would add fifty.
    const SLACK_NS: libc::c_ulong = 1;
    let first_of_all = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: takes numbers, and concerns the calling thread (prctl(2), `PR_SET_TIMERSLACK`).
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NS) };
    // SAFETY: the kernel reads the parameters, which live; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const first_of_all) } == 0 {
        return;
    }
    // SAFETY: takes numbers; 0 is the calling thread (setpriority(2), "C library/kernel
    // differences").
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, MOST) } != 0 {
        tracing::debug!("may not take precedence, so stops may be longer");
    }
}
