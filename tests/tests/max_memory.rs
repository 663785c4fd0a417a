//! `--max-memory`: what is taken stays below it, and what is left out for that is counted.

use std::{process::Command, thread, time::Duration};

use memprof_tests::{
    Daemon, LONG_LIMIT, Process, Record, Running, Stack, TempDir, daemon::eventually,
    memory::Watch, memprof, target,
};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// What is looked at once a second may take more in between.
const SLACK: u64 = 4 * MIB;

fn forest(depth: &str, rounds: &str) -> Running {
    let forest = Running::spawn(&mut target("forest.c").command(&[depth, rounds]));
    forest.wait_stdout(|line| line == "ready");
    forest
}

fn memory(daemon: &Daemon) -> Value {
    daemon.stats()["memory"].clone()
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("no number: {value}"))
}

/// Check that a program with more stacks and more live blocks than there is memory for does not
/// take the daemon beyond its limit, neither while it allocates nor while profiles of it are
/// made; that each sample that is missing or has no stack is counted; that exact totals are
/// exact; and that its frees leave nothing in use, and nothing below zero.
#[test]
fn many_stacks_and_blocks() {
    let dir = TempDir::new("max-memory");
    let blocks = 4 << 16;
    let mut forest = forest("16", "4");
    let pid = forest.pid();
    let limit = 64 * MIB;
    let daemon = Daemon::start(&dir, &[pid], &["--max-memory", "64MiB"]);
    let watch = Watch::start(&daemon);
    forest.send("go");
    forest.wait_stdout_for(LONG_LIMIT, |line| line == "done");

    let profile = daemon.profile(pid);
    let process = profile.process();
    let losses = &process.losses;
    assert_eq!(process.exact().alloc_calls, blocks, "{losses:?}");
    let missing = process.loss("live_map_full") + process.loss("in_flight_full");
    let totals = process.totals();
    assert_eq!(totals.alloc_objects + missing, blocks, "{losses:?}");
    assert_eq!(totals.inuse_objects, totals.alloc_objects, "{losses:?}");
    assert!(process.loss("live_map_full") > 0, "{losses:?}");
    let unknown = without_stack(process);
    let over = process.loss("stacks_full");
    assert!(unknown > 0 && unknown >= over, "{losses:?}");
    // Some of these are also missing: their stacks are captured before there is no room.
    assert!(
        unknown <= over + process.loss("stack_map_full"),
        "{losses:?}"
    );

    for format in ["pprof", "json", "text", "folded"] {
        let path = format!("/v1/profile?pid={pid}&format={format}");
        assert_eq!(daemon.get(&path).status, 200, "{format}");
    }
    // What making profiles took is given back.
    let told = eventually(|| {
        let told = memory(&daemon);
        let bytes = told["bytes"].as_object().expect("bytes by kind");
        let counted = bytes.iter().filter(|(kind, _)| *kind != "prefilter");
        let sum: u64 = counted.map(|(_, bytes)| number(bytes)).sum();
        (sum <= limit).then_some(told)
    });
    assert_eq!(number(&told["max_bytes"]), limit);
    assert!(number(&told["bytes"]["stacks"]) <= number(&told["max_stack_bytes"]) + MIB);

    let ps = Running::spawn(&mut memprof(&["ps", "--socket", &daemon.socket])).finish();
    ps.expect_code(0);
    ps.expect_stderr(&[
        "for more stacks; raise --max-memory",
        "stack map was full; raise --max-memory",
    ]);
    ps.expect_stderr(&["the map of live blocks was full; raise --max-memory or -i"]);

    forest.send("free");
    forest.wait_stdout_for(LONG_LIMIT, |line| line == "freed");
    let profile = daemon.profile_when(pid, |profile| profile.process().totals().inuse_objects == 0);
    let after = profile.process();
    assert_eq!(after.totals().alloc_objects, totals.alloc_objects);
    assert_eq!(after.exact().free_calls, blocks);
    assert_eq!(after.estimates.inuse_bytes, 0);
    let images = daemon.images(pid);
    assert_eq!(images[0]["live"], 0, "{images:?}");
    assert_eq!(images[0]["alloc_events"], images[0]["free_events"]);

    // The daemon keeps no descriptors of unwind tables, and these never become less.
    let most = watch.most() + number(&told["bytes"]["tables"]);
    eprintln!("{} MiB of {} at most", most / MIB, limit / MIB);
    assert!(most <= limit + SLACK, "{most} of {limit}: {told}");
    let stopped = daemon.stop();
    stopped.expect_stderr(&["memory is short"]);
}

