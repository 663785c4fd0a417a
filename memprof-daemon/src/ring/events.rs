//! Drains the BPF ring buffer.

use std::io;

use aya::maps::{MapData, RingBuf};
use tokio::io::{Interest, unix::AsyncFd};

/// The consumer's end of the ring of events. There is one.
pub struct EventRing {
    ring: AsyncFd<RingBuf<MapData>>,
    capacity_bytes: usize,
}

/// Header that the kernel puts before each record, and to whose size records
/// are padded (`BPF_RINGBUF_HDR_SZ`).
const HEADER_BYTES: usize = 8;

impl EventRing {
    /// Registers the ring with the runtime it is called in.
    ///
    /// # Errors
    ///
    /// If the runtime cannot watch it.
    pub fn new(ring: RingBuf<MapData>, capacity_bytes: u32) -> io::Result<Self> {
        // SAFETY: `RingBuf` owns its descriptor, keeps it open for its lifetime
        // and always returns the same one.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?;
        Ok(Self {
            ring,
            capacity_bytes: capacity_bytes as usize,
        })
    }

    /// Waits for records and gives up to `limit` of them to `each`. Cancelled
    /// while it waits, it has taken nothing.
    ///
    /// # Errors
    ///
    /// If waiting fails.
    pub async fn drain(&mut self, limit: usize, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut guard = self.ring.readable_mut().await?;
        for _ in 0..limit {
            let Some(record) = guard.get_inner_mut().next() else {
                guard.clear_ready();
                return Ok(());
            };
            each(&record);
        }
        // There may be more: ready still.
        guard.retain_ready();
        Ok(())
    }

    /// Gives `each` every record that is in the ring now, without waiting.
    /// Returns even if the target keeps filling it: after one capacity's worth,
    /// whatever was in the ring at the call has been read.
    pub fn drain_present(&mut self, mut each: impl FnMut(&[u8])) {
        let mut read_bytes = 0;
        while read_bytes <= self.capacity_bytes {
            let Some(record) = self.ring.get_mut().next() else {
                return;
            };
            read_bytes += HEADER_BYTES + record.len().next_multiple_of(HEADER_BYTES);
            each(&record);
        }
    }
}
