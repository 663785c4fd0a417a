use super::*;
use crate::{
    address::{FileOffset, FrameAddress},
    ledger::StackCounters,
    process::mapping::MappingTable,
};

const KEY: StackKey = StackKey { high: 1, low: 1 };
/// Long after any change was told.
const SETTLED: u64 = 1 << 40;

fn library(inode: u64) -> Mapping {
    Mapping {
        start: AbsAddr(0x1000),
        end: AbsAddr(0x2000),
        file_offset: FileOffset(0),
        file: Some(Arc::new(MappedFile {
            path: format!("/{inode}.so").into(),
            device: 1,
            inode,
            build_id: None,
            file: None,
            debug_info: DebugInfo::Missing,
        })),
        name: format!("/{inode}.so"),
    }
}

fn program() -> Mapping {
    Mapping {
        start: AbsAddr(0x8000),
        end: AbsAddr(0x9000),
        ..library(99)
    }
}

/// From the library to the program and back.
fn trace() -> Arc<StackTrace> {
    let frames = [0x1100, 0x8100, 0x1200, 0x8200];
    Arc::new(StackTrace {
        frames: frames.map(|frame| FrameAddress(AbsAddr(frame))).to_vec(),
        end: StackEnd::Complete,
        by_frame_pointer: false,
    })
}

/// Library 1 from the beginning.
fn history() -> CodeHistory {
    let mut table = MappingTable::default();
    table.extend([library(1), program()]);
    CodeHistory::new(table, 0)
}

fn replace(history: &mut CodeHistory, inode: u64, at_ns: u64) {
    history.learn(&library(inode), at_ns);
    history.told(at_ns);
}

fn snapshot(samples: u64) -> StackSnapshot {
    StackSnapshot {
        trace: trace(),
        counters: StackCounters {
            samples,
            ..StackCounters::default()
        },
    }
}

/// The library that a stack of the group leads through.
fn inode(group: StackGroup, first: &MappingTable) -> u64 {
    let mappings = GroupMappings {
        first: Arc::new(first.clone()),
        meanings: group.meanings,
    };
    let inode = |address| {
        let mapping = mappings.lookup(AbsAddr(address)).unwrap();
        mapping.file.as_ref().unwrap().inode
    };
    assert_eq!(inode(0x80ff), 99);
    assert_eq!(inode(0x10ff), inode(0x11ff));
    inode(0x10ff)
}

/// Check that a stack through one library after another at one place is as many stacks,
/// each with its own, and that a library which comes back has its old one.
#[test]
fn a_version_a_library() {
    let mut history = history();
    let mut versions = StackVersions::default();
    let trace = trace();
    let mut version =
        |history: &CodeHistory, time_ns| versions.version(history, (KEY, &trace), time_ns, true);
    assert_eq!(version(&history, SETTLED), 0);
    replace(&mut history, 2, 2 * SETTLED);
    assert_eq!(version(&history, 3 * SETTLED), 1);
    assert_eq!(version(&history, 3 * SETTLED), 1);
    // Told late: its event was lost, and a sweep has found the block.
    assert_eq!(version(&history, SETTLED), 0);
    replace(&mut history, 1, 4 * SETTLED);
    assert_eq!(version(&history, 5 * SETTLED), 0);
    replace(&mut history, 2, 6 * SETTLED);
    assert_eq!(version(&history, 7 * SETTLED), 1);
    replace(&mut history, 3, 8 * SETTLED);
    assert_eq!(version(&history, 9 * SETTLED), 2);
    assert_eq!(version(&history, 3 * SETTLED), 1);

    let id = |version| StackId { key: KEY, version };
    let stacks = (0..3).map(|version| (id(version), snapshot(u64::from(version) + 10)));
    let groups = versions.group(stacks.collect());
    let found: Vec<(u64, u64)> = groups
        .into_iter()
        .map(|group| {
            let samples = group.stacks[0].counters.samples;
            (samples, inode(group, history.first()))
        })
        .collect();
    assert_eq!(found, [(10, 1), (11, 2), (12, 3)]);
}