/// Check that a recording under a limit says what it left out, and what can be done.
#[test]
fn recording_says_so() {
    let dir = TempDir::new("max-memory");
    let recorded = Record::every_allocation(&dir)
        .options(&["--max-memory", "48MiB"])
        .limit(LONG_LIMIT)
        .command(&target("recursion.c"), &["15", "2"]);
    let losses = &recorded.process().losses;
    let unknown = without_stack(recorded.process());
    assert!(unknown > 0, "{losses:?}");
    recorded
        .memprof
        .expect_stderr(&["raise --max-memory or -i"]);
    let leaves = recorded.process().exact().alloc_calls;
    assert!(leaves >= 2 << 15, "{leaves}");
}

/// The samples of a process that have no stack.
fn without_stack(process: &Process) -> u64 {
    let unknown = |stack: &&Stack| stack.frames[0].unknown.as_deref() == Some("no_stack");
    memprof_tests::sum(process.stacks.iter().filter(unknown)).alloc_objects
}

/// Check that stacks of running processes which there is no more memory for are counted as
/// unknown ones, to the last sample, and that no sample is lost.
#[test]
fn further_stacks_are_unknown() {
    let dir = TempDir::new("max-memory");
    let mut forests: Vec<Running> = (0..20).map(|_| forest("9", "1")).collect();
    let pids: Vec<u32> = forests.iter().map(Running::pid).collect();
    let options = [
        "--max-memory",
        "56MiB",
        "--stack-entries",
        "4096",
        "--probe",
        "uprobe",
    ];
    let daemon = Daemon::start(&dir, &pids, &options);
    let mut unknown = 0;
    for forest in &mut forests {
        forest.send("go");
        forest.wait_stdout(|line| line == "done");
        let profile = daemon.profile_when(forest.pid(), |profile| {
            profile.process().totals().alloc_objects >= 1 << 9
        });
        let process = profile.process();
        assert_eq!(process.totals().inuse_objects, 1 << 9);
        let losses = &process.losses;
        assert_eq!(process.loss("stack_map_full"), 0, "{losses:?}");
        assert_eq!(
            without_stack(process),
            process.loss("stacks_full"),
            "{losses:?}"
        );
        unknown += without_stack(process);
    }
    assert!(unknown > 0);
    let stats = daemon.stats();
    assert_eq!(number(&stats["sums"]["losses"]["stacks_full"]), unknown);
    assert_eq!(number(&stats["memory"]["forgotten_early"]), 0);
    let text = String::from_utf8(daemon.get("/metrics").body).expect("text");
    let series = format!("memprof_losses_total{{cause=\"stacks_full\"}} {unknown}\n");
    assert!(text.contains(&series), "{text}");
    daemon.stop();
}

