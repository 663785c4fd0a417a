use super::*;
use crate::address::FileOffset;

fn mapping(start: u64, end: u64, name: &str) -> Mapping {
    Mapping {
        start: AbsAddr(start),
        end: AbsAddr(end),
        file_offset: FileOffset(0),
        file: None,
        name: name.to_owned(),
    }
}

fn table(mappings: &[Mapping]) -> MappingTable {
    let mut table = MappingTable::default();
    table.extend(mappings.iter().cloned());
    table
}

fn name_at(history: &CodeHistory, address: u64, time_ns: u64) -> String {
    history
        .lookup_at(AbsAddr(address), time_ns)
        .map_or_else(String::new, |mapping| mapping.name.clone())
}

/// Check that each time has the code of its time, at the edges too, and that what a place
/// held first stays known as such.
#[test]
fn code_of_its_time() {
    let mut history = CodeHistory::new(table(&[mapping(0x1000, 0x5000, "a")]), 10);
    assert!(!history.has_changed());
    history.learn(&mapping(0x2000, 0x3000, "b"), 20);
    history.learn(&mapping(0x2000, 0x6000, "c"), 30);
    for (time, names) in [
        (19, ["a", "a", "a", "c"]),
        (20, ["a", "b", "a", "c"]),
        (29, ["a", "b", "a", "c"]),
        (30, ["a", "c", "c", "c"]),
        (u64::MAX, ["a", "c", "c", "c"]),
    ] {
        let found =
            [0x1000, 0x2fff, 0x3000, 0x5000].map(|address| name_at(&history, address, time));
        assert_eq!(found, names, "{time}");
    }
    assert!(history.has_changed());
    let first = |address| {
        history
            .first()
            .lookup(AbsAddr(address))
            .unwrap()
            .name
            .clone()
    };
    assert_eq!(first(0x2000), "a");
    assert_eq!(first(0x5000), "c");
}

/// Check that the same code mapped again, and code where none was, change nothing.
#[test]
fn same_code_is_no_change() {
    let mut history = CodeHistory::new(table(&[mapping(0x1000, 0x5000, "a")]), 10);
    history.learn(&mapping(0x2000, 0x3000, "a"), 20);
    history.learn(&mapping(0x8000, 0x9000, "b"), 30);
    history.learn_all(&table(&[mapping(0x1000, 0x5000, "a")]), 40);
    assert!(!history.has_changed());
    assert_eq!(name_at(&history, 0x8000, 0), "b");
}

/// Check that a record older than a reading, and a reading older than a record, do not
/// undo what is newer.
#[test]
fn older_news_change_nothing() {
    let mut history = CodeHistory::new(table(&[mapping(0x1000, 0x5000, "a")]), 10);
    history.learn(&mapping(0x1000, 0x2000, "early"), 5);
    assert_eq!(name_at(&history, 0x1000, 100), "a");
    history.learn(&mapping(0x2000, 0x3000, "b"), 30);
    // Begun at 20, and come back now.
    history.learn_all(&table(&[mapping(0x1000, 0x5000, "c")]), 20);
    for (address, time, name) in [
        (0x1000, 19, "a"),
        (0x1000, 20, "c"),
        (0x2000, 29, "a"),
        (0x2000, 30, "b"),
        (0x3000, 30, "c"),
    ] {
        assert_eq!(
            name_at(&history, address, time),
            name,
            "{address:#x} at {time}"
        );
    }
    // Of another CPU, seen late.
    history.learn(&mapping(0x2800, 0x3800, "d"), 25);
    assert_eq!(name_at(&history, 0x2800, 40), "b");
    assert_eq!(name_at(&history, 0x3000, 40), "d");
}

/// Check that a program that has replaced another does not count that one's code as its
/// own, until its own was read.
#[test]
fn inherited_code_gives_way() {
    let old = CodeHistory::new(table(&[mapping(0x1000, 0x5000, "old")]), 10);
    let mut new = old.inherit();
    new.learn(&mapping(0x1000, 0x3000, "early"), 20);
    new.learn_all(&table(&[mapping(0x1000, 0x3000, "new")]), 30);
    assert!(!new.has_changed());
    assert_eq!(name_at(&new, 0x1000, 15), "new");
    new.learn(&mapping(0x1000, 0x3000, "newer"), 40);
    assert_eq!(name_at(&new, 0x1000, 39), "new");
}

/// Check that walks between a change and its telling are not trusted with the place, nor
/// those that were under way.
#[test]
fn walks_that_did_not_know() {
    let mut history = CodeHistory::new(table(&[mapping(0x1000, 0x5000, "a")]), 10);
    assert_eq!(history.present(10), Some(0));
    history.learn(&mapping(0x2000, 0x3000, "b"), 20);
    assert_eq!(history.present(20), None);
    assert!(!history.was_untold(AbsAddr(0x2000), 19));
    assert!(history.was_untold(AbsAddr(0x2000), 20));
    assert!(!history.was_untold(AbsAddr(0x1000), 20));
    history.told(100);
    assert!(history.was_untold(AbsAddr(0x2000), 100 + WALK_NS - 1));
    assert!(!history.was_untold(AbsAddr(0x2000), 100 + WALK_NS));
    let settled = history.present(100 + WALK_NS);
    assert!(settled.is_some());
    assert_eq!(history.present(19), None);
    history.learn(&mapping(0x2000, 0x3000, "c"), 100 + 2 * WALK_NS);
    history.told(100 + 2 * WALK_NS);
    assert_ne!(history.present(u64::MAX), settled);
}

/// Check that what is remembered has a bound, and that times before it are known for
/// forgotten.
#[test]
fn memory_is_bounded() {
    let mut history = CodeHistory::default();
    for round in 0..=3 * MAX_CHANGES as u64 {
        history.learn(&mapping(0x1000, 0x2000, &round.to_string()), 10 * round);
    }
    assert_eq!(history.changes.len(), MAX_CHANGES);
    let oldest = 2 * MAX_CHANGES as u64;
    assert!(history.is_forgotten(10 * oldest - 1));
    assert!(!history.is_forgotten(10 * oldest));
    assert_eq!(name_at(&history, 0x1000, 10 * oldest), oldest.to_string());
    let mut history = CodeHistory::default();
    for round in 0..2 * MAX_RECENT as u64 {
        history.learn(&mapping(0x1000, 0x2000, "same"), round);
    }
    assert_eq!(history.recent.len(), MAX_RECENT);
}
