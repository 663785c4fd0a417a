//! `-a` with more processes than there are slots.

use std::collections::{BTreeMap, BTreeSet};

use memprof_tests::{Daemon, Running, TempDir, daemon::eventually, target};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

/// Processes that memprof traces at a time.
const SLOTS: usize = 1024;

/// More than that, and so many of them end.
const CHILDREN: usize = 1100;
const ENDED: usize = 300;

/// Calls of each child a round.
const CALLS: u64 = 10;

fn go(running: &mut Running, words: &str, times: usize) {
    running.send(words);
    eventually(|| (running.stdout().matches("done\n").count() == times).then_some(()));
}

/// The calls that are known of each of `pids`: (number, allocating calls), and what /v1/stats
/// tells beside them.
fn calls(daemon: &Daemon, pids: &BTreeSet<u64>) -> (BTreeMap<u64, u64>, Value) {
    let mut stats = daemon.stats();
    let processes = stats["processes"].take();
    let processes = processes.as_array().expect("processes");
    let calls = processes.iter().filter_map(|process| {
        let pid = process["pid"].as_u64().filter(|pid| pids.contains(pid))?;
        let images = process["images"].as_array().expect("images");
        let totals = &images.last()?["totals"];
        Some((pid, totals["alloc_calls"].as_u64().expect("a number")))
    });
    (calls.collect(), stats)
}

/// Check that those for which there is no slot are not counted, and that it is told; that what
/// is counted is right all the same; and that they are taken on once others have ended.
#[test]
fn more_than_there_are_slots() {
    let dir = TempDir::new("slots");
    let mut crowd = Running::spawn(&mut target("crowd.c").command(&[&CHILDREN.to_string()]));
    crowd.wait_stdout(|line| line == "ready");
    let children: Vec<u64> = crowd
        .stdout()
        .lines()
        .filter_map(|line| line.strip_prefix("child=")?.parse().ok())
        .collect();
    assert_eq!(children.len(), CHILDREN);
    let all: BTreeSet<u64> = children.iter().copied().collect();
    // As in most shells. Each process takes two descriptors of the daemon's.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(1024), hard).expect("the limit");
    let options = ["-a", "--probe", "uprobe", "--keep-exited", "600"];
    let daemon = Daemon::start(&dir, &[], &options);

    go(&mut crowd, "go", 1);
    let (first, stats) = eventually(|| {
        let (calls, stats) = calls(&daemon, &all);
        let is_settled = stats["free_slots"] == 0 && calls.values().all(|calls| *calls == CALLS);
        is_settled.then_some((calls, stats))
    });
    // Others on this host have some.
    assert!(first.len() <= SLOTS, "{}", first.len());
    assert!(first.len() > SLOTS / 2, "{}", first.len());
    let missed = (CHILDREN - first.len()) as u64;
    let unclaimed = stats["unclaimed_calls"].as_u64().expect("a number");
    assert!(unclaimed >= missed * CALLS, "{unclaimed}, {missed} missed");

    go(&mut crowd, &format!("end {ENDED}"), 2);
    let left: BTreeSet<u64> = children[..CHILDREN - ENDED].iter().copied().collect();
    eventually(|| (daemon.stats()["free_slots"].as_u64()? > 100).then_some(()));
    go(&mut crowd, "go", 3);
    let second = eventually(|| {
        let (calls, _) = calls(&daemon, &left);
        (calls.len() == left.len() && calls.values().all(|calls| *calls >= CALLS)).then_some(calls)
    });
    for (pid, calls) in second {
        let rounds = if first.contains_key(&pid) { 2 } else { 1 };
        assert_eq!(calls, rounds * CALLS, "{pid}");
    }
    daemon.stop();
}
