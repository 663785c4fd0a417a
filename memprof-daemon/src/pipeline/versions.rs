//! Stacks that have the same addresses and are of different code, since one library has
//! taken the place of another: told apart when they are booked, and each with its own
//! code when they are named.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use memprof_common::{stack::StackKey, unwind::walk::StackEnd};

use crate::{
    address::AbsAddr,
    ledger::{StackSnapshot, StackTrace},
    process::{
        debug_info::DebugInfo,
        history::CodeHistory,
        mapping::{MappedFile, Mapping, MappingLookup},
    },
    sample::StackId,
};

/// Replaced files that are held open for their names, a process.
const MAX_FILES: usize = 128;

/// The versions of a process image's stacks.
#[derive(Debug, Default)]
pub(super) struct StackVersions {
    known: HashMap<StackKey, Known>,
    /// Replaced files that versions hold open, by device and inode.
    files: HashSet<(u64, u64)>,
    /// Samples whose walk did not know yet of code that had been replaced.
    pub(super) stale_samples: u64,
    /// Samples of code that was replaced so long before that it is not known which.
    pub(super) late_samples: u64,
    /// Places whose file is not held open, since too many are: they have no names.
    pub(super) closed_places: u64,
}

#[derive(Debug, Default)]
struct Known {
    /// The version of samples that are taken now ...
    present: u32,
    /// ... as long as the code's history says this.
    as_of: Option<u64>,
    /// All but version 0, from 1 on.
    versions: Vec<Version>,
}

/// How a stack differs from one through what was first at each address.
#[derive(Clone, Debug, Default)]
pub(super) struct Version {
    /// Frames that can be trusted, if not all.
    kept: Option<usize>,
    /// The code at those addresses that had other code first, by address.
    places: Vec<(AbsAddr, Option<Arc<Mapping>>)>,
}

impl Version {
    fn is_same(&self, other: &Self) -> bool {
        self.kept == other.kept
            && self.places.len() == other.places.len()
            && self.places.iter().zip(&other.places).all(|(a, b)| {
                a.0 == b.0
                    && match (&a.1, &b.1) {
                        (Some(a), Some(b)) => a.is_same_code(b),
                        (None, None) => true,
                        _ => false,
                    }
            })
    }
}

impl StackVersions {
    /// The version of a stack that a sample was taken with at a time. `by_tables`: it was
    /// walked by tables, and is wrong behind code that BPF took for other code.
    pub(super) fn version(
        &mut self,
        history: &CodeHistory,
        (key, trace): (StackKey, &StackTrace),
        time_ns: u64,
        by_tables: bool,
    ) -> u32 {
        if !history.has_changed() {
            return 0;
        }
        let present = history.present(time_ns);
        let known = self.known.entry(key).or_default();
        if present.is_some() && known.as_of == present {
            return known.present;
        }
        let version = version_at(history, trace, time_ns, by_tables);
        let number = if version.kept.is_none() && version.places.is_empty() {
            0
        } else {
            let place = known.versions.iter().position(|old| old.is_same(&version));
            let place = place.unwrap_or_else(|| {
                let version = hold(version, &mut self.files, &mut self.closed_places);
                known.versions.push(version);
                known.versions.len() - 1
            });
            u32::try_from(place + 1).unwrap_or(u32::MAX)
        };
        if present.is_some() {
            known.present = number;
            known.as_of = present;
        }
        number
    }

    /// What is known takes so many bytes, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.known.capacity() * (size_of::<(StackKey, Known)>() + 1)
    }

    /// Forgets stacks that are in nobody's books, and lets go of files that only those held.
    pub(super) fn forget(&mut self, unused: &HashSet<StackKey>) {
        let known = self.known.len();
        self.known.retain(|stack, _| !unused.contains(stack));
        if self.known.len() == known {
            return;
        }
        let versions = self.known.values().flat_map(|known| &known.versions);
        let places = versions.flat_map(|version| &version.places);
        self.files = places
            .filter_map(|place| place.1.as_ref()?.file.as_ref())
            .filter(|file| file.file.is_some())
            .map(|file| (file.device, file.inode))
            .collect();
    }

    fn get(&self, stack: StackId) -> Option<&Version> {
        let place = usize::try_from(stack.version.checked_sub(1)?).ok()?;
        self.known.get(&stack.key)?.versions.get(place)
    }

    /// Whether a stack was cut since its walk did not know yet what code it came to.
    pub(super) fn is_stale(&self, stack: StackId) -> bool {
        self.get(stack)
            .is_some_and(|version| version.kept.is_some())
    }

    /// Groups stacks such that within each an address has one meaning.
    pub(super) fn group(&self, stacks: Vec<(StackId, StackSnapshot)>) -> Vec<StackGroup> {
        let mut groups = vec![StackGroup::default()];
        for (id, stack) in stacks {
            let Some(version) = self.get(id) else {
                if let Some(first) = groups.first_mut() {
                    first.stacks.push(stack);
                }
                continue;
            };
            let stack = StackSnapshot {
                trace: cut(stack.trace, version.kept),
                counters: stack.counters,
            };
            let meanings: Vec<_> = stack
                .trace
                .frames
                .iter()
                .map(|frame| {
                    let address = frame.call_site();
                    let place = version.places.iter().find(|place| place.0 == address);
                    (address, place.map(|place| place.1.clone()))
                })
                .collect();
            // The first group is of those stacks that mean what was there first.
            let place = groups
                .iter()
                .skip(1)
                .position(|group| group.fits(&meanings))
                .map_or(groups.len(), |place| place + 1);
            if place == groups.len() {
                groups.push(StackGroup::default());
            }
            if let Some(group) = groups.get_mut(place) {
                group.meanings.extend(meanings);
                group.stacks.push(stack);
            }
        }
        groups.retain(|group| !group.stacks.is_empty());
        groups
    }
}

