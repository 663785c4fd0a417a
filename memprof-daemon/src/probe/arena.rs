//! The words that unwind tables lie in, as BPF sees them: slabs, each a BPF array that
//! is mapped here, in an array of maps.
//!
//! A walk that is under way may still read what is given back here. So words that were
//! given back rest for a while; before they are used again, a counter that each walk
//! reads at its beginning and its end is raised, and a walk that sees it change says
//! that it cannot be trusted.

use std::{
    collections::BTreeMap,
    fmt,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use aya::maps::{Array, ArrayOfMaps, MapData, MapError};
use aya_obj::generated::bpf_map_type;
use memprof_common::unwind::table::{MAX_SLABS, SLAB_WORDS};
use thiserror::Error;

use super::{mapped::MappedArray, syscall::bpf};

/// How long words rest: walks take microseconds, unless the task is preempted.
const REST: Duration = Duration::from_secs(1);

/// `include/uapi/linux/bpf.h`.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Why there is no room.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// As many slabs as there can be are in use.
    #[error("unwind tables take more than {} MiB", u64::from(MAX_SLABS) * (u64::from(SLAB_WORDS) * 8 / (1 << 20)))]
    Full,
    /// They may not take more.
    #[error("unwind tables take as much as --max-memory leaves them")]
    OverLimit,
    /// The kernel gave no memory.
    #[error("cannot make room for unwind tables")]
    Map(#[from] MapError),
}

/// Bytes of a slab.
pub const SLAB_BYTES: u64 = SLAB_WORDS as u64 * 8;

/// Words in use, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    /// The first.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// A slab of the arena.
#[derive(Debug)]
pub struct Slab(MappedArray<AtomicU64>);

/// Makes slabs, one after the other: apart from the arena, which others need meanwhile,
/// since the kernel waits for a grace period when an array of maps changes
/// (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c).
pub struct SlabMaker {
    slabs_map: ArrayOfMaps<MapData>,
    made: u32,
}

impl SlabMaker {
    /// The next slab, which BPF sees from now on. To be added to the arena before the next
    /// is made.
    ///
    /// # Errors
    ///
    /// [`ArenaError`].
    pub fn make(&mut self) -> Result<Slab, ArenaError> {
        if self.made >= MAX_SLABS {
            return Err(ArenaError::Full);
        }
        let map = create_slab()?;
        let slab = Slab(MappedArray::new(&map, SLAB_WORDS as usize)?);
        // The outer map holds the slab from now on; so does the mapping.
        self.slabs_map.set(self.made, &map, 0)?;
        self.made += 1;
        Ok(slab)
    }
}

impl fmt::Debug for SlabMaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlabMaker")
            .field("made", &self.made)
            .finish_non_exhaustive()
    }
}

/// Gives out words and takes them back.
pub struct Arena {
    reuses_map: Array<MapData, u64>,
    slabs: Vec<MappedArray<AtomicU64>>,
    /// Free words: first to count. No two touch.
    free: BTreeMap<u32, u32>,
    /// Given back, the oldest first.
    resting: Vec<(Instant, Words)>,
    reuses: u64,
}

impl Arena {
    /// An arena without a word, and what makes it grow.
    #[must_use]
    pub fn new(
        slabs_map: ArrayOfMaps<MapData>,
        reuses_map: Array<MapData, u64>,
    ) -> (Self, SlabMaker) {
        let arena = Self {
            reuses_map,
            slabs: Vec::new(),
            free: BTreeMap::new(),
            resting: Vec::new(),
            reuses: 0,
        };
        (arena, SlabMaker { slabs_map, made: 0 })
    }

    /// Room for `words`, filled with them; none before it has grown.
    ///
    /// # Errors
    ///
    /// [`ArenaError`]; nothing is taken then.
    pub fn store(&mut self, words: &[u64]) -> Result<Option<Words>, ArenaError> {
        let count = u32::try_from(words.len()).map_err(|_| ArenaError::Full)?;
        let taken = self.take(count)?;
        if let Some(taken) = taken {
            self.fill(taken.first, words);
        }
        Ok(taken)
    }

    /// Whether `count` words could be stored as it is.
    pub fn has_room(&mut self, count: u32) -> bool {
        let has_room = |arena: &Self| arena.free.values().any(|&free| free >= count);
        has_room(self) || (self.wake().is_ok() && has_room(self))
    }

