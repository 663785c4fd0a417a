//! Every function of the allocator family.

use memprof_tests::{End, Record, Recorded, TempDir, Totals, target};

/// Function of the target, how often it allocates, how many blocks stay, their
/// size.
const EXPECTED: &[(&str, u64, u64, u64)] = &[
    ("from_malloc", 21, 1, 1001),
    ("from_calloc", 22, 2, 13 * 77),
    ("from_realloc_null", 23, 3, 1003),
    ("from_reallocarray_null", 24, 4, 17 * 59),
    ("from_posix_memalign", 25, 5, 1005),
    ("from_aligned_alloc", 26, 6, 1024),
    ("from_memalign", 27, 7, 1007),
    ("from_valloc", 28, 8, 1008),
    ("from_pvalloc", 29, 9, 1009),
    // What realloc gives up is allocated in one place.
    ("to_be_moved", 30 + 31, 0, 10),
    ("from_realloc_grow", 30, 10, 2001),
    ("from_reallocarray_grow", 31, 11, 31 * 65),
];

fn check(recorded: &Recorded) {
    let process = recorded.process();
    for &(function, count, kept, size) in EXPECTED {
        assert_eq!(
            process.leaf_totals(function),
            Totals::of(count, kept, size),
            "{function}"
        );
    }
    let objects: u64 = EXPECTED.iter().map(|(_, count, _, _)| count).sum();
    let kept: u64 = EXPECTED.iter().map(|(_, _, kept, _)| kept).sum();
    let totals = process.totals();
    assert_eq!(
        (totals.alloc_objects, totals.inuse_objects),
        (objects, kept),
        "nothing is counted twice under another stack"
    );
}

/// Check that each function counts once a call, with the size it was asked for,
/// and that every way to free is seen.
#[test]
fn command() {
    let dir = TempDir::new("family");
    check(&Record::every_allocation(&dir).command(&target("family.c"), &[]));
}

/// Check the same of a process that runs already.
#[test]
fn attached() {
    let dir = TempDir::new("family");
    let mut family = target("family.c").command(&[]);
    check(&Record::every_allocation(&dir).attach(&mut family, End::Interrupt));
}
