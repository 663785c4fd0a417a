//! Names already found, in bounded memory.

use std::{collections::HashMap, sync::Arc};

use crate::{
    address::FileOffset,
    symbolize::{frame::FrameName, names::NamedFile},
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
}

impl NameCache {
    /// A cache of at most that many names.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            capacity,
        }
    }

    /// The name of the place, if it is known.
    pub(crate) fn get(&mut self, place: Place) -> Option<Arc<FrameName>> {
        if let Some(name) = self.young.get(&place) {
            return Some(Arc::clone(name));
        }
        let name = self.old.remove(&place)?;
        self.insert(place, Arc::clone(&name));
        Some(name)
    }

    /// Remembers a name.
    pub(crate) fn insert(&mut self, place: Place, name: Arc<FrameName>) {
        if self.young.len() >= (self.capacity / 2).max(1) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(place, name);
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
        cache.insert(place(0), name());
        for offset in 1..10_000 {
            cache.insert(place(offset), name());
            assert!(cache.get(place(0)).is_some(), "{offset}");
            assert!(cache.len() <= 100, "{offset}: {}", cache.len());
        }
        assert!(cache.get(place(1)).is_none());
    }
}
