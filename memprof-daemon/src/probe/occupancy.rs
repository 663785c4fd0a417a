//! The table of where the live map has blocks, as BPF sees it. It is mapped into the
//! daemon, which counts down for the blocks that it takes out itself.

use std::sync::atomic::{AtomicU32, Ordering};

use aya::maps::{Map, MapError};
use memprof_common::{
    live::LiveKey,
    occupancy::{OCCUPANCY_PLACES, occupancy_place},
};

use super::mapped::MappedArray;

/// The mapped table.
#[derive(Debug)]
pub(super) struct OccupancyTable {
    counts: MappedArray<AtomicU32>,
}

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
        let counts = MappedArray::new(data, OCCUPANCY_PLACES)?;
        Ok(Self { counts })
    }

    /// After a block was taken out of the live map.
    pub(super) fn leave(&self, key: &LiveKey) {
        let Some(count) = self.counts.words().get(occupancy_place(key)) else {
            return;
        };
        // It was counted, so it is not 0; if that were ever wrong, it must not
        // come round to four billion.
        let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
            count.checked_sub(1)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya::EbpfLoader;

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
        let counts = other.counts.words();
        let sum = || -> u32 {
            counts
                .iter()
                .map(|count| count.load(Ordering::Relaxed))
                .sum()
        };
        let key = LiveKey {
            pid: 7,
            epoch: 1,
            addr: 0x1000,
        };
        assert_eq!(sum(), 0);
        counts[occupancy_place(&key)].store(2, Ordering::Relaxed);
        table.leave(&key);
        assert_eq!(counts[occupancy_place(&key)].load(Ordering::Relaxed), 1);
        for _ in 0..3 {
            table.leave(&key);
        }
        assert_eq!(sum(), 0);
        for other in ["SLOTS", "TARGETS"] {
            let map = ebpf.take_map(other).expect("a map");
            assert!(OccupancyTable::new(&map).is_err(), "{other}");
        }
    }
}
