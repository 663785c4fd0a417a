//! The list of buckets, read while the program goes on.
//!
//! A bucket's stack and size never change, and it is never freed; new ones come at the head of
//! the list. So each is read once, and its record of counts each time.
//!
//! A record has one count for all that is *published*, and one for each of three cycles that
//! are not: allocations count in the cycle after the next, what a garbage collection frees in
//! the next. At the end of each collection's marking the cycle number goes up, and that cycle's
//! counts are added to the published ones, soon after. So what is published is the heap as it
//! was at the end of a collection's marking: what was garbage then is freed in it, and in-use
//! is right (`memRecord` in `src/runtime/mprof.go` has a drawing). Before the first collection
//! nothing is published, and all cycles together are the profile, as `runtime.MemProfile` has
//! it.
//!
//! The runtime's locks are not taken, so counts are read twice, and again if they differ.

use std::{
    collections::HashSet,
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    layout::{BUCKET_BYTES, CYCLE_WRAP, FUTURE_CYCLES, Layout, MEM_PROFILE},
    memory::{Blocks, Memory},
    program::Variables,
};

/// Buckets beyond this number are not read. Programs have some thousand.
const MAX_BUCKETS: usize = 1 << 18;

/// Frames of all buckets together: 128 MiB.
const MAX_FRAMES: usize = 1 << 24;

/// How often counts are read that change while they are.
const TRIES: u32 = 6;
const REST: Duration = Duration::from_millis(1);

/// A rate beyond this is none: it is in bytes.
const MAX_RATE: u64 = 1 << 50;

/// One of so many buckets may contradict itself, being changed at that moment.
const TOLERATED: usize = 16;

/// What is counted together: allocations of one size by one stack.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// Its address, which is no other's for as long as the program runs.
    pub(crate) address: u64,
    /// Bytes of each block.
    pub(crate) size_bytes: u64,
    /// Return addresses, leaf first.
    pub(crate) stack: Box<[u64]>,
}

impl Bucket {
    fn record(&self) -> u64 {
        self.address + BUCKET_BYTES + 8 * self.stack.len() as u64
    }
}

/// A bucket's sampled blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) bucket: Arc<Bucket>,
    pub(crate) allocs: u64,
    pub(crate) frees: u64,
}

/// The profile at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    /// When.
    pub(crate) at: Instant,
    /// `runtime.MemProfileRate`; 0 if profiling is off.
    pub(crate) rate_bytes: u64,
    /// The mean sampling gap to unbias by: the rate or, if profiling is off, what it was
    /// before, or 1 if that is not known.
    pub(crate) interval_bytes: u64,
    /// The rate has been another before.
    pub(crate) rate_changed: bool,
    /// The number of the published cycle, and whether it was flushed.
    pub(crate) cycle: u32,
    /// No garbage collection has ended yet: all of it is counted, and nothing is freed.
    pub(crate) is_early: bool,
    /// No count changed while it was read.
    pub(crate) is_settled: bool,
    /// The buckets, oldest first.
    pub(crate) counts: Vec<Count>,
    /// How long reading took.
    pub(crate) took: Duration,
}

impl Reading {
    /// Whether nothing at all is in it, not even a rate, which the runtime sets as it begins.
    pub(super) const fn is_blank(&self) -> bool {
        self.counts.is_empty() && self.rate_bytes == 0 && self.cycle == 0
    }

    /// Whether the program is in the same cycle still, and samples at the same rate.
    pub(super) fn is_same_cycle(
        &self,
        memory: &dyn Memory,
        variables: &Variables,
    ) -> Result<bool, WalkError> {
        let (cycle, rate) = (
            read_cycle(memory, variables)?,
            read_rate(memory, variables)?,
        );
        Ok(cycle == self.cycle && rate == self.rate_bytes)
    }
}

/// Why a walk failed.
#[derive(Debug)]
pub(super) enum WalkError {
    Memory(io::Error),
    Implausible(&'static str),
}

impl From<io::Error> for WalkError {
    fn from(error: io::Error) -> Self {
        Self::Memory(error)
    }
}

/// What is known of a program's buckets.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// Oldest first.
    buckets: Vec<Arc<Bucket>>,
    frames: usize,
    /// The head of the list when it was walked last.
    head: u64,
    /// The last rate that was not 0.
    rate: Option<u64>,
    rate_changed: bool,
}

