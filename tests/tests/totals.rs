//! Exact totals: what BPF counts at every call, sampled or not.

use std::{path::Path, process::Command};

use memprof_tests::{
    CallTotals, Daemon, End, Process, Profile, Record, Recorded, Running, TempDir, Totals,
    daemon::eventually, engine::is_prefilter, target,
};

/// How far an estimate may be from the exact number.
const SIGMAS: f64 = 5.0;

/// The quantile that the intervals of a profile are made with.
const Z: f64 = 1.959_964;

/// The variance that an interval was made from: half its width is
/// Z sqrt(v + R^2 Z^2 / 4), see `docs/sampling.md`.
fn variance([low, high]: [u64; 2], interval: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let half = (high - low) as f64 / 2.0;
    ((half / Z).powi(2) - (interval * Z / 2.0).powi(2)).max(0.0)
}

fn no_losses(process: &Process) {
    for cause in ["alloc_unreported", "live_map_full", "in_flight_full"] {
        assert_eq!(process.loss(cause), 0, "{cause}: {:?}", process.losses);
    }
}

/// Check a profile's estimates against its exact totals.
#[track_caller]
fn agree(profile: &Profile, interval: u64) {
    let process = profile.process();
    no_losses(process);
    let (exact, estimates) = (process.exact(), process.estimates);
    let what = format!("{exact:?}, {estimates:?}");
    let histogram = process.size_histogram.as_ref().expect("a histogram");
    let calls: u64 = histogram.iter().map(|class| class.calls).sum();
    assert_eq!(calls, exact.alloc_calls, "{what}");
    let least: u64 = histogram.iter().map(|c| c.calls * c.min_bytes).sum();
    assert!(least <= exact.alloc_bytes, "{what}");
    if interval == 1 {
        assert_eq!(estimates.alloc_objects, exact.alloc_calls, "{what}");
        assert_eq!(estimates.alloc_bytes, exact.alloc_bytes, "{what}");
        assert_eq!(estimates.alloc_bytes_ci95, [exact.alloc_bytes; 2], "{what}");
        return;
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let (truth, estimate, interval) = (
        exact.alloc_bytes as f64,
        estimates.alloc_bytes as f64,
        interval as f64,
    );
    // As the interval, with 5 sigmas instead of 1.96.
    let missing = (truth - estimate).max(0.0);
    let sigma = (variance(estimates.alloc_bytes_ci95, interval) + interval * missing).sqrt();
    assert!(
        (truth - estimate).abs() <= SIGMAS * sigma,
        "{} sigmas: {what}",
        (truth - estimate) / sigma
    );
    assert!(estimates.samples > 20, "{what}");
}

fn at_three_intervals(record: impl Fn(Record<'_>) -> Recorded) -> Recorded {
    let dir = TempDir::new("totals");
    let exact = record(Record::with(&dir, &["-i", "1", "--ring-size", "64MiB"]));
    agree(&exact.profile, 1);
    for (text, interval) in [("4KiB", 4 << 10), ("64KiB", 64 << 10)] {
        let recorded = record(Record::with(&dir, &["-i", text]));
        agree(&recorded.profile, interval);
    }
    exact
}

/// What `sizes.c` does, by its source.
const SIZES: CallTotals = CallTotals {
    alloc_calls: 60_000 + 30_000 + 6000 + 1000 + 100,
    alloc_bytes: 60_000 * 16 + 30_000 * 200 + 6000 * 3000 + 1000 * 20_000 + 100 * 300_000,
    free_calls: (60_000 + 30_000 + 6000 + 1000 + 100) / 2,
};

/// Check that a program with mixed sizes has the totals that its source says, at
/// every interval, and that estimates agree with them; at 1, frees too.
#[test]
fn mixed_sizes() {
    let recorded = at_three_intervals(|record| {
        let mut sizes = target("sizes.c").command(&[]);
        let recorded = record.attach(&mut sizes, End::Interrupt);
        assert_eq!(recorded.process().exact(), SIZES);
        recorded
    });
    let process = recorded.process();
    let Totals {
        alloc_objects,
        inuse_objects,
        ..
    } = process.totals();
    assert_eq!(alloc_objects - inuse_objects, SIZES.free_calls);
    let histogram: Vec<_> = process
        .size_histogram
        .iter()
        .flatten()
        .map(|class| (class.min_bytes, class.max_bytes, class.calls))
        .collect();
    assert_eq!(
        histogram,
        [
            (16, Some(31), 60_000),
            (128, Some(255), 30_000),
            (2048, Some(4095), 6000),
            (16_384, Some(32_767), 1000),
            (262_144, Some(524_287), 100),
        ]
    );
    assert!(process.traced_s > 0.0);
}

fn program(path: &str, args: &[&str]) {
    assert!(Path::new(path).exists(), "the tests need {path}");
    let recorded = at_three_intervals(|record| record.program(path, args));
    let process = recorded.process();
    let freed = process.estimates.alloc_objects - process.estimates.inuse_objects;
    assert_eq!(process.exact().free_calls, freed);
}

/// Check that estimates agree with the exact totals of sqlite3.
#[test]
fn sqlite3() {
    program(
        "/usr/bin/sqlite3",
        &[
            ":memory:",
            "CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, body BLOB);
             CREATE INDEX by_name ON t(name);
             INSERT INTO t(name, body) SELECT 'name' || value, randomblob(2000) \
             FROM generate_series(1, 2000);
             SELECT count(*) FROM (SELECT name, group_concat(length(body)) FROM t GROUP BY name);
             DELETE FROM t WHERE id % 3 = 0;",
        ],
    );
}

/// Check that estimates agree with the exact totals of python3.
#[test]
fn python3() {
    program(
        "/usr/bin/python3",
        &[
            "-S",
            "-c",
            "
kept = []
for i in range(1500):
    kept.append(bytearray(2000 + i))
    if len(kept) > 1000:
        del kept[:500]
    table = {str(j): [j] * 100 for j in range(10)}
",
        ],
    );
}

/// Check that failing calls count as what was asked for, that `realloc` is one
/// call of each kind unless it fails, and that sampling need not be on.
#[test]
fn realloc_and_failures() {
    let dir = TempDir::new("totals");
    for interval in ["0", "1"] {
        let recorded = Record::with(&dir, &["-i", interval]).command(&target("realloc.c"), &[]);
        let process = recorded.process();
        let exact = process.exact();
        let estimates = process.estimates;
        // Failing calls, and realloc(p, 0), give no block.
        assert!(exact.alloc_calls > estimates.alloc_objects);
        if interval == "1" {
            let freed = estimates.alloc_objects - estimates.inuse_objects;
            assert_eq!(exact.free_calls, freed);
        } else {
            assert_eq!(estimates.samples, 0);
        }
    }
}

/// Check that each program image has its own totals, and keeps them when the
/// next has begun.
#[test]
fn images_have_their_own() {
    let dir = TempDir::new("totals");
    let mut leaks = target("leaks.c").command(&[]);
    let alone = Record::every_allocation(&dir).attach(&mut leaks, End::TargetExits);
    assert_eq!(
        alone.process().exact(),
        CallTotals {
            alloc_calls: 1103,
            alloc_bytes: 100 * 24 + 3 * 1_048_581 + 1000 * 64,
            free_calls: 1000,
        }
    );

    // A shell becomes the target, which is then the second image.
    let [shell, hold] = images_of(&dir, false).try_into().expect("two images");
    assert_eq!(shell.exact().alloc_calls, shell.estimates.alloc_objects);
    assert_eq!(hold.exact().alloc_calls, hold.estimates.alloc_objects);
    assert!(hold.leaf_totals("hold_here") == Totals::of(100, 100, 1000));
}

/// Check that of programs that replace each other at once, totals are right or
/// said to be unknown.
#[test]
fn images_in_a_hurry() {
    let dir = TempDir::new("totals");
    let images = images_of(&dir, true);
    assert!(images.len() > 1, "{images:#?}");
    for image in &images {
        if let Some(totals) = image.totals {
            assert_eq!(totals.alloc_calls, image.estimates.alloc_objects);
        }
        assert_eq!(image.totals.is_some(), image.size_histogram.is_some());
    }
}

/// The images of a shell that becomes `hold.c`, in a hurry by way of two other
/// shells; then it is told to allocate once.
fn images_of(dir: &TempDir, hurry: bool) -> Vec<Process> {
    let hold = target("hold.c");
    let script = if hurry {
        format!("read go; exec sh -c 'exec sh -c \"exec {}\"'", hold.text())
    } else {
        format!("read go; exec {}", hold.text())
    };
    let mut shell = Running::spawn(Command::new("/bin/sh").args(["-c", &script]));
    let pid = shell.pid();
    let daemon = Daemon::start(dir, &[pid], &[]);
    shell.send("go");
    shell.wait_stdout(|line| line == "ready");
    if is_prefilter() {
        // It does not see the new program's calls before that is hooked.
        eventually(|| {
            let process = &daemon.stats()["processes"][0];
            let is_hold = process["comm"].as_str()?.starts_with("hold");
            (is_hold && process["image_bytes"].as_u64()? > 0).then_some(())
        });
    }
    // The new program is met at its first call at the latest.
    shell.send("go");
    shell.wait_stdout(|line| line == "done");
    let _ = daemon.profile_when(pid, |profile| {
        let mut images = profile.processes.iter();
        images.any(|image| image.leaf_totals("hold_here").alloc_objects == 100)
    });
    shell.close_stdin();
    shell.finish().expect_code(0);
    let profile = daemon.profile_when(pid, |profile| {
        profile.processes.iter().all(|process| process.exited)
    });
    daemon.stop();
    profile.processes
}
