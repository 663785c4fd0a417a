//! Executable mappings.

use std::{fs::File, path::PathBuf, sync::Arc};

use super::debug_info::DebugInfo;
use crate::address::{AbsAddr, FileOffset};

/// An ELF file that some process maps, held open: so that it can be read after
/// the process is gone, after it was replaced, and from another mount namespace.
#[derive(Debug)]
pub struct MappedFile {
    /// Where the target sees it.
    pub path: PathBuf,
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// GNU build id, if it has one.
    pub build_id: Option<Vec<u8>>,
    /// The open file; none if it could not be opened.
    pub file: Option<File>,
    /// Where its debug information is: found when the file was opened, since later the
    /// target may be gone.
    pub debug_info: DebugInfo,
}

/// An executable mapping of a file.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First address.
    pub start: AbsAddr,
    /// First address behind it.
    pub end: AbsAddr,
    /// Where in the file `start` is.
    pub file_offset: FileOffset,
    /// The file; none for anonymous memory and for what the kernel provides.
    pub file: Option<Arc<MappedFile>>,
    /// The path or, without a file, the kernel's name for it: `[vdso]`,
    /// `[anon:...]` or nothing.
    pub name: String,
}

impl Mapping {
    /// The part of this mapping within `start..end`, if there is one.
    pub(super) fn part(&self, start: AbsAddr, end: AbsAddr) -> Option<Self> {
        let start = start.max(self.start);
        let end = end.min(self.end);
        (start < end).then(|| Self {
            start,
            end,
            file_offset: FileOffset(
                self.file_offset
                    .0
                    .saturating_add(start.0.saturating_sub(self.start.0)),
            ),
            file: self.file.clone(),
            name: self.name.clone(),
        })
    }

    /// Whether the code at an address that both hold is the same: a place of one file, or
    /// memory that the kernel calls the same.
    #[must_use]
    pub fn is_same_code(&self, other: &Self) -> bool {
        match (&self.file, &other.file) {
            (Some(a), Some(b)) => {
                let bias = |mapping: &Self| mapping.start.0.wrapping_sub(mapping.file_offset.0);
                // Without the file itself, the kernel's device number is known, which can
                // be another.
                let is_same_device = a.device == b.device || a.file.is_none() || b.file.is_none();
                is_same_device && a.inode == b.inode && bias(self) == bias(other)
            }
            (None, None) => self.name == other.name,
            _ => false,
        }
    }
}

/// Finds the mapping that an address is in.
pub trait MappingLookup {
    /// The executable mapping that `address` is in.
    fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>>;

    /// What the program calls the code at `address` that it has made at run time.
    fn generated_name(&self, address: AbsAddr) -> Option<String> {
        let _ = address;
        None
    }
}

/// The executable mappings of one process.
///
/// A clone is a snapshot: it costs one reference, and [`Self::insert`] copies
/// the table (not the mappings) if a snapshot of it is still held.
#[derive(Clone, Debug, Default)]
pub struct MappingTable {
    /// Sorted by `start`; no two overlap, none is empty.
    mappings: Arc<Vec<Arc<Mapping>>>,
}

impl MappingTable {
    /// Adds a mapping that is newer than all in the table: it takes the place
    /// of what it overlaps, as `mmap` with `MAP_FIXED` does.
    pub fn insert(&mut self, mapping: Mapping) {
        let (start, end) = (mapping.start, mapping.end);
        if start >= end {
            return;
        }
        let mappings = Arc::make_mut(&mut self.mappings);
        let first = mappings.partition_point(|old| old.end <= start);
        let last = mappings.partition_point(|old| old.start < end).max(first);
        let overlapped = mappings.get(first..last).unwrap_or_default();
        let before = overlapped
            .first()
            .and_then(|old| old.part(AbsAddr(0), start));
        let after = overlapped
            .last()
            .and_then(|old| old.part(end, AbsAddr(u64::MAX)));
        let replacement = before.into_iter().chain([mapping]).chain(after);
        mappings.splice(first..last, replacement.map(Arc::new));
    }

    /// Adds a mapping where nothing is known yet; what is known stays.
    pub fn fill(&mut self, mapping: &Mapping) {
        let mut start = mapping.start;
        let known: Vec<(AbsAddr, AbsAddr)> = self
            .within(mapping.start, mapping.end)
            .map(|part| (part.start, part.end))
            .collect();
        for (known_start, known_end) in known {
            if let Some(part) = mapping.part(start, known_start) {
                self.insert(part);
            }
            start = known_end;
        }
        if let Some(part) = mapping.part(start, mapping.end) {
            self.insert(part);
        }
    }

    /// The parts of its mappings within a range, by address.
    pub fn within(&self, start: AbsAddr, end: AbsAddr) -> impl Iterator<Item = Mapping> {
        let first = self
            .mappings
            .partition_point(|mapping| mapping.end <= start);
        self.mappings
            .get(first..)
            .unwrap_or_default()
            .iter()
            .take_while(move |mapping| mapping.start < end)
            .filter_map(move |mapping| mapping.part(start, end))
    }

    /// Every mapping, by address.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Mapping>> {
        self.mappings.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mappings.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mappings.is_empty()
    }

    /// Every mapped file once, in the order of addresses.
    #[must_use]
    pub fn files(&self) -> Vec<Arc<MappedFile>> {
        let mut files: Vec<Arc<MappedFile>> = Vec::new();
        for file in self.iter().filter_map(|mapping| mapping.file.as_ref()) {
            if !files.iter().any(|seen| Arc::ptr_eq(seen, file)) {
                files.push(Arc::clone(file));
            }
        }
        files
    }
}