    /// Takes a slab, the next that was made.
    pub fn add(&mut self, slab: Slab) {
        let first = self.slabs.len() as u32 * SLAB_WORDS;
        self.slabs.push(slab.0);
        self.add_free(first, SLAB_WORDS);
    }

    /// Gives words back. Nothing that BPF is told of may lead to them any more.
    pub fn give_back(&mut self, words: Words) {
        if words.count > 0 {
            self.resting.push((Instant::now(), words));
        }
    }

    /// Bytes that the arena takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.slabs.len() as u64 * SLAB_BYTES
    }

    fn take(&mut self, count: u32) -> Result<Option<Words>, ArenaError> {
        if count == 0 {
            return Ok(Some(Words { first: 0, count }));
        }
        if let Some(words) = self.take_free(count) {
            return Ok(Some(words));
        }
        self.wake()?;
        Ok(self.take_free(count))
    }

    /// The first free words that are enough.
    fn take_free(&mut self, count: u32) -> Option<Words> {
        let (&first, &free) = self.free.iter().find(|&(_, &free)| free >= count)?;
        self.free.remove(&first);
        if free > count {
            self.free.insert(first + count, free - count);
        }
        Some(Words { first, count })
    }

    /// What has rested long enough is free again.
    fn wake(&mut self) -> Result<(), MapError> {
        let rested = self
            .resting
            .iter()
            .take_while(|(since, _)| since.elapsed() >= REST)
            .count();
        if rested == 0 {
            return Ok(());
        }
        self.reuses = self.reuses.wrapping_add(1);
        self.reuses_map.set(0, self.reuses, 0)?;
        let rested: Vec<_> = self.resting.drain(..rested).collect();
        for (_, words) in rested {
            self.add_free(words.first, words.count);
        }
        Ok(())
    }

    fn add_free(&mut self, mut first: u32, mut count: u32) {
        if let Some((&before, &length)) = self.free.range(..first).next_back()
            && before + length == first
        {
            self.free.remove(&before);
            first = before;
            count += length;
        }
        if let Some(behind) = self.free.remove(&(first + count)) {
            count += behind;
        }
        self.free.insert(first, count);
    }

    fn fill(&self, first: u32, words: &[u64]) {
        let mut place = first;
        let mut left = words;
        while !left.is_empty() {
            let within = (place % SLAB_WORDS) as usize;
            let count = left.len().min(SLAB_WORDS as usize - within);
            let (now, later) = left.split_at(count);
            if let Some(slab) = self.slabs.get((place / SLAB_WORDS) as usize) {
                for (to, &word) in slab.words().iter().skip(within).zip(now) {
                    to.store(word, Ordering::Relaxed);
                }
            }
            place = place.saturating_add(count as u32);
            left = later;
        }
    }
}

/// `union bpf_attr` of `BPF_MAP_CREATE`.
#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

const BPF_MAP_CREATE: u32 = 0;

fn create_slab() -> Result<MapData, MapError> {
    create(&MapCreate {
        map_type: bpf_map_type::BPF_MAP_TYPE_ARRAY as u32,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u64>() as u32,
        max_entries: SLAB_WORDS,
        map_flags: BPF_F_MMAPABLE,
        ..MapCreate::default()
    })
}

/// Makes the array of slabs, without one. The kernel is shown a slab, since all have
/// to be of the same kind (kernel/bpf/map_in_map.c, `bpf_map_meta_alloc`).
///
/// # Errors
///
/// The kernel's answer.
pub(super) fn create_slabs() -> Result<MapData, MapError> {
    let example = create_slab()?;
    create(&MapCreate {
        map_type: bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS as u32,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u32>() as u32,
        max_entries: MAX_SLABS,
        inner_map_fd: example.fd().as_fd().as_raw_fd().cast_unsigned(),
        ..MapCreate::default()
    })
}

fn create(attr: &MapCreate) -> Result<MapData, MapError> {
    MapData::from_fd(bpf(BPF_MAP_CREATE, attr)?)
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("slabs", &self.slabs.len())
            .field("free", &self.free)
            .field("resting", &self.resting)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "arena_tests.rs"]
mod tests;
