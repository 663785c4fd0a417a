//! Files that processes map, as far as they were looked at: where all processes are traced, each
//! new mapping is told, and most are of files that are known.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    time::{Duration, Instant},
};

use crate::{pipeline::sweep::FileName, ring::mmap_events::MmapEvent};

/// A file that was looked at is not looked at again so long. Another one can have its inode by
/// then.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// Files that are remembered, at most.
const MAX_LOOKED_AT: usize = 1 << 14;

/// Processes that wait for what is found in one file, at most. Others are found by the next look
/// through all.
const MAX_WAITING: usize = 1 << 10;

/// What is known of a file.
#[derive(Debug)]
enum Verdict {
    /// It is being looked at; whoever has mapped it meanwhile.
    Asked(BTreeSet<u32>),
    /// Whether Go has built it.
    Known { is_go: bool },
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct LookedAt(HashMap<FileName, (Instant, Verdict)>);

impl LookedAt {
    /// Sorts out who has mapped what: the mappings whose files are to be looked at, and the
    /// processes that have mapped one which Go has built.
    pub(super) fn sort_out(
        &mut self,
        mut events: Vec<MmapEvent>,
    ) -> (Vec<MmapEvent>, BTreeSet<u32>) {
        let now = Instant::now();
        let is_fresh = |at: Instant| now.duration_since(at) < LOOK_AGAIN;
        if self.0.len() >= MAX_LOOKED_AT {
            self.0.retain(|_, (at, _)| is_fresh(*at));
        }
        if self.0.len() >= MAX_LOOKED_AT {
            self.0.clear();
        }
        let mut go = BTreeSet::new();
        events.retain(|event| {
            if event.inode == 0 {
                return false;
            }
            let asked = || (now, Verdict::Asked([event.pid].into()));
            match self.0.entry(FileName::of(event)) {
                Entry::Vacant(new) => {
                    new.insert(asked());
                    true
                }
                Entry::Occupied(mut known) if !is_fresh(known.get().0) => {
                    known.insert(asked());
                    true
                }
                Entry::Occupied(mut known) => {
                    match &mut known.get_mut().1 {
                        Verdict::Known { is_go: true } => {
                            go.insert(event.pid);
                        }
                        Verdict::Asked(waiting) if waiting.len() < MAX_WAITING => {
                            waiting.insert(event.pid);
                        }
                        Verdict::Asked(_) | Verdict::Known { is_go: false } => {}
                    }
                    false
                }
            }
        });
        (events, go)
    }

    /// Files were looked at. Tells which processes have mapped one that Go has built. What could
    /// not be opened is looked at again when it is mapped again.
    pub(super) fn learn(&mut self, files: Vec<(FileName, Option<bool>)>) -> BTreeSet<u32> {
        let mut go = BTreeSet::new();
        for (name, is_go) in files {
            let Entry::Occupied(mut known) = self.0.entry(name) else {
                continue;
            };
            let Some(is_go) = is_go else {
                known.remove();
                continue;
            };
            let before = std::mem::replace(&mut known.get_mut().1, Verdict::Known { is_go });
            if let Verdict::Asked(waiting) = before
                && is_go
            {
                go.extend(waiting);
            }
        }
        go
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{AbsAddr, FileOffset};

    fn mapping(pid: u32, inode: u64) -> MmapEvent {
        MmapEvent {
            timestamp_ns: 1,
            pid,
            start: AbsAddr(0x1000),
            len: 0x1000,
            file_offset: FileOffset(0),
            device_major: 8,
            device_minor: 1,
            inode,
            path: "/bin/program".into(),
        }
    }

    fn learn(files: &mut LookedAt, inode: u64, is_go: Option<bool>) -> Vec<u32> {
        let name = FileName::of(&mapping(0, inode));
        files.learn(vec![(name, is_go)]).into_iter().collect()
    }

    /// Check that a file is looked at once, that who maps it meanwhile is told when it turns out
    /// to be Go's, and that who maps it later is told at once.
    #[test]
    fn once_a_file() {
        let mut files = LookedAt::default();
        let (unknown, go) = files.sort_out(vec![
            mapping(1, 7),
            mapping(2, 7),
            mapping(3, 8),
            mapping(4, 0),
        ]);
        let asked: Vec<(u32, u64)> = unknown.iter().map(|e| (e.pid, e.inode)).collect();
        assert_eq!(asked, [(1, 7), (3, 8)]);
        assert!(go.is_empty());
        let (unknown, go) = files.sort_out(vec![mapping(5, 7)]);
        assert!(unknown.is_empty() && go.is_empty());
        assert_eq!(learn(&mut files, 7, Some(true)), [1, 2, 5]);
        assert!(learn(&mut files, 8, Some(false)).is_empty());
        let (unknown, go) = files.sort_out(vec![mapping(6, 7), mapping(7, 8), mapping(6, 7)]);
        assert!(unknown.is_empty());
        assert_eq!(go.into_iter().collect::<Vec<_>>(), [6]);
    }

    /// Check that what could not be opened is looked at again, and that nothing grows without
    /// end.
    #[test]
    fn again_and_bounded() {
        let mut files = LookedAt::default();
        let ask = |files: &mut LookedAt, pid| files.sort_out(vec![mapping(pid, 7)]).0.len();
        assert_eq!(ask(&mut files, 1), 1);
        assert!(learn(&mut files, 7, None).is_empty());
        assert_eq!(ask(&mut files, 2), 1);
        for pid in 0..2 * MAX_WAITING as u32 {
            assert_eq!(ask(&mut files, pid), 0);
        }
        assert_eq!(learn(&mut files, 7, Some(true)).len(), MAX_WAITING);
        for inode in 0..2 * MAX_LOOKED_AT as u64 {
            files.sort_out(vec![mapping(1, inode)]);
        }
        assert!(files.0.len() <= MAX_LOOKED_AT);
    }
}
