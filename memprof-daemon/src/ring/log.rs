//! Waits for the log of the BPF programs.

use std::io;

use tokio::io::{Interest, unix::AsyncFd};

/// The log as aya hands it out.
pub type BpfLog = aya_log::EbpfLogger<&'static dyn log::Log>;

/// Passes on what the BPF side has logged.
pub struct LogReader {
    log: AsyncFd<BpfLog>,
}

impl LogReader {
    /// Registers the log with the runtime it is called in.
    ///
    /// # Errors
    ///
    /// If the runtime cannot watch it.
    pub fn new(log: BpfLog) -> io::Result<Self> {
        // SAFETY: the logger owns its ring's descriptor, keeps it open for its
        // lifetime and always returns the same one.
        let log = unsafe { AsyncFd::register_with_interest(log, Interest::READABLE) }?;
        Ok(Self { log })
    }

    /// Waits for records and hands them to the logger. Cancelled while it
    /// waits, it has taken nothing.
    ///
    /// # Errors
    ///
    /// If waiting fails.
    pub async fn flush(&mut self) -> io::Result<()> {
        let mut guard = self.log.readable_mut().await?;
        guard.get_inner_mut().flush();
        guard.clear_ready();
        Ok(())
    }
}