impl Walk {
    /// Reads the profile.
    pub(super) fn read(
        &mut self,
        memory: &dyn Memory,
        layout: Layout,
        variables: &Variables,
    ) -> Result<Reading, WalkError> {
        let begun = Instant::now();
        for left in (0..TRIES).rev() {
            let cycle = read_cycle(memory, variables)?;
            self.extend(memory, layout, variables)?;
            let first = self.records(memory, layout)?;
            let second = self.records(memory, layout)?;
            let index = (cycle >> 1) as usize % FUTURE_CYCLES;
            let is_early = first.iter().all(|record| record.published(index) == (0, 0));
            let take = |record: &Record| {
                if is_early {
                    record.all()
                } else {
                    record.published(index)
                }
            };
            // While a cycle is added to what is published, it can be in both.
            let is_flushing = !is_early && second.iter().any(|record| record.is_pending(index));
            let is_settled = !is_flushing
                && read_cycle(memory, variables)? == cycle
                && (is_early || first.iter().map(take).eq(second.iter().map(take)));
            if !is_settled && left > 0 {
                thread::sleep(REST);
                continue;
            }
            self.require_plausible(&first, &second, is_early, index)?;
            let rate_bytes = self.note_rate(memory, variables)?;
            let counts = self.buckets.iter().zip(&second);
            let counts = counts.map(|(bucket, record)| {
                let (allocs, frees) = take(record);
                Count {
                    bucket: Arc::clone(bucket),
                    allocs,
                    frees: frees.min(allocs),
                }
            });
            return Ok(Reading {
                at: begun,
                rate_bytes,
                interval_bytes: self.rate.unwrap_or(1),
                rate_changed: self.rate_changed,
                cycle,
                is_early,
                is_settled,
                counts: counts.collect(),
                took: begun.elapsed(),
            });
        }
        Err(WalkError::Implausible("it was not read"))
    }

    fn note_rate(&mut self, memory: &dyn Memory, variables: &Variables) -> Result<u64, WalkError> {
        let rate = read_rate(memory, variables)?;
        let before = self.rate;
        if rate > 0 {
            self.rate = Some(rate);
        }
        // What was sampled before the first reading is at a rate that nobody knows.
        self.rate_changed |= before.is_some_and(|before| before != rate);
        Ok(rate)
    }

    /// Walks the list from its head to what is known.
    fn extend(
        &mut self,
        memory: &dyn Memory,
        layout: Layout,
        variables: &Variables,
    ) -> Result<(), WalkError> {
        let mut blocks = Blocks::new(memory);
        let head = blocks.u64(variables.buckets)?;
        let mut new = Vec::new();
        let mut seen = HashSet::new();
        let mut frames = self.frames;
        let mut at = head;
        while at != 0 && at != self.head {
            if !seen.insert(at) {
                return Err(WalkError::Implausible("its list of buckets has a loop"));
            }
            let (bucket, next) = read_bucket(&mut blocks, layout, at)?;
            frames += bucket.stack.len();
            new.push(Arc::new(bucket));
            if self.buckets.len() + new.len() > MAX_BUCKETS || frames > MAX_FRAMES {
                return Err(WalkError::Implausible("it has too many buckets"));
            }
            at = next;
        }
        if at == 0 && self.head != 0 {
            return Err(WalkError::Implausible("buckets have gone from its list"));
        }
        self.buckets.extend(new.into_iter().rev());
        self.frames = frames;
        self.head = head;
        Ok(())
    }

    fn records(&self, memory: &dyn Memory, layout: Layout) -> Result<Vec<Record>, WalkError> {
        let mut blocks = Blocks::new(memory);
        self.buckets
            .iter()
            .map(|bucket| {
                let words = blocks.words(bucket.record(), layout.record_words())?;
                Ok(Record::new(&words, layout, bucket.size_bytes))
            })
            .collect()
    }

    /// What the runtime counts twice has to agree, nearly everywhere.
    fn require_plausible(
        &self,
        first: &[Record],
        second: &[Record],
        is_early: bool,
        index: usize,
    ) -> Result<(), WalkError> {
        let unchanged = first.iter().zip(second).filter(|(one, two)| one == two);
        let wrong = unchanged
            .filter(|(record, _)| {
                let (allocs, frees) = if is_early {
                    record.all()
                } else {
                    record.published(index)
                };
                !record.bytes_agree || frees > allocs
            })
            .count();
        if wrong > self.buckets.len() / TOLERATED {
            return Err(WalkError::Implausible("its counts contradict each other"));
        }
        Ok(())
    }
}

