//! What is known of processes that have not called an allocator yet.
//!
//! The kernel's records tell of each process that is made, of its program and of what that
//! maps; by the time of its first call it can have ended. A process is its parent's copy until
//! it replaces its program.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use crate::ring::mmap_events::MmapEvent;

/// Processes that are remembered, at most. Of others less is known when they turn up.
const MAX_BIRTHS: usize = 1 << 13;

/// Mappings that are remembered of each; a program maps a dozen before its first call.
const MAX_MAPPINGS: usize = 64;

/// A process that has ended is remembered so long: the event of its first call may not have
/// been read.
const KEEP_ENDED: Duration = Duration::from_secs(2);

/// What is known of one.
#[derive(Clone, Debug, Default)]
pub(super) struct Birth {
    /// Whose copy it was made as.
    pub(super) parent: Option<u32>,
    /// When it was made, or began its program.
    pub(super) since_ns: u64,
    /// It has its parent's memory: it has not replaced its program since.
    pub(super) is_copy: bool,
    /// Its program's name, if it has begun one.
    pub(super) comm: Option<String>,
    /// What its program has mapped, if it has begun one.
    pub(super) code: Vec<MmapEvent>,
}

impl Birth {
    /// The path of its program: what is mapped first.
    pub(super) fn exe(&self) -> Option<String> {
        let first = self.comm.as_ref().and_then(|_| self.code.first())?;
        Some(first.path.to_string_lossy().into_owned())
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Births {
    births: HashMap<u32, Birth>,
    ended: VecDeque<(Instant, u32)>,
}

impl Births {
    /// A process was made.
    pub(super) fn fork(&mut self, pid: u32, parent: u32, at_ns: u64) {
        if self.births.len() >= MAX_BIRTHS {
            self.births.clear();
            self.ended.clear();
        }
        // Of a parent that has not called yet either, it has the program.
        let mut birth = self.births.get(&parent).cloned().unwrap_or_default();
        birth.parent = Some(parent);
        birth.since_ns = at_ns;
        birth.is_copy = true;
        self.births.insert(pid, birth);
    }

    /// A process has begun a program.
    pub(super) fn exec(&mut self, pid: u32, comm: String, at_ns: u64) {
        let parent = self.births.get(&pid).and_then(|birth| birth.parent);
        if self.births.len() >= MAX_BIRTHS && parent.is_none() {
            return;
        }
        self.births.insert(
            pid,
            Birth {
                parent,
                since_ns: at_ns,
                is_copy: false,
                comm: Some(comm),
                code: Vec::new(),
            },
        );
    }

    /// A process has mapped something.
    pub(super) fn map(&mut self, event: &MmapEvent) {
        if let Some(birth) = self.births.get_mut(&event.pid)
            && birth.code.len() < MAX_MAPPINGS
        {
            birth.code.push(event.clone());
        }
    }

    /// A process has ended.
    pub(super) fn exit(&mut self, pid: u32) {
        if self.births.contains_key(&pid) {
            self.ended.push_back((Instant::now(), pid));
        }
    }

    /// Whether a process has its parent's memory, as far as is known.
    pub(super) fn is_copy(&self, pid: u32) -> bool {
        self.births.get(&pid).is_some_and(|birth| birth.is_copy)
    }

    /// A process has called an allocator: what is known of it.
    pub(super) fn take(&mut self, pid: u32) -> Option<Birth> {
        self.births.remove(&pid)
    }

    /// Forgets those that are gone although nobody has told: that was lost, or came before it
    /// was told that they were made, from another processor. `pids` are all that there were
    /// at a moment.
    pub(super) fn forget_gone(&mut self, pids: &HashSet<u32>, at_ns: u64) {
        let ended: HashSet<u32> = self.ended.iter().map(|&(_, pid)| pid).collect();
        self.births.retain(|pid, birth| {
            birth.since_ns >= at_ns || pids.contains(pid) || ended.contains(pid)
        });
    }

    /// Forgets those that ended without a call.
    pub(super) fn forget_ended(&mut self) {
        while let Some(&(at, pid)) = self.ended.front()
            && at.elapsed() >= KEEP_ENDED
        {
            self.ended.pop_front();
            self.births.remove(&pid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{AbsAddr, FileOffset};

    fn mapping(pid: u32, path: &str) -> MmapEvent {
        MmapEvent {
            timestamp_ns: 1,
            pid,
            start: AbsAddr(0x1000),
            len: 0x1000,
            file_offset: FileOffset(0),
            device_major: 8,
            device_minor: 1,
            inode: 7,
            path: path.into(),
        }
    }

    /// Check that a child has its parent's program until it begins its own, and that what is
    /// taken is gone.
    #[test]
    fn programs() {
        let mut births = Births::default();
        births.fork(2, 1, 10);
        births.exec(2, "sh".to_owned(), 20);
        births.map(&mapping(2, "/bin/sh"));
        births.fork(3, 2, 30);
        births.fork(4, 2, 31);
        births.exec(4, "ls".to_owned(), 40);
        births.map(&mapping(4, "/bin/ls"));
        assert!(births.is_copy(3) && !births.is_copy(4) && !births.is_copy(5));
        let child = births.take(3).expect("the copy");
        assert_eq!(
            (child.parent, child.exe().as_deref()),
            (Some(2), Some("/bin/sh"))
        );
        let other = births.take(4).expect("the other");
        assert_eq!(
            (other.comm.as_deref(), other.exe().as_deref()),
            (Some("ls"), Some("/bin/ls"))
        );
        assert!(births.take(4).is_none());
    }

    /// Check that one whose end was told before its beginning is forgotten, and none that
    /// there is, that is new, or of which a call may yet be told.
    #[test]
    fn gone() {
        let mut births = Births::default();
        births.exit(2);
        births.fork(2, 1, 10);
        births.fork(3, 1, 10);
        births.fork(4, 1, 10);
        births.exit(4);
        births.fork(5, 1, 20);
        births.forget_gone(&[1, 3].into(), 20);
        let left: HashSet<u32> = births.births.keys().copied().collect();
        assert_eq!(left, [3, 4, 5].into());
    }

    /// Check that it does not grow without end.
    #[test]
    fn bounded() {
        let mut births = Births::default();
        for pid in 0..3 * MAX_BIRTHS as u32 {
            births.fork(pid, 1, 10);
            for _ in 0..3 {
                births.map(&mapping(pid, "/bin/sh"));
            }
        }
        for _ in 0..2 * MAX_MAPPINGS {
            births.map(&mapping(3 * MAX_BIRTHS as u32 - 1, "/bin/sh"));
        }
        assert!(births.births.len() <= MAX_BIRTHS);
        assert!(
            births
                .births
                .values()
                .all(|birth| birth.code.len() <= MAX_MAPPINGS)
        );
    }
}
