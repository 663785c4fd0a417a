//! Four threads, two million pairs, and what the program itself has counted.

use memprof_tests::{End, LONG_LIMIT, Process, Record, TempDir, target};

/// Pairs of malloc and free a thread, and blocks a thread that stay.
const PAIRS: &str = "500000";
const LEAKS: &str = "1000";

fn run(options: &[&str], end: End) -> Process {
    let dir = TempDir::new("threads");
    let mut threads = target("threads.c").command(&[PAIRS, LEAKS]);
    let recorded = Record::every_allocation(&dir)
        .options(options)
        .limit(LONG_LIMIT)
        .attach(&mut threads, end);
    let process = recorded.process().clone();
    let target = &recorded.target;
    assert_eq!(
        (target.value("pairs"), target.value("inuse_objects")),
        (2_000_000, 4000)
    );
    let totals = process.totals();
    assert_eq!(
        (totals.inuse_objects, totals.inuse_bytes),
        (target.value("inuse_objects"), target.value("inuse_bytes")),
        "losses: {:?}",
        process.losses
    );
    // None twice, and none missing without being counted. Not an equation: BPF
    // counts a block as unreported also if the daemon had found it in the map.
    let unreported = process.loss("alloc_unreported");
    assert!(
        (2_004_000_u64.saturating_sub(unreported)..=2_004_000).contains(&totals.alloc_objects),
        "{totals:?}, losses: {:?}",
        process.losses
    );
    assert_eq!(process.leaf_totals("pair").inuse_bytes, 0);
    let leaked = process.leaf_totals("leak");
    assert_eq!((leaked.alloc_objects, leaked.inuse_objects), (4000, 4000));
    process
}

/// Check that in-use is what the program counted, also of a program that lives on.
#[test]
fn default_ring() {
    let process = run(&[], End::Interrupt);
    assert_eq!(process.loss("live_map_full"), 0);
}

/// Check that with the smallest ring events are lost and counted, and in-use is
/// what the program counted all the same (invariant 2).
#[test]
fn smallest_ring() {
    let process = run(&["--ring-size", "4KiB"], End::TargetExits);
    let lost = process.loss("alloc_ring_full") + process.loss("free_ring_full");
    assert!(lost > 0, "the ring did not overflow: {:?}", process.losses);
}
