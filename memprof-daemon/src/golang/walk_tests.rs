use super::*;
use crate::golang::testing::{BASE, Fake, random};

const HEAD: u64 = BASE;
const CYCLE: u64 = BASE + 8;
const RATE: u64 = BASE + 16;
const VARIABLES: Variables = Variables {
    buckets: HEAD,
    cycle: CYCLE,
    rate: RATE,
    is_disabled: None,
};
const OLD: Layout = Layout::of(19).unwrap();
const NEW: Layout = Layout::of(27).unwrap();
const FIRST: u64 = BASE + 4096;
const SECOND: u64 = BASE + 8192 - 24;

/// Memory in which profiling has begun, in cycle 7, at the usual rate.
fn memory() -> Fake {
    let memory = Fake::new(64 << 10);
    memory.put_words(CYCLE, &[7 << 1 | 1, 524_288]);
    memory
}

/// Puts a bucket before those that are there.
fn add(memory: &Fake, address: u64, size: u64, stack: &[u64]) {
    let mut next = [0; 8];
    memory.read(HEAD, &mut next).unwrap();
    let next = u64::from_le_bytes(next);
    let hash = hash_of(stack, size);
    let depth = stack.len() as u64;
    memory.put_words(address, &[0xdead, next, 1, hash, size, depth]);
    memory.put_words(address + BUCKET_BYTES, stack);
    memory.put_words(HEAD, &[address]);
}

/// Writes the counts of a bucket: published, and of each cycle.
fn count(memory: &Fake, layout: Layout, address: u64, cycles: [(u64, u64); 4]) {
    let mut header = [0; 48];
    memory.read(address, &mut header).unwrap();
    let word = |at: usize| u64::from_le_bytes(header[at * 8..][..8].try_into().unwrap());
    let (size, depth) = (word(4), word(5));
    let record = address + BUCKET_BYTES + 8 * depth;
    for (place, (allocs, frees)) in cycles.into_iter().enumerate() {
        let words = [allocs, frees, allocs * size, frees * size];
        let words = &words[..layout.cycle_words];
        memory.put_words(record + (place * 8 * layout.cycle_words) as u64, words);
    }
}

fn counts(reading: &Reading) -> Vec<(u64, usize, u64, u64)> {
    let count = |count: &Count| {
        let bucket = &count.bucket;
        (
            bucket.size_bytes,
            bucket.stack.len(),
            count.allocs,
            count.frees,
        )
    };
    reading.counts.iter().map(count).collect()
}

fn why(result: Result<Reading, WalkError>) -> &'static str {
    match result {
        Err(WalkError::Implausible(what)) => what,
        other => panic!("{other:?}"),
    }
}

/// Check that what is published is read, with the present cycle's counts, which may not be
/// added yet, and without those of later cycles, for each layout.
#[test]
fn published() {
    for layout in [OLD, NEW] {
        let memory = memory();
        add(&memory, FIRST, 64, &[0x1000, 0x2000]);
        add(&memory, SECOND, 4096, &[0x3000]);
        // 7 is the second of three cycles: what it has is being added.
        count(&memory, layout, FIRST, [(10, 4), (1, 1), (0, 0), (5, 0)]);
        count(&memory, layout, SECOND, [(3, 3), (0, 0), (0, 0), (1, 0)]);
        let reading = Walk::default().read(&memory, layout, &VARIABLES).unwrap();
        assert_eq!(counts(&reading), [(64, 2, 10, 4), (4096, 1, 3, 3)]);
        assert!(!reading.is_early && reading.is_settled && !reading.rate_changed);
        assert_eq!(
            (reading.rate_bytes, reading.interval_bytes),
            (524_288, 524_288)
        );
        assert_eq!(*reading.counts[0].bucket.stack, [0x1000, 0x2000]);
    }
}