fn read_rate(memory: &dyn Memory, variables: &Variables) -> Result<u64, WalkError> {
    let mut rate = [0; 8];
    memory.read(variables.rate, &mut rate)?;
    // Below zero it is off, too.
    let rate = i64::from_le_bytes(rate).max(0).unsigned_abs();
    if rate > MAX_RATE {
        return Err(WalkError::Implausible("its sampling rate"));
    }
    Ok(rate)
}

fn read_cycle(memory: &dyn Memory, variables: &Variables) -> Result<u32, WalkError> {
    let mut cycle = [0; 4];
    memory.read(variables.cycle, &mut cycle)?;
    let cycle = u32::from_le_bytes(cycle);
    if cycle >> 1 >= CYCLE_WRAP {
        return Err(WalkError::Implausible("its profile's cycle"));
    }
    Ok(cycle)
}

/// Reads a bucket, and where the next one is.
fn read_bucket(
    blocks: &mut Blocks<'_>,
    layout: Layout,
    address: u64,
) -> Result<(Bucket, u64), WalkError> {
    const WRONG: WalkError = WalkError::Implausible("its list of buckets has something else in it");
    if !address.is_multiple_of(8) || address > i64::MAX.unsigned_abs() - (1 << 20) {
        return Err(WRONG);
    }
    let header = blocks.words(address, 6)?;
    let [_, next, kind, hash, size_bytes, depth] = *header else {
        return Err(WRONG);
    };
    if kind != MEM_PROFILE || depth > layout.max_stack {
        return Err(WRONG);
    }
    let depth = usize::try_from(depth).unwrap_or(0);
    let stack = blocks.words(address + BUCKET_BYTES, depth)?;
    if hash_of(&stack, size_bytes) != hash {
        return Err(WRONG);
    }
    let bucket = Bucket {
        address,
        size_bytes,
        stack: stack.into_boxed_slice(),
    };
    Ok((bucket, next))
}

/// The hash that the runtime finds buckets by (`stkbucket` in `src/runtime/mprof.go`): that
/// it is right proves that a bucket is one.
pub(super) fn hash_of(stack: &[u64], size_bytes: u64) -> u64 {
    let mut hash = 0_u64;
    for &word in stack.iter().chain([&size_bytes]) {
        hash = hash.wrapping_add(word);
        hash = hash.wrapping_add(hash << 10);
        hash ^= hash >> 6;
    }
    hash = hash.wrapping_add(hash << 3);
    hash ^ hash >> 11
}

/// A record's counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    /// Allocations and frees: published, and of each cycle that is not.
    cycles: [(u64, u64); 1 + FUTURE_CYCLES],
    /// The bytes, where they are counted too, are those of as many blocks.
    bytes_agree: bool,
}

impl Record {
    fn new(words: &[u64], layout: Layout, size_bytes: u64) -> Self {
        let mut record = Self {
            cycles: [(0, 0); 1 + FUTURE_CYCLES],
            bytes_agree: true,
        };
        let cycles = words.chunks_exact(layout.cycle_words);
        for (cycle, words) in record.cycles.iter_mut().zip(cycles) {
            let word = |at: usize| words.get(at).copied();
            *cycle = (word(0).unwrap_or(0), word(1).unwrap_or(0));
            let agrees = |count: u64, bytes: Option<u64>| {
                bytes.is_none_or(|bytes| count.wrapping_mul(size_bytes) == bytes)
            };
            record.bytes_agree &= agrees(cycle.0, word(2)) && agrees(cycle.1, word(3));
        }
        record
    }

    fn cycle(&self, index: usize) -> (u64, u64) {
        self.cycles.get(1 + index).copied().unwrap_or_default()
    }

    /// What `runtime.MemProfile` tells: it adds the present cycle itself if nobody has.
    fn published(&self, index: usize) -> (u64, u64) {
        let [active, ..] = self.cycles;
        add(active, self.cycle(index))
    }

    /// Whether the present cycle has counts that are not with the published ones yet.
    fn is_pending(&self, index: usize) -> bool {
        self.cycle(index) != (0, 0)
    }

    fn all(&self) -> (u64, u64) {
        self.cycles.into_iter().fold((0, 0), add)
    }
}

fn add(one: (u64, u64), other: (u64, u64)) -> (u64, u64) {
    (one.0.wrapping_add(other.0), one.1.wrapping_add(other.1))
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
