//! Sampling: without bias, at the interval asked for.

use std::process::Command;

use memprof_tests::{End, Profile, Record, Running, TempDir, memprof::memprof, target};

/// Size, and how many blocks of it `sizes.c` allocates; half of them stay.
const SIZES: &[(u64, u64)] = &[
    (16, 60_000),
    (200, 30_000),
    (3000, 6000),
    (20_000, 1000),
    (300_000, 100),
];

/// How far an estimate may be from the truth. Ten stacks with four numbers each:
/// at 5 sigmas one run in 40,000 fails for no other reason than chance, if the
/// estimates were normal.
const SIGMAS: f64 = 5.0;

#[track_caller]
fn check_estimate(what: &str, estimate: u64, count: u64, unit: u64, odds: f64) {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let (estimate, count, unit) = (estimate as f64, count as f64, unit as f64);
    // Of N samples with probability p, each worth x/p: Var = N x^2 (1 - p) / p.
    let sigma = (count * unit * unit * odds).sqrt();
    let tolerance = SIGMAS * sigma + 1.0;
    let error = (estimate - count * unit).abs();
    assert!(
        error <= tolerance,
        "{what}: {estimate} is {error} from {}, more than {tolerance}",
        count * unit
    );
}

fn check_sizes(profile: &Profile, interval: u64) {
    assert_eq!(profile.sample_interval_bytes, interval);
    for &(size, count) in SIZES {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let p = -(-(size as f64) / interval as f64).exp_m1();
        let odds = (1.0 - p) / p;
        let name = format!("size_{size}");
        let totals = profile.process().leaf_totals(&name);
        let estimates = [
            ("alloc_bytes", totals.alloc_bytes, count, size),
            ("alloc_objects", totals.alloc_objects, count, 1),
            ("inuse_bytes", totals.inuse_bytes, count / 2, size),
            ("inuse_objects", totals.inuse_objects, count / 2, 1),
        ];
        for (what, estimate, count, unit) in estimates {
            check_estimate(&format!("{name} {what}"), estimate, count, unit, odds);
        }
    }
}

/// Check that estimates at 4 KiB are within 5 sigmas of the truth (invariant 4),
/// and rest on fewer samples than there are allocations.
#[test]
fn unbiased_at_4_kib() {
    let dir = TempDir::new("sampling");
    let mut sizes = target("sizes.c").command(&[]);
    let recorded = Record::with(&dir, &["-i", "4KiB"]).attach(&mut sizes, End::Interrupt);
    check_sizes(&recorded.profile, 4096);
    let process = recorded.process();
    let samples = process.only_stack("size_16").samples;
    assert!(
        (1..3000).contains(&samples),
        "60,000 times 16 bytes: {samples} samples"
    );
}

/// Check the same at 64 KiB, of a command.
#[test]
fn unbiased_at_64_kib() {
    let dir = TempDir::new("sampling");
    let recorded = Record::with(&dir, &["-i", "64KiB"]).command(&target("sizes.c"), &[]);
    check_sizes(&recorded.profile, 65_536);
}

/// Check that an interval of 0 switches sampling off.
#[test]
fn zero_is_off() {
    let dir = TempDir::new("sampling");
    let mut leaks = target("leaks.c").command(&[]);
    let recorded = Record::with(&dir, &["-i", "0"]).attach(&mut leaks, End::Interrupt);
    assert_eq!(recorded.profile.sample_interval_bytes, 0);
    assert_eq!(recorded.process().stacks.len(), 0);
}

fn interval_of(flag: Option<&str>, environment: Option<&str>) -> u64 {
    let dir = TempDir::new("sampling");
    let file = dir.file("profile.json");
    let mut command: Command = memprof(&["record", "-o", &file]);
    if let Some(flag) = flag {
        command.args(["-i", flag]);
    }
    if let Some(value) = environment {
        command.env("MEMPROF_SAMPLE_INTERVAL", value);
    }
    command.args(["--", "true"]);
    Running::spawn(&mut command).finish().expect_code(0);
    Profile::read(file).sample_interval_bytes
}

/// Check that the interval is 512 KiB, unless the environment says another, and
/// that the flag says it before the environment.
#[test]
fn flag_environment_default() {
    assert_eq!(interval_of(None, None), 512 << 10);
    assert_eq!(interval_of(None, Some("128KiB")), 128 << 10);
    assert_eq!(interval_of(Some("2MiB"), Some("128KiB")), 2 << 20);
    assert_eq!(interval_of(Some("1"), None), 1);
}

/// Check that a depth of 1 gives the calling function and nothing else.
#[test]
fn depth_of_one() {
    let dir = TempDir::new("sampling");
    let mut leaks = target("leaks.c").command(&[]);
    let recorded = Record::every_allocation(&dir)
        .options(&["--stack-depth", "1"])
        .attach(&mut leaks, End::Interrupt);
    let process = recorded.process();
    for stack in &process.stacks {
        let outermost = stack.frames.iter().filter(|frame| !frame.inlined);
        assert_eq!(outermost.count(), 1, "{}", stack.path());
        assert!(stack.truncated, "{}", stack.path());
    }
    for (function, count) in [("leak_small", 100), ("leak_large", 3), ("churn", 1000)] {
        assert_eq!(
            process.only_stack(function).alloc_objects,
            count,
            "{function}"
        );
    }
    assert_eq!(process.stacks.len(), 3);
    assert_eq!(process.loss("truncated_stacks"), 1103);
}
