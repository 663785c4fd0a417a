//! What code was at an address when a stack was captured.
//!
//! A library that is unloaded makes room for another. The kernel tells of the second
//! ([`crate::ring::mmap_events`]), and of when it came; samples tell when they were taken,
//! by the same clock. So it is known which of both a sample ran in, whenever it is asked.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    address::AbsAddr,
    process::mapping::{Mapping, MappingLookup as _, MappingTable},
};

/// Changes that are remembered; samples are told milliseconds after they were taken, or
/// seconds if their events were lost.
const MAX_CHANGES: usize = 128;

/// Ranges that are remembered as newer than a reading of `/proc/PID/maps` under way.
const MAX_RECENT: usize = 1024;

/// A sample's time is that of its walk's end. Longer than a walk takes, unless it is
/// interrupted.
const WALK_NS: u64 = 1_000_000;

/// Code that was replaced by other code.
#[derive(Debug)]
struct Change {
    /// What was there.
    before: Arc<Mapping>,
    /// Until when.
    at_ns: u64,
    /// Since when walks know of it.
    told_ns: Option<u64>,
}

/// The executable mappings of a program, and those that they have replaced.
#[derive(Debug, Default)]
pub struct CodeHistory {
    now: MappingTable,
    /// What each place was first; none as long as it is that still.
    first: Option<MappingTable>,
    /// In the order of time.
    changes: VecDeque<Change>,
    /// Counts what changes answers.
    edits: u64,
    /// Of what was before, nothing is known any more.
    forgotten_ns: u64,
    /// What a record from before says has been read meanwhile, or was replaced.
    read_ns: u64,
    /// What records have told of, and when, for readings that began before.
    recent: VecDeque<(u64, AbsAddr, AbsAddr)>,
    /// Nothing of the program itself has been read: what is known was the program's that
    /// it has replaced, for the most part.
    is_inherited: bool,
}

impl CodeHistory {
    /// A program's mappings as they were read at a time.
    #[must_use]
    pub fn new(mappings: MappingTable, read_ns: u64) -> Self {
        Self {
            now: mappings,
            read_ns,
            ..Self::default()
        }
    }

    /// Of a program that has just replaced another. The records about its mappings may
    /// have been taken for those of the one before: so it starts from those. What they
    /// give way to does not count as code of this program.
    #[must_use]
    pub fn inherit(&self) -> Self {
        Self {
            now: self.now.clone(),
            is_inherited: true,
            ..Self::default()
        }
    }

    /// The present mappings.
    #[must_use]
    pub const fn now(&self) -> &MappingTable {
        &self.now
    }

    /// What each place held first.
    #[must_use]
    pub fn first(&self) -> &MappingTable {
        self.first.as_ref().unwrap_or(&self.now)
    }

    /// Whether any code was ever replaced by other code.
    #[must_use]
    pub const fn has_changed(&self) -> bool {
        self.first.is_some()
    }

    /// Takes notice of a mapping that was made at a time.
    pub fn learn(&mut self, mapping: &Mapping, at_ns: u64) {
        if at_ns < self.read_ns {
            return;
        }
        self.learn_parts(mapping, at_ns);
        // Records come in the order of time, but for those of two CPUs that were written
        // while the buffers were being emptied.
        let place = self.recent.partition_point(|&(ns, ..)| ns <= at_ns);
        self.recent
            .insert(place, (at_ns, mapping.start, mapping.end));
        if self.recent.len() > MAX_RECENT {
            self.recent.pop_front();
        }
    }

    /// Takes notice of all mappings, as they were read at a time.
    pub fn learn_all(&mut self, mappings: &MappingTable, read_ns: u64) {
        for mapping in mappings.iter() {
            self.learn_parts(mapping, read_ns);
        }
        self.read_ns = self.read_ns.max(read_ns);
        self.is_inherited = false;
    }

    /// Where something newer is known, that stays.
    fn learn_parts(&mut self, mapping: &Mapping, at_ns: u64) {
        let newer = self.recent.partition_point(|&(ns, ..)| ns <= at_ns);
        let mut known: Vec<(AbsAddr, AbsAddr)> = self
            .recent
            .range(newer..)
            .map(|&(_, start, end)| (start, end))
            .filter(|&(start, end)| start < mapping.end && mapping.start < end)
            .collect();
        known.sort_unstable();
        let mut from = mapping.start;
        for (start, end) in known {
            if let Some(part) = mapping.part(from, start) {
                self.put(part, at_ns);
            }
            from = from.max(end);
        }
        if let Some(part) = mapping.part(from, mapping.end) {
            self.put(part, at_ns);
        }
    }

    fn put(&mut self, mapping: Mapping, at_ns: u64) {
        let replaced: Vec<Mapping> = self
            .now
            .within(mapping.start, mapping.end)
            .filter(|old| !self.is_inherited && !old.is_same_code(&mapping))
            .collect();
        if !replaced.is_empty() && self.first.is_none() {
            self.first = Some(self.now.clone());
        }
        if let Some(first) = &mut self.first {
            first.fill(&mapping);
        }
        for before in replaced {
            let change = Change {
                before: Arc::new(before),
                at_ns,
                told_ns: None,
            };
            let place = self.changes.partition_point(|c| c.at_ns <= at_ns);
            self.changes.insert(place, change);
            self.edits += 1;
        }
        while self.changes.len() > MAX_CHANGES {
            if let Some(oldest) = self.changes.pop_front() {
                self.forgotten_ns = self.forgotten_ns.max(oldest.at_ns);
            }
        }
        self.now.insert(mapping);
    }

    /// Walks that begin after this time know of all that was learnt.
    pub fn told(&mut self, now_ns: u64) {
        for change in self.changes.iter_mut().rev() {
            if change.told_ns.is_some() {
                break;
            }
            change.told_ns = Some(now_ns);
            self.edits += 1;
        }
    }

    /// The mapping that `address` was in at a time. Before all that is remembered, it is
    /// the oldest that is: see [`Self::is_forgotten`].
    #[must_use]
    pub fn lookup_at(&self, address: AbsAddr, time_ns: u64) -> Option<Arc<Mapping>> {
        let later = self.changes.partition_point(|c| c.at_ns <= time_ns);
        self.changes
            .range(later..)
            .map(|change| &change.before)
            .find(|before| before.start <= address && address < before.end)
            .cloned()
            .or_else(|| self.now.lookup(address))
    }

    /// Whether what was at that time is not known for sure any more.
    #[must_use]
    pub const fn is_forgotten(&self, time_ns: u64) -> bool {
        time_ns < self.forgotten_ns
    }

    /// Whether a walk that ended at a time may have taken the code at `address` for what
    /// was there before.
    #[must_use]
    pub fn was_untold(&self, address: AbsAddr, time_ns: u64) -> bool {
        self.changes
            .iter()
            .rev()
            .filter(|change| change.at_ns <= time_ns)
            .take_while(|change| Self::is_untold(change, time_ns))
            .any(|change| change.before.start <= address && address < change.before.end)
    }

    fn is_untold(change: &Change, time_ns: u64) -> bool {
        change
            .told_ns
            .is_none_or(|told| time_ns < told.saturating_add(WALK_NS))
    }

    /// A number that is the same for all times at which the answers about all addresses
    /// are the present ones; none for other times.
    #[must_use]
    pub fn present(&self, time_ns: u64) -> Option<u64> {
        let is_present = self
            .changes
            .back()
            .is_none_or(|last| last.at_ns <= time_ns && !Self::is_untold(last, time_ns));
        is_present.then_some(self.edits)
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
