//! Names already found, in bounded memory.

use std::{collections::HashMap, sync::Arc};

use crate::{
    address::FileOffset,
    symbolize::{
        frame::{FrameName, FunctionLine},
        names::NamedFile,
    },
};

/// A place in a file, whatever process maps it.
pub(crate) type Place = (NamedFile, FileOffset);

/// Names by place.
///
/// Two generations: when the young one is full it becomes the old one, and what
/// was old is forgotten. A name asked for while old is young again. So whatever
/// the last `capacity / 2` distinct questions were about is still known, at the
/// price of two look-ups and no list of uses.
#[derive(Debug)]
pub(crate) struct NameCache {
    young: HashMap<Place, Arc<FrameName>>,
    old: HashMap<Place, Arc<FrameName>>,
    capacity: usize,
    /// What both hold, roughly.
    young_bytes: u64,
    old_bytes: u64,
}

/// What a name takes beside its text, roughly: its places in a table and in the heap.
const NAME_BYTES: usize = 256;

fn name_bytes(name: &FrameName) -> u64 {
    let text = |line: &FunctionLine| {
        size_of::<FunctionLine>() + line.function.len() + line.file.as_ref().map_or(0, String::len)
    };
    let text = match name {
        FrameName::Known(lines) => lines.iter().map(text).sum(),
        FrameName::Unknown(_) => 0,
    };
    (NAME_BYTES + text) as u64
}

impl NameCache {
    /// A cache of at most that many names.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            capacity,
            young_bytes: 0,
            old_bytes: 0,
        }
    }

    /// The name of the place, if it is known.
    pub(crate) fn get(&mut self, place: Place) -> Option<Arc<FrameName>> {
        if let Some(name) = self.young.get(&place) {
            return Some(Arc::clone(name));
        }
        let name = self.old.remove(&place)?;
        self.old_bytes = self.old_bytes.saturating_sub(name_bytes(&name));
        self.insert(place, Arc::clone(&name), u64::MAX);
        Some(name)
    }

    /// Remembers a name, and no more than so many bytes of names.
    pub(crate) fn insert(&mut self, place: Place, name: Arc<FrameName>, max_bytes: u64) {
        let is_full = self.young.len() >= (self.capacity / 2).max(1);
        if is_full || self.young_bytes >= max_bytes / 2 {
            self.old = std::mem::take(&mut self.young);
            self.old_bytes = std::mem::take(&mut self.young_bytes);
        }
        self.young_bytes += name_bytes(&name);
        self.young.insert(place, name);
    }

    /// What the names take, roughly.
    pub(crate) const fn bytes(&self) -> u64 {
        self.young_bytes + self.old_bytes
    }

    /// How many names are held.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::symbolize::frame::UnknownReason;

    fn place(offset: u64) -> Place {
        let own = std::fs::File::open("/proc/self/exe").unwrap();
        let content = crate::process::content::Content::of(&own, None).unwrap();
        let file = NamedFile {
            content,
            debug: None,
        };
        (file, FileOffset(offset))
    }

    fn name() -> Arc<FrameName> {
        Arc::new(FrameName::Unknown(UnknownReason::NoSymbol))
    }

    /// Check that the cache never holds more than its capacity, and that what
    /// is asked for again and again outlives a flood of other names.
    #[test]
    fn bounded_and_keeps_what_is_used() {
        let mut cache = NameCache::new(100);
        cache.insert(place(0), name(), u64::MAX);
        for offset in 1..10_000 {
            cache.insert(place(offset), name(), u64::MAX);
            assert!(cache.get(place(0)).is_some(), "{offset}");
            assert!(cache.len() <= 100, "{offset}: {}", cache.len());
        }
        assert!(cache.get(place(1)).is_none());
        let a_name = name_bytes(&name());
        assert!(cache.bytes() <= 100 * a_name, "{}", cache.bytes());
    }

    /// Check that names take no more bytes than they may, and that what they take is what is
    /// held of them.
    #[test]
    fn bounded_in_bytes() {
        let mut cache = NameCache::new(1_000_000);
        let a_name = name_bytes(&name());
        for offset in 0..10_000 {
            cache.insert(place(offset), name(), 100 * a_name);
            assert_eq!(cache.bytes(), cache.len() as u64 * a_name);
            assert!(cache.len() <= 102, "{}", cache.len());
        }
        cache.get(place(9_940)).expect("an old name");
        assert_eq!(cache.bytes(), cache.len() as u64 * a_name);
    }
}