/// Check that before the first collection all cycles are counted.
#[test]
fn early() {
    let memory = memory();
    add(&memory, FIRST, 64, &[0x1000]);
    count(&memory, OLD, FIRST, [(0, 0), (2, 0), (0, 0), (5, 0)]);
    let reading = Walk::default().read(&memory, OLD, &VARIABLES).unwrap();
    assert_eq!(counts(&reading), [(64, 1, 7, 0)]);
    assert!(reading.is_early);

    // No bucket at all.
    let reading = Walk::default()
        .read(&super::tests::memory(), OLD, &VARIABLES)
        .unwrap();
    assert!(reading.counts.is_empty() && reading.is_early);
}

/// Check that new buckets are found and old ones are not read again, but for their counts.
#[test]
fn later_buckets() {
    let memory = memory();
    let mut walk = Walk::default();
    add(&memory, FIRST, 64, &[0x1000]);
    count(&memory, NEW, FIRST, [(1, 0), (0, 0), (0, 0), (0, 0)]);
    let first = walk.read(&memory, NEW, &VARIABLES).unwrap();
    add(&memory, SECOND, 128, &[0x2000; 3]);
    count(&memory, NEW, FIRST, [(2, 1), (0, 0), (0, 0), (0, 0)]);
    count(&memory, NEW, SECOND, [(9, 0), (0, 0), (0, 0), (0, 0)]);
    let second = walk.read(&memory, NEW, &VARIABLES).unwrap();
    assert_eq!(counts(&second), [(64, 1, 2, 1), (128, 3, 9, 0)]);
    assert!(Arc::ptr_eq(
        &first.counts[0].bucket,
        &second.counts[0].bucket
    ));
    assert!(second.is_same_cycle(&memory, &VARIABLES).unwrap());
    memory.put_words(CYCLE, &[8 << 1]);
    assert!(!second.is_same_cycle(&memory, &VARIABLES).unwrap());
}

/// Check that counts which are being published are read again: at first they are in both
/// places, then in one.
#[test]
fn while_publishing() {
    let memory = memory();
    add(&memory, FIRST, 64, &[0x1000]);
    count(&memory, NEW, FIRST, [(10, 0), (0, 0), (4, 0), (0, 0)]);
    let record = FIRST + BUCKET_BYTES + 8;
    // The present cycle's are taken away after the first try.
    memory.put_later(20, record + 4 * 8, 0);
    let reading = Walk::default().read(&memory, NEW, &VARIABLES).unwrap();
    assert_eq!(counts(&reading), [(64, 1, 10, 0)]);
    assert!(reading.is_settled);

    // They stay for as long as anyone looks: then it is said.
    count(&memory, NEW, FIRST, [(10, 0), (0, 0), (4, 0), (0, 0)]);
    let reading = Walk::default().read(&memory, NEW, &VARIABLES).unwrap();
    assert_eq!(counts(&reading), [(64, 1, 14, 0)]);
    assert!(!reading.is_settled);
}

/// Check what is made of the rate: below zero it is off, and what it was is kept.
#[test]
fn rates() {
    let memory = memory();
    let mut walk = Walk::default();
    let mut read = |rate: i64| {
        memory.put_words(RATE, &[rate.cast_unsigned()]);
        let reading = walk.read(&memory, NEW, &VARIABLES).unwrap();
        (
            reading.rate_bytes,
            reading.interval_bytes,
            reading.rate_changed,
        )
    };
    assert_eq!(read(0), (0, 1, false));
    assert_eq!(read(4096), (4096, 4096, false));
    assert_eq!(read(4096), (4096, 4096, false));
    assert_eq!(read(-1), (0, 4096, true));
    assert_eq!(read(1), (1, 1, true));
    memory.put_words(RATE, &[1 << 60]);
    let result = Walk::default().read(&memory, NEW, &VARIABLES);
    assert_eq!(why(result), "its sampling rate");
}

