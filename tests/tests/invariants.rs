//! Invariants of the design that no other file has as its subject. Each name
//! carries the number; 2 is in `threads.rs`, 4 in `sampling.rs`, 5 in
//! `realloc.rs`, 8 in `detach.rs`.

use memprof_tests::{
    Daemon, End, Record, Running, TempDir, Totals, daemon::eventually, target,
    targets::shared_library,
};
use serde_json::Value;

/// `alloc_events`, `live`, `free_events`, `purged` of an image.
fn tally(image: &Value) -> [u64; 4] {
    ["alloc_events", "live", "free_events", "purged"].map(|name| {
        image[name]
            .as_u64()
            .unwrap_or_else(|| panic!("no {name} in {image:#}"))
    })
}

fn conserved(options: &[&str]) {
    let dir = TempDir::new("invariants");
    let mut leaks = Running::spawn(&mut target("leaks.c").command(&[]));
    leaks.wait_stdout(|line| line == "ready");
    let pid = leaks.pid();
    let daemon = Daemon::start(&dir, &[pid], options);
    leaks.send("go");
    leaks.wait_stdout(|line| line == "done");

    // 103 blocks stay, 1000 come and go.
    let alive = eventually(|| {
        let images = daemon.images(pid);
        assert_eq!(images.len(), 1, "{images:#?}");
        let [allocs, live, frees, _] = tally(&images[0]);
        (live == 103 && allocs == live + frees).then_some([allocs, live, frees])
    });
    let dropped = |image: &Value, cause: &str| image["dropped_events"][cause].as_u64().unwrap_or(0);
    let image = &daemon.images(pid)[0];
    let lost = dropped(image, "alloc_unreported");
    // See threads.rs for why this is no equation.
    assert!(
        (1103_u64.saturating_sub(lost)..=1103).contains(&alive[0]),
        "{image:#}"
    );

    leaks.close_stdin();
    leaks.finish().expect_code(0);
    let after = eventually(|| {
        let after = tally(&daemon.images(pid)[0]);
        (after[3] > 0).then_some(after)
    });
    let [allocs, live, frees, purged] = after;
    assert_eq!(allocs, live + frees + purged, "{after:?}");
    assert_eq!([allocs, live, purged], [alive[0], 0, 103], "{after:?}");
    daemon.stop();
}

/// Check that every alloc event is live, freed, or purged at exit.
#[test]
fn invariant_1_conservation() {
    conserved(&[]);
}

/// Check the same when the ring overflows.
#[test]
fn invariant_1_conservation_with_the_smallest_ring() {
    conserved(&["--ring-size", "4KiB"]);
}

/// Check that a free subtracts what was stored with its allocation: at an
/// interval where each sample stands for many blocks, what is all freed is 0, not
/// about 0.
#[test]
fn invariant_3_frees_subtract_the_stored_weight() {
    let dir = TempDir::new("invariants");
    let mut threads = target("threads.c").command(&["50000", "0"]);
    let recorded = Record::with(&dir, &["-i", "10000"]).attach(&mut threads, End::Interrupt);
    let totals = recorded.process().leaf_totals("pair");
    assert!(
        totals.alloc_objects > 0 && totals.alloc_bytes > 0,
        "{totals:?}"
    );
    assert_eq!((totals.inuse_objects, totals.inuse_bytes), (0, 0));
}

/// Check that functions that call each other or share an address count one
/// allocation a call: the number of events is the number of calls.
#[test]
fn invariant_6_one_call_is_one_event() {
    let dir = TempDir::new("invariants");
    let mut family = Running::spawn(&mut target("family.c").command(&[]));
    family.wait_stdout(|line| line == "ready");
    let pid = family.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    family.send("go");
    family.wait_stdout(|line| line == "done");
    // What family.c calls, and what it keeps: see family.rs.
    let (calls, kept) = (
        21 + 22 + 23 + 24 + 25 + 26 + 27 + 28 + 29 + 2 * (30 + 31),
        66,
    );
    let tally = eventually(|| {
        let tally = tally(&daemon.images(pid)[0]);
        (tally[1] == kept && tally[0] >= calls).then_some(tally)
    });
    assert_eq!(tally, [calls, kept, calls - kept, 0]);

    let mut sites = daemon.profile(pid).probe.sites;
    let places = sites.len();
    sites.sort_by(|a, b| (&a.module, a.file_offset).cmp(&(&b.module, b.file_offset)));
    sites.dedup_by(|a, b| a.module == b.module && a.file_offset == b.file_offset);
    assert_eq!(sites.len(), places, "no place is probed twice");
    daemon.stop();
}

/// Check that an allocator in front of the C library's counts once a call, under
/// the function that called it.
#[test]
fn invariant_6_preloaded_allocator() {
    let wrapper = shared_library("wrapper.c");
    for end in [End::Interrupt, End::TargetExits] {
        let dir = TempDir::new("invariants");
        let mut leaks = target("leaks.c").command(&[]);
        leaks.env("LD_PRELOAD", wrapper.path());
        let recorded = Record::every_allocation(&dir).attach(&mut leaks, end);
        let process = recorded.process();
        assert_eq!(process.leaf_totals("leak_small"), Totals::of(100, 100, 24));
        assert_eq!(
            process.leaf_totals("leak_large"),
            Totals::of(3, 3, 1_048_581)
        );
        assert_eq!(process.leaf_totals("churn"), Totals::of(1000, 0, 64));
        assert_eq!(process.totals().alloc_objects, 1103);
        let probed = |part: &str| {
            let mut sites = recorded.profile.probe.sites.iter();
            sites.any(|site| site.function == "malloc" && site.module.contains(part))
        };
        assert!(
            probed("/wrapper-") && probed("libc"),
            "{:?}",
            recorded.profile.probe.sites
        );
    }
}

/// Check that stacks that differ in a line or a function are never merged, and
/// that one path taken often is one stack.
#[test]
fn invariant_7_stacks_are_neither_merged_nor_split() {
    let dir = TempDir::new("invariants");
    let mut stacks = target("stacks.c").command(&[]);
    let recorded = Record::every_allocation(&dir).attach(&mut stacks, End::Interrupt);
    let process = recorded.process();

    let mut lines: Vec<_> = process
        .with_leaf("two_ways")
        .into_iter()
        .map(|stack| (stack.frames[0].line, stack.totals()))
        .collect();
    lines.sort_by_key(|(line, _)| *line);
    let line = |name: &str| Some(recorded.target.value(name));
    assert_eq!(
        lines,
        [
            (line("malloc_line"), Totals::of(10, 10, 64)),
            (line("calloc_line"), Totals::of(10, 10, 64)),
        ]
    );
    for twin in ["twin_one", "twin_two"] {
        assert_eq!(process.only_stack(twin).totals(), Totals::of(20, 20, 96));
    }
    assert_eq!(
        process.only_stack("same_path").totals(),
        Totals::of(1000, 1000, 128)
    );
    assert_eq!(process.stacks.len(), 5);
}

/// Check that one path is one stack also when several threads take it.
#[test]
fn invariant_7_threads_share_stacks() {
    let dir = TempDir::new("invariants");
    let mut threads = target("threads.c").command(&["2000", "100"]);
    let recorded = Record::every_allocation(&dir).attach(&mut threads, End::Interrupt);
    let process = recorded.process();
    assert_eq!(process.only_stack("pair").alloc_objects, 8000);
    assert_eq!(process.only_stack("leak").alloc_objects, 400);
}
