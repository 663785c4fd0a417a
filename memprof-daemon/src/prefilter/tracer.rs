//! The thread that traces.
//!
//! ptrace(2) binds a traced thread to the one OS thread that traces it. And a traced
//! thread that does not stop (it waits in the kernel for a device, or for a child of
//! vfork) cannot be let go either: it would stop for nobody, later. The kernel lets go of
//! everything a thread traces when that thread ends. So tracing is done on a thread made
//! for it, which ends with it.

use std::{io, marker::PhantomData, panic, thread};

/// The right to trace, on this thread.
#[derive(Debug)]
pub struct Tracer {
    /// Neither `Send` nor `Sync`.
    not_elsewhere: PhantomData<*const ()>,
}

impl Tracer {
    /// For the thread that holds a process by ptrace already, and goes on doing so.
    pub(crate) const fn that_holds() -> Self {
        Self {
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
    thread::scope(|scope| {
        let run = || {
            hurry();
            work(&Tracer {
                not_elsewhere: PhantomData,
            })
        };
        let thread = thread::Builder::new()
            .name("memprof-tracer".to_owned())
            .spawn_scoped(scope, run)?;
        Ok(thread
            .join()
            .unwrap_or_else(|panic| panic::resume_unwind(panic)))
    })
}

/// While this thread waits for a processor, a process stands still. Without the privilege
/// it has to wait like others.
fn hurry() {
    const MOST: libc::c_int = -20;
    // SAFETY: takes numbers; 0 is the calling thread (setpriority(2), "C library/kernel
    // differences").
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, MOST) } != 0 {
        tracing::debug!("may not take precedence, so stops may be longer");
    }
}
