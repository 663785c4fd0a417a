//! `-a` with `--max-memory`, on a host where much goes on.

use std::process::Command;

use memprof_tests::{Daemon, Running, TempDir, memory::Watch};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Files are compiled and looked through all the time, and what is taken is looked at once a
/// second.
const SLACK: u64 = 16 * MIB;

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("no number: {value}"))
}

/// Check that while every process of a busy host is traced what is taken stays below a limit that
/// is far too small for their unwind tables, and that what is left out is counted.
#[test]
fn every_process() {
    let dir = TempDir::new("max-memory");
    let limit = 64 * MIB;
    let daemon = Daemon::start(
        &dir,
        &[],
        &[
            "-a",
            "-i",
            "64KiB",
            "--probe",
            "uprobe",
            "--max-memory",
            "64MiB",
        ],
    );
    let watch = Watch::start(&daemon);
    for turn in 0..100 {
        let command = match turn % 4 {
            0 => "python3 -S -c 'import json, ssl, decimal; x = [str(i) for i in range(100000)]'",
            1 => "gcc -v -O2 -x c -o /dev/null -S - < /dev/null",
            2 => "git --version; perl -e 'my @x = (1..50000)'",
            _ => "ls -lR /usr/include | sort | tail -1",
        };
        let mut shell = Command::new("sh");
        let finished = Running::spawn(shell.args(["-c", command])).finish();
        assert!(finished.status.success(), "{finished}");
    }
    let stats = daemon.stats();
    let memory = &stats["memory"];
    let profile = daemon.get("/v1/profile");
    assert_eq!(profile.status, 200);
    // The daemon keeps no descriptors of tables, and these never become less.
    let most = watch.most() + number(&memory["bytes"]["tables"]);
    eprintln!("{} MiB of {} at most: {memory}", most / MIB, limit / MIB);
    assert!(most <= limit + SLACK, "{most} of {limit}: {memory}");
    assert!(number(&stats["sums"]["alloc_events"]) > 0, "{stats}");
    daemon.stop();
}
