//! What realloc makes of a block, and calls that fail.

use memprof_tests::{End, LONG_LIMIT, Record, TempDir, Totals, target};

/// Check that chains, NULL, 0 and failures are counted as the C library means
/// them (invariant 5).
#[test]
fn settled_at_exit() {
    let dir = TempDir::new("realloc");
    let recorded = Record::every_allocation(&dir).command(&target("realloc.c"), &[]);
    let process = recorded.process();

    assert_eq!(process.leaf_totals("chain_start"), Totals::of(1, 0, 10));
    assert_eq!(
        process.leaf_totals("chain_grow"),
        Totals {
            alloc_objects: 100,
            alloc_bytes: (1..=100).map(|i| 10 + 10 * i).sum(),
            inuse_objects: 1,
            inuse_bytes: 1010,
        }
    );
    assert_eq!(process.leaf_totals("from_null"), Totals::of(7, 7, 300));
    assert_eq!(process.leaf_totals("zero_start"), Totals::of(8, 0, 400));
    assert_eq!(
        process.leaf_totals("kept_by_failure"),
        Totals::of(9, 9, 500)
    );
    assert_eq!(
        process.leaf_totals("freed_after_failure"),
        Totals::of(6, 0, 600)
    );
    for function in [
        "to_zero",
        "failing_realloc",
        "failing_malloc",
        "failing_calloc",
        "failing_posix_memalign",
    ] {
        assert!(
            process.through(function).is_empty(),
            "{function} allocates nothing"
        );
    }
}

fn race(options: &[&str]) {
    let dir = TempDir::new("realloc");
    let mut target = target("realloc_race.c").command(&["50000"]);
    let recorded = Record::every_allocation(&dir)
        .options(options)
        .limit(LONG_LIMIT)
        .attach(&mut target, End::Interrupt);
    let totals = recorded.process().totals();
    assert_eq!(
        (totals.inuse_objects, totals.inuse_bytes),
        (
            recorded.target.value("inuse_objects"),
            recorded.target.value("inuse_bytes")
        ),
        "losses: {:?}",
        recorded.process().losses
    );
}

/// Check that in-use is exact when threads resize, free, and fail to resize each
/// other's blocks (invariant 5).
#[test]
fn race_is_exact() {
    race(&[]);
}

/// Check the same when the ring overflows (invariants 2 and 5).
#[test]
fn race_is_exact_with_the_smallest_ring() {
    race(&["--ring-size", "4KiB"]);
}