/// Check that stacks which do not contradict each other are named together.
#[test]
fn few_groups() {
    let mut history = history();
    replace(&mut history, 2, SETTLED);
    let mut versions = StackVersions::default();
    let mut stacks = Vec::new();
    for number in 0..100 {
        let key = StackKey {
            high: number,
            low: 1,
        };
        let version = versions.version(&history, (key, &trace()), 2 * SETTLED, true);
        stacks.push((StackId { key, version }, snapshot(1)));
        stacks.push((StackId::first(key), snapshot(1)));
    }
    let groups = versions.group(stacks);
    let sizes: Vec<usize> = groups.iter().map(|group| group.stacks.len()).collect();
    assert_eq!(sizes, [100, 100]);
}

/// Check that a stack whose walk took the new library for the old is cut behind the first
/// frame in it, and marked; by frame pointers nothing was taken for anything.
#[test]
fn cut_where_the_walk_did_not_know() {
    let mut history = history();
    history.learn(&library(2), SETTLED);
    let mut versions = StackVersions::default();
    let version = versions.version(&history, (KEY, &trace()), SETTLED, true);
    let id = StackId { key: KEY, version };
    assert!(versions.is_stale(id));
    let groups = versions.group(vec![(id, snapshot(1))]);
    let cut = &groups[0].stacks[0].trace;
    assert_eq!(cut.frames.len(), 1);
    assert_eq!(cut.end, StackEnd::StaleTables);

    let version = versions.version(&history, (KEY, &trace()), SETTLED, false);
    assert!(!versions.is_stale(StackId { key: KEY, version }));
    history.told(SETTLED + 1);
    let version = versions.version(&history, (KEY, &trace()), 2 * SETTLED, true);
    assert!(version != 0 && !versions.is_stale(StackId { key: KEY, version }));
}

/// Check that no more than so many files are held open, and that stacks stay apart all the
/// same.
#[test]
fn held_files_are_bounded() {
    let mut history = history();
    let mut versions = StackVersions::default();
    let mut seen = HashSet::new();
    let rounds = 2 * MAX_FILES as u64;
    for round in 1..=rounds {
        replace(&mut history, 1 + round, 2 * round * SETTLED);
        let time_ns = (2 * round + 1) * SETTLED;
        assert!(seen.insert(versions.version(&history, (KEY, &trace()), time_ns, true)));
    }
    assert_eq!(versions.files.len(), MAX_FILES);
    assert_eq!(versions.closed_places, 2 * (rounds - MAX_FILES as u64));
}

/// Check that versions of a stack that is forgotten are, and that a file which only that one
/// held makes room for another.
#[test]
fn versions_go_with_their_stack() {
    let mut history = history();
    let mut versions = StackVersions::default();
    let other = StackKey { high: 2, low: 1 };
    let held = |inode| {
        let mut library = library(inode);
        let file = Arc::get_mut(library.file.as_mut().unwrap()).unwrap();
        file.file = Some(std::fs::File::open("/proc/self/exe").unwrap());
        library
    };
    history.learn(&held(2), SETTLED);
    history.told(SETTLED);
    let version = versions.version(&history, (KEY, &trace()), 2 * SETTLED, true);
    history.learn(&held(3), 3 * SETTLED);
    history.told(3 * SETTLED);
    let kept = versions.version(&history, (other, &trace()), 4 * SETTLED, true);
    assert_eq!((version, kept, versions.files.len()), (1, 1, 2));
    versions.forget(&[KEY].into());
    assert_eq!(versions.files, [(1, 3)].into());
    assert!(versions.get(StackId { key: KEY, version }).is_none());
    let kept = StackId {
        key: other,
        version: kept,
    };
    assert!(versions.get(kept).is_some());
}
