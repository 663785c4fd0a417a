//! The BPF live map, read in batches.
//!
//! aya iterates a map with two system calls an entry, and starts over when the
//! entry it stands on is removed meanwhile. `BPF_MAP_LOOKUP_BATCH` (Linux 5.6)
//! copies whole hash buckets under their locks: an entry that is in the map for
//! the whole reading is read exactly once (`kernel/bpf/hashtab.c`,
//! `__htab_map_lookup_and_delete_batch`), which is what a sweep rests on.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use memprof_common::live::{LiveKey, LiveValue};

use super::occupancy::OccupancyTable;

/// The map, and a descriptor for what aya does not do.
#[derive(Debug)]
pub struct LiveMap {
    map: HashMap<MapData, LiveKey, LiveValue>,
    fd: OwnedFd,
    occupancy: OccupancyTable,
}

/// `BPF_MAP_LOOKUP_BATCH` in `enum bpf_cmd`, `include/uapi/linux/bpf.h`.
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// Entries asked for at a time; grown when one bucket holds more.
const BATCH: usize = 16_384;

/// `union bpf_attr`'s `batch`.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

impl LiveMap {
    /// Takes the map over, and the table of where it has blocks.
    ///
    /// # Errors
    ///
    /// If it is no hash map of these keys and values, or the table not an array
    /// that can be mapped.
    pub fn new(map: Map, occupancy: &Map) -> Result<Self, MapError> {
        let fd = match &map {
            Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned()?,
            _ => {
                return Err(MapError::InvalidMapType {
                    map_type: map_type(&map),
                });
            }
        };
        Ok(Self {
            map: HashMap::try_from(map)?,
            fd,
            occupancy: OccupancyTable::new(occupancy)?,
        })
    }

    /// Reads every entry.
    ///
    /// # Errors
    ///
    /// What the system call says; nothing partial is returned.
    pub fn read_all(&self) -> io::Result<Vec<(LiveKey, LiveValue)>> {
        let mut all = Vec::new();
        let mut keys = vec![LiveKey::default(); BATCH];
        let mut values = vec![LiveValue::default(); BATCH];
        // Opaque to us: for hash maps, the next bucket.
        let mut position = 0_u64;
        let mut first = true;
        loop {
            let mut next = 0_u64;
            let mut attr = BatchAttr {
                in_batch: if first {
                    0
                } else {
                    (&raw const position) as u64
                },
                out_batch: (&raw mut next) as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: u32::try_from(keys.len()).unwrap_or(u32::MAX),
                map_fd: self.fd.as_raw_fd() as u32,
                elem_flags: 0,
                flags: 0,
            };
            // SAFETY: the attribute has the layout of `union bpf_attr`'s batch
            // part and its true size; `keys` and `values` have room for `count`
            // entries of the map's key and value size (checked by `HashMap::
            // try_from`), and `next` for the kernel's position, a `u32` for hash
            // maps. All outlive the call.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_bpf,
                    BPF_MAP_LOOKUP_BATCH,
                    &raw mut attr,
                    size_of::<BatchAttr>(),
                )
            };
            let error = if result == 0 {
                None
            } else {
                Some(io::Error::last_os_error())
            };
            let last = match error.as_ref().and_then(io::Error::raw_os_error) {
                None => false,
                // The end of the map; `count` entries were read before it.
                Some(libc::ENOENT) => true,
                // One bucket holds more than there is room for.
                Some(libc::ENOSPC) => {
                    let room = keys.len() * 2;
                    keys.resize(room, LiveKey::default());
                    values.resize(room, LiveValue::default());
                    continue;
                }
                Some(libc::EINTR | libc::EAGAIN) => continue,
                Some(_) => return Err(error.unwrap_or_else(|| io::ErrorKind::Other.into())),
            };
            let count = (attr.count as usize).min(keys.len());
            all.extend(keys.iter().copied().zip(values.iter().copied()).take(count));
            if last {
                return Ok(all);
            }
            position = next;
            first = false;
        }
    }

    /// Takes an entry out, whether or not it is there.
    pub fn remove(&mut self, key: &LiveKey) {
        // Not there is as good as gone: a free was faster, and has counted.
        if self.map.remove(key).is_ok() {
            self.occupancy.leave(key);
        }
    }
}

fn map_type(map: &Map) -> u32 {
    match map {
        Map::HashMap(data) | Map::Array(data) | Map::RingBuf(data) => data
            .info()
            .and_then(|info| info.map_type())
            .map_or(0, |kind| kind as u32),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::loader::{LoadOptions, Sizes, load};
    use std::collections::BTreeMap;

    /// Check that a reading meets every entry exactly once, over more entries
    /// than a batch holds. Needs root, as everything that loads BPF.
    #[test]
    fn reads_every_entry_once() {
        let sizes = Sizes {
            live_entries: 60_000,
            ..Sizes::default()
        };
        let options = LoadOptions {
            sizes,
            ..LoadOptions::default()
        };
        let mut live = load(&options).expect("run as root").maps.live;
        assert!(live.read_all().unwrap().is_empty());
        let mut expected = BTreeMap::new();
        for addr in 0..50_000_u64 {
            let key = LiveKey {
                pid: 1,
                epoch: 0,
                addr: addr * 16,
            };
            let value = LiveValue {
                size_bytes: addr,
                ..LiveValue::default()
            };
            live.map.insert(key, value, 0).unwrap();
            expected.insert(key, value.size_bytes);
        }
        let read = live.read_all().unwrap();
        assert_eq!(read.len(), expected.len());
        let read: BTreeMap<_, _> = read.into_iter().map(|(k, v)| (k, v.size_bytes)).collect();
        assert_eq!(read, expected);
        let gone = LiveKey {
            pid: 1,
            epoch: 0,
            addr: 16,
        };
        live.remove(&gone);
        live.remove(&gone);
        assert_eq!(live.read_all().unwrap().len(), 49_999);
    }
}