/// Check that what cannot be a list of buckets is refused, whatever is wrong with it.
#[test]
fn hostile_lists() {
    let something_else = "its list of buckets has something else in it";
    let list = || {
        let memory = memory();
        add(&memory, FIRST, 64, &[0x1000]);
        add(&memory, SECOND, 128, &[0x2000]);
        memory
    };
    let read = |memory: &Fake| Walk::default().read(memory, OLD, &VARIABLES);
    assert!(read(&list()).is_ok());
    // A field of the second bucket each: kind, hash, size, depth.
    for (field, value) in [(2, 2), (3, 0), (4, 129), (5, 2), (5, 33), (5, u64::MAX)] {
        let memory = list();
        memory.put_words(SECOND + 8 * field, &[value]);
        assert_eq!(why(read(&memory)), something_else, "{field} {value}");
    }
    // Where the list leads to.
    let memory = list();
    memory.put_words(FIRST + 8, &[SECOND]);
    assert_eq!(why(read(&memory)), "its list of buckets has a loop");
    let memory = list();
    memory.put_words(HEAD, &[FIRST + 1]);
    assert_eq!(why(read(&memory)), something_else);
    for nowhere in [8, BASE - 8, u64::MAX - 7, i64::MAX.unsigned_abs() - 7] {
        let memory = list();
        memory.put_words(FIRST + 8, &[nowhere]);
        assert!(read(&memory).is_err(), "{nowhere:#x}");
    }
    // What is known cannot vanish.
    let memory = list();
    let mut walk = Walk::default();
    walk.read(&memory, OLD, &VARIABLES).unwrap();
    memory.put_words(HEAD, &[0]);
    let result = walk.read(&memory, OLD, &VARIABLES);
    assert_eq!(why(result), "buckets have gone from its list");
    // Cycles wrap.
    let memory = list();
    memory.put_words(CYCLE, &[u64::from(CYCLE_WRAP) << 1]);
    assert_eq!(why(read(&memory)), "its profile's cycle");
}

/// Check that counts which contradict each other are no profile: more freed than allocated,
/// or other bytes than so many blocks have.
#[test]
fn contradictions() {
    let read = |memory: &Fake| Walk::default().read(memory, OLD, &VARIABLES);
    let memory = memory();
    add(&memory, FIRST, 64, &[0x1000]);
    count(&memory, OLD, FIRST, [(1, 2), (0, 0), (0, 0), (0, 0)]);
    assert_eq!(why(read(&memory)), "its counts contradict each other");
    count(&memory, OLD, FIRST, [(2, 1), (0, 0), (0, 0), (0, 0)]);
    assert!(read(&memory).is_ok());
    memory.put_words(FIRST + BUCKET_BYTES + 8 + 16, &[127]);
    assert_eq!(why(read(&memory)), "its counts contradict each other");
}

/// Check that a list of buckets in which any byte is another is read in bounded time and
/// memory, whatever comes of it: 20,000 changes from a fixed seed.
#[test]
fn any_byte_may_change() {
    let memory = memory();
    let mut next = random();
    for place in 0..40 {
        let stack: Vec<u64> = (0..next(32)).map(|_| next(1 << 40)).collect();
        let address = FIRST + place * 640;
        add(&memory, address, 8 + next(4096), &stack);
        count(&memory, OLD, address, [(9, 3), (0, 0), (0, 0), (0, 0)]);
    }
    assert!(Walk::default().read(&memory, OLD, &VARIABLES).is_ok());
    let mut refused = 0;
    for _ in 0..20_000 {
        let place = usize::try_from(next(memory.len() as u64)).unwrap();
        let old = memory.swap(place, u8::try_from(next(256)).unwrap());
        let before = memory.reads();
        // Without its rests, which a count that is not published would take.
        let result = Walk::default().extend(&memory, OLD, &VARIABLES);
        refused += usize::from(result.is_err());
        assert!(memory.reads() - before < 200);
        memory.swap(place, old);
    }
    assert!(refused > 1000, "{refused}");
}
