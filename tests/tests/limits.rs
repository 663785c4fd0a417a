//! Maps that are too small: counted, and survived.

use memprof_tests::{End, Record, TempDir, Totals, target};

/// Check that blocks beyond the live map's size are counted as lost, and the rest
/// of the profile is right.
#[test]
fn live_map_full() {
    let dir = TempDir::new("limits");
    let mut hold = target("hold.c").command(&["1000", "48"]);
    let recorded = Record::every_allocation(&dir)
        .options(&["--live-entries", "64"])
        .attach(&mut hold, End::Interrupt);
    let process = recorded.process();
    let lost = process.loss("live_map_full");
    let totals = process.totals();
    assert!(lost > 0, "{:?}", process.losses);
    assert_eq!(totals.alloc_objects + lost, 1000, "{:?}", process.losses);
    assert_eq!(totals.inuse_objects, totals.alloc_objects);
    assert_eq!(totals.inuse_bytes, totals.inuse_objects * 48);
    assert!((1..=64).contains(&totals.inuse_objects), "{totals:?}");
}

/// Check that churn goes on being counted while the live map is full of blocks
/// that stay, and after they are gone.
#[test]
fn live_map_recovers() {
    let dir = TempDir::new("limits");
    let mut leaks = target("leaks.c").command(&[]);
    // 103 blocks stay, and no more than one comes and goes.
    let recorded = Record::every_allocation(&dir)
        .options(&["--live-entries", "256"])
        .attach(&mut leaks, End::TargetExits);
    let process = recorded.process();
    assert_eq!(process.loss("live_map_full"), 0);
    assert_eq!(process.leaf_totals("churn"), Totals::of(1000, 0, 64));
}

/// Check that every allocation is in the profile, also those whose stacks found
/// no room: these are under an unknown stack, and counted.
#[test]
fn stack_map_full() {
    let dir = TempDir::new("limits");
    let mut recursion = target("recursion.c").command(&["12", "3"]);
    let recorded = Record::every_allocation(&dir)
        .options(&["--stack-entries", "8"])
        .attach(&mut recursion, End::Interrupt);
    let process = recorded.process();
    let expected = Totals::of(3 << 12, 3 << 12, 32);
    assert_eq!(process.totals(), expected, "losses: {:?}", process.losses);
    let unknown = process
        .stacks
        .iter()
        .filter(|stack| stack.frames[0].function.is_none());
    assert_eq!(
        memprof_tests::sum(unknown).alloc_objects,
        process.loss("stack_map_full"),
        "losses: {:?}",
        process.losses
    );
}

/// Check that thousands of different stacks are told apart, each with its own
/// count (invariant 7).
#[test]
fn many_stacks() {
    let dir = TempDir::new("limits");
    let mut recursion = target("recursion.c").command(&["12", "3"]);
    let recorded = Record::every_allocation(&dir).attach(&mut recursion, End::TargetExits);
    let process = recorded.process();
    let stacks = process.with_leaf("at_the_leaf");
    assert_eq!(stacks.len(), 1 << 12, "losses: {:?}", process.losses);
    for stack in stacks {
        assert_eq!(stack.totals(), Totals::of(3, 3, 32), "{}", stack.path());
    }
}