/// Check that processes that have ended make room for those that run, before stacks of those
/// are left out; and that this is counted, with what they had counted in the sums.
#[test]
fn ended_processes_make_room() {
    let dir = TempDir::new("max-memory");
    let mut forests: Vec<Running> = (0..16).map(|_| forest("9", "1")).collect();
    let pids: Vec<u32> = forests.iter().map(Running::pid).collect();
    let options = ["--max-memory", "48MiB", "--probe", "uprobe"];
    let daemon = Daemon::start(&dir, &pids, &options);
    for mut forest in forests.drain(..) {
        let pid = forest.pid();
        forest.send("go");
        forest.wait_stdout(|line| line == "done");
        let _ = daemon.profile_when(pid, |profile| {
            profile.process().totals().alloc_objects >= 1 << 9
        });
        forest.close_stdin();
        forest.finish().expect_code(0);
        // Room is made once a second.
        thread::sleep(Duration::from_millis(1500));
    }
    let stats = daemon.stats();
    let memory = &stats["memory"];
    assert!(number(&memory["forgotten_early"]) > 0, "{memory}");
    let forgotten = number(&stats["forgotten_processes"]);
    assert_eq!(forgotten, number(&memory["forgotten_early"]));
    assert_eq!(number(&stats["sums"]["losses"]["stacks_full"]), 0);
    assert_eq!(number(&stats["sums"]["alloc_events"]), 16 << 9);
    let ps = Running::spawn(&mut memprof(&["ps", "--socket", &daemon.socket])).finish();
    ps.expect_stderr(&["ended processes forgotten before the time: raise --max-memory"]);
    daemon.stop();
}

/// Runs memprof on nothing that takes time.
fn short(options: &[&str]) -> memprof_tests::Finished {
    let mut command: Command = memprof(&["record", "-i", "1", "-o", "/dev/null"]);
    command.args(options).args(["--", "/bin/true"]);
    Running::spawn(&mut command).finish()
}

/// Check that a limit that is too small is refused with the least that would do, that this
/// does, and that there can be none.
#[test]
fn too_little_is_refused() {
    let refused = short(&["--max-memory", "1MiB"]);
    refused.expect_code(1);
    let words = "--max-memory is too little: ";
    let least = refused
        .stderr
        .lines()
        .find_map(|line| line.split_once(words)?.1.split_once("MiB"))
        .unwrap_or_else(|| panic!("the least is not named: {refused}"))
        .0;
    short(&["--max-memory", &format!("{least}MiB")]).expect_code(0);
    let less: u64 = least.parse().expect("a number");
    short(&["--max-memory", &format!("{}MiB", less - 1)]).expect_code(1);
    short(&["--max-memory", "none"]).expect_code(0);
    short(&["--max-memory", "64MiB", "--live-entries", "4000000"])
        .expect_stderr(&["with the sizes of maps that are asked for"]);
    short(&["--max-memory", "some"]).expect_code(2);
}

/// Check that maps are as large as the limit allows, that what is asked for is kept, and that
/// /metrics has what /v1/stats has.
#[test]
fn maps_follow_the_limit() {
    let dir = TempDir::new("max-memory");
    let forest = forest("4", "1");
    let sizes = |options: &[&str]| {
        let daemon = Daemon::start(&dir, &[forest.pid()], options);
        let told = memory(&daemon);
        let metrics = String::from_utf8(daemon.get("/metrics").body).expect("text");
        daemon.stop();
        (told, metrics)
    };
    let (small, metrics) = sizes(&["--max-memory", "64MiB", "--stack-entries", "1000"]);
    assert_eq!(number(&small["stack_entries"]), 1000);
    assert!(metrics.contains(&format!("memprof_max_memory_bytes {}\n", 64 * MIB)));
    let maps = number(&small["bytes"]["maps"]);
    assert!(metrics.contains(&format!("memprof_memory_bytes{{kind=\"maps\"}} {maps}\n")));
    let (large, _) = sizes(&[]);
    assert_eq!(number(&large["live_entries"]), 1 << 20);
    assert_eq!(number(&large["ring_bytes"]), 8 * MIB);
    assert!(number(&large["max_bytes"]) >= 1024 * MIB);
    let (unlimited, metrics) = sizes(&["--max-memory", "none"]);
    assert!(unlimited["max_bytes"].is_null());
    assert!(!metrics.contains("memprof_max_memory_bytes"));
    for kind in ["ring_bytes", "live_entries", "in_flight_entries"] {
        assert!(number(&small[kind]) < number(&large[kind]), "{kind}");
        assert_eq!(large[kind], unlimited[kind], "{kind}");
    }
}