impl MappingLookup for MappingTable {
    fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>> {
        let index = self
            .mappings
            .partition_point(|mapping| mapping.end <= address);
        self.mappings
            .get(index)
            .filter(|mapping| mapping.start <= address)
            .cloned()
    }
}

impl Extend<Mapping> for MappingTable {
    fn extend<I: IntoIterator<Item = Mapping>>(&mut self, mappings: I) {
        for mapping in mappings {
            self.insert(mapping);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64, file_offset: u64, name: &str) -> Mapping {
        Mapping {
            start: AbsAddr(start),
            end: AbsAddr(end),
            file_offset: FileOffset(file_offset),
            file: None,
            name: name.to_owned(),
        }
    }

    fn ranges(table: &MappingTable) -> Vec<(u64, u64, u64, String)> {
        table
            .iter()
            .map(|m| (m.start.0, m.end.0, m.file_offset.0, m.name.clone()))
            .collect()
    }

    /// Check that look-ups include the first address, exclude the end, and find
    /// nothing in gaps.
    #[test]
    fn lookup_at_the_edges() {
        let mut table = MappingTable::default();
        table.extend([
            mapping(0x3000, 0x4000, 0, "b"),
            mapping(0x1000, 0x2000, 0, "a"),
        ]);
        let name = |address| table.lookup(AbsAddr(address)).map(|m| m.name.clone());
        assert_eq!(name(0xfff), None);
        assert_eq!(name(0x1000).as_deref(), Some("a"));
        assert_eq!(name(0x1fff).as_deref(), Some("a"));
        assert_eq!(name(0x2000), None);
        assert_eq!(name(0x3000).as_deref(), Some("b"));
        assert_eq!(name(u64::MAX), None);
    }

    /// Check that a newer mapping splits the one it lies within, and that the
    /// part behind keeps its place in the file.
    #[test]
    fn newer_splits_older() {
        let mut table = MappingTable::default();
        table.insert(mapping(0x1000, 0x9000, 0x100, "old"));
        table.insert(mapping(0x3000, 0x5000, 0, "new"));
        assert_eq!(
            ranges(&table),
            [
                (0x1000, 0x3000, 0x100, "old".to_owned()),
                (0x3000, 0x5000, 0, "new".to_owned()),
                (0x5000, 0x9000, 0x4100, "old".to_owned()),
            ]
        );
    }

    /// Check that a newer mapping swallows what it covers and cuts what it
    /// touches, and that a snapshot taken before does not change.
    #[test]
    fn newer_swallows_older() {
        let mut table = MappingTable::default();
        table.extend([
            mapping(0x1000, 0x3000, 0, "a"),
            mapping(0x3000, 0x4000, 0, "b"),
            mapping(0x5000, 0x7000, 0x10, "c"),
        ]);
        let snapshot = table.clone();
        table.insert(mapping(0x2000, 0x6000, 0, "new"));
        table.insert(mapping(0x8000, 0x8000, 0, "empty"));
        assert_eq!(
            ranges(&table),
            [
                (0x1000, 0x2000, 0, "a".to_owned()),
                (0x2000, 0x6000, 0, "new".to_owned()),
                (0x6000, 0x7000, 0x1010, "c".to_owned()),
            ]
        );
        assert_eq!(snapshot.len(), 3);
    }

    /// Check that what fills a table leaves what is known, also where it lies within.
    #[test]
    fn fills_gaps_only() {
        let mut table = MappingTable::default();
        table.extend([
            mapping(0x2000, 0x3000, 0, "a"),
            mapping(0x4000, 0x5000, 0, "b"),
        ]);
        table.fill(&mapping(0x1000, 0x7000, 0x100, "new"));
        table.fill(&mapping(0x2000, 0x5000, 0, "again"));
        let new = |start, end| (start, end, start - 0x1000 + 0x100, "new".to_owned());
        assert_eq!(
            ranges(&table),
            [
                new(0x1000, 0x2000),
                (0x2000, 0x3000, 0, "a".to_owned()),
                new(0x3000, 0x4000),
                (0x4000, 0x5000, 0, "b".to_owned()),
                new(0x5000, 0x7000),
            ]
        );
        let within: Vec<_> = table
            .within(AbsAddr(0x2800), AbsAddr(0x4000))
            .map(|m| (m.start.0, m.file_offset.0))
            .collect();
        assert_eq!(within, [(0x2800, 0x800), (0x3000, 0x2100)]);
    }

    /// Check the table against a plain model that stores each page's owner, over
    /// 2,000 insertions from a fixed seed.
    #[test]
    fn agrees_with_a_page_model() {
        let mut table = MappingTable::default();
        let mut model: Vec<Option<(String, u64)>> = vec![None; 64];
        let mut state = 0x1234_5678_u64;
        let mut next = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % bound
        };
        for round in 0..2000 {
            let start = next(64);
            let end = start + 1 + next(64 - start);
            let name = round.to_string();
            table.insert(mapping(start << 12, end << 12, 0, &name));
            for page in start..end {
                model[page as usize] = Some((name.clone(), (page - start) << 12));
            }
            for page in 0..64 {
                let address = AbsAddr(page << 12);
                let found = table.lookup(address).map(|m| {
                    let offset = m.file_offset.0 + address.0 - m.start.0;
                    (m.name.clone(), offset)
                });
                assert_eq!(found, model[page as usize]);
            }
        }
    }
}
