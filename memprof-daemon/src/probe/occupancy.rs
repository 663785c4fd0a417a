//! The table of where the live map has blocks, as BPF sees it: a BPF array mapped
//! into the daemon (`BPF_F_MMAPABLE`, Linux 5.5), which counts down for the blocks
//! that it takes out itself.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};

use aya::maps::{Map, MapError};
use memprof_common::{
    live::LiveKey,
    occupancy::{Occupancy, occupancy_place},
};

/// The mapped table.
#[derive(Debug)]
pub(super) struct OccupancyTable {
    counts: NonNull<AtomicU32>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and what is in it
// is only accessed atomically.
unsafe impl Send for OccupancyTable {}

impl OccupancyTable {
    /// Maps the BPF array.
    ///
    /// # Errors
    ///
    /// If it is none, or cannot be mapped.
    pub(super) fn new(map: &Map) -> Result<Self, MapError> {
        let Map::Array(data) = map else {
            return Err(MapError::InvalidMapType { map_type: 0 });
        };
        if data.info()?.value_size() as usize != size_of::<Occupancy>() {
            return Err(MapError::InvalidValueSize {
                size: data.info()?.value_size() as usize,
                expected: size_of::<Occupancy>(),
            });
        }
        // SAFETY: a new mapping at a place of the kernel's choice touches no
        // memory in use; it stays when the descriptor is closed.
        let counts = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Occupancy>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                data.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        if counts == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let counts = NonNull::new(counts.cast())
            .ok_or_else(|| io::Error::other("mmap gave a null pointer"))?;
        Ok(Self { counts })
    }

    /// After a block was taken out of the live map.
    pub(super) fn leave(&self, key: &LiveKey) {
        let place = occupancy_place(key);
        // SAFETY: the place is within the mapping, which lives as long as `self`
        // and is page-aligned.
        let count = unsafe { self.counts.add(place).as_ref() };
        // It was counted, so it is not 0; if that were ever wrong, it must not
        // come round to four billion.
        let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
            count.checked_sub(1)
        });
    }
}

impl Drop for OccupancyTable {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody has a reference
        // any more.
        unsafe { libc::munmap(self.counts.as_ptr().cast(), size_of::<Occupancy>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya::EbpfLoader;
    use memprof_common::occupancy::OCCUPANCY_PLACES;

    /// Check that blocks are counted down where BPF counts them up, and that no
    /// count goes below 0. Needs root, as everything that loads BPF.
    #[test]
    fn counts_down_to_zero() {
        let object = aya::include_bytes_aligned!(env!("MEMPROF_BPF_OBJECT"));
        let mut ebpf = EbpfLoader::new().load(object).expect("run as root");
        let map = ebpf.take_map("OCCUPANCY").expect("a map");
        let table = OccupancyTable::new(&map).unwrap();
        // Stands for BPF: the same memory at another address.
        let other = OccupancyTable::new(&map).unwrap();
        // SAFETY: as in `leave`.
        let count = |place| unsafe { other.counts.add(place).as_ref() };
        let sum = || -> u32 {
            (0..OCCUPANCY_PLACES)
                .map(|place| count(place).load(Ordering::Relaxed))
                .sum()
        };
        let key = LiveKey {
            pid: 7,
            epoch: 1,
            addr: 0x1000,
        };
        assert_eq!(sum(), 0);
        count(occupancy_place(&key)).store(2, Ordering::Relaxed);
        table.leave(&key);
        assert_eq!(count(occupancy_place(&key)).load(Ordering::Relaxed), 1);
        for _ in 0..3 {
            table.leave(&key);
        }
        assert_eq!(sum(), 0);
        let slots = ebpf.take_map("SLOTS").expect("a map");
        assert!(OccupancyTable::new(&slots).is_err());
    }
}