/// What a sample's frames were at its time, where that is not what was there first.
fn version_at(history: &CodeHistory, trace: &StackTrace, time_ns: u64, by_tables: bool) -> Version {
    let addresses = || trace.frames.iter().map(|frame| frame.call_site());
    // By the kernel, without tables.
    let by_tables = by_tables && trace.end != StackEnd::Unverified;
    // The frame itself is right: it was found by the code before it.
    let kept = addresses()
        .position(|address| by_tables && history.was_untold(address, time_ns))
        .map(|wrong| wrong + 1)
        // The walk may have ended there by itself, and said why.
        .filter(|&kept| kept < trace.frames.len() || trace.end == StackEnd::Complete);
    let mut places: Vec<_> = addresses()
        .take(kept.unwrap_or(usize::MAX))
        .filter_map(|address| {
            let then = history.lookup_at(address, time_ns);
            let first = history.first().lookup(address);
            let is_same = match (&then, &first) {
                (Some(then), Some(first)) => then.is_same_code(first),
                (None, None) => true,
                _ => false,
            };
            (!is_same).then_some((address, then))
        })
        .collect();
    places.sort_unstable_by_key(|place| place.0);
    places.dedup_by_key(|place| place.0);
    Version { kept, places }
}

/// Lets go of files if too many are held.
fn hold(mut version: Version, files: &mut HashSet<(u64, u64)>, closed_places: &mut u64) -> Version {
    for mapping in version
        .places
        .iter_mut()
        .filter_map(|place| place.1.as_mut())
    {
        let Some(file) = &mapping.file else {
            continue;
        };
        let id = (file.device, file.inode);
        if files.contains(&id) {
            continue;
        }
        if files.len() < MAX_FILES {
            files.insert(id);
            continue;
        }
        *closed_places += 1;
        let closed = MappedFile {
            path: file.path.clone(),
            device: file.device,
            inode: file.inode,
            build_id: file.build_id.clone(),
            file: None,
            debug_info: DebugInfo::Missing,
        };
        *mapping = Arc::new(Mapping {
            file: Some(Arc::new(closed)),
            ..Mapping::clone(mapping)
        });
    }
    version
}

fn cut(trace: Arc<StackTrace>, kept: Option<usize>) -> Arc<StackTrace> {
    match kept.and_then(|kept| trace.frames.get(..kept)) {
        Some(frames) => Arc::new(StackTrace {
            frames: frames.to_vec(),
            end: StackEnd::StaleTables,
            by_frame_pointer: trace.by_frame_pointer,
        }),
        None => trace,
    }
}

/// Stacks, and what their addresses mean.
#[derive(Clone, Debug, Default)]
pub struct StackGroup {
    /// The stacks.
    pub stacks: Vec<StackSnapshot>,
    /// The code at each of their addresses, if it is not what was there first. Empty if it
    /// is everywhere.
    pub meanings: HashMap<AbsAddr, Option<Option<Arc<Mapping>>>>,
}

type Meaning = Option<Option<Arc<Mapping>>>;

impl StackGroup {
    fn fits(&self, meanings: &[(AbsAddr, Meaning)]) -> bool {
        meanings.iter().all(|(address, meaning)| {
            self.meanings
                .get(address)
                .is_none_or(|known| match (known, meaning) {
                    (Some(Some(a)), Some(Some(b))) => a.is_same_code(b),
                    (Some(None), Some(None)) | (None, None) => true,
                    _ => false,
                })
        })
    }
}

/// The mappings that a group's stacks were captured in.
#[derive(Debug)]
pub(super) struct GroupMappings<T> {
    /// What was there first.
    pub(super) first: Arc<T>,
    /// As in the group.
    pub(super) meanings: HashMap<AbsAddr, Meaning>,
}

impl<T: MappingLookup> MappingLookup for GroupMappings<T> {
    fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>> {
        match self.meanings.get(&address) {
            Some(Some(mapping)) => mapping.clone(),
            _ => self.first.lookup(address),
        }
    }

    fn generated_name(&self, address: AbsAddr) -> Option<String> {
        self.first.generated_name(address)
    }
}

#[cfg(test)]
#[path = "versions_tests.rs"]
mod tests;
