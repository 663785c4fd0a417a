//! Ctrl-C and SIGTERM, any number of times.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Requests to end.
#[derive(Debug)]
pub(super) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

/// Which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// SIGINT: from the terminal, as a rule, to the whole process group.
    Int,
    /// SIGTERM: to us alone.
    Term,
}

impl Interrupts {
    /// From now on these signals do not kill.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for the next.
    pub(super) async fn next(&mut self) -> Interrupt {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupt::Int,
            _ = self.terminate.recv() => Interrupt::Term,
        }
    }
}
