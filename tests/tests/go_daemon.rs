//! Go programs in the daemon: windows, resets, lists, and their end.

use std::{path::Path, thread, time::Duration};

use memprof_tests::{
    Daemon, Process, Profile, Running, TempDir,
    daemon::eventually,
    golang::{go_version, start, step},
    http, memprof,
    targets::target_with,
};
use serde_json::Value;

/// What one round of the program allocates in `churnHere`, and frees.
const ROUND: u64 = 20_000;

fn start_in(dir: &TempDir) -> Running {
    start(&mut target_with("heap.go", &[]).command(&[&dir.file("own"), "1"]))
}

fn send(daemon: &Daemon, method: &str, path: &str, body: &str) -> http::Response {
    http::request_with(Path::new(&daemon.socket), method, path, body)
}

/// Fails unless it has `rounds` of the program, and all that it frees is freed.
fn expect_rounds(process: &Process, rounds: u64) {
    assert_eq!(process.engine, "go runtime");
    let churned = process.leaf_totals("main.churnHere");
    assert_eq!(
        (churned.alloc_objects, churned.inuse_objects),
        (rounds * ROUND, 0),
        "{churned:?}"
    );
}

/// Check that a profile is as new as its request, that a window has what happens in it, that
/// after a reset only what is allocated since counts, and that the last reading stays when the
/// program ends.
#[test]
fn counted_from() {
    let dir = TempDir::new("go-daemon");
    let mut program = start_in(&dir);
    let pid = program.pid();
    step(&mut program);
    let daemon = Daemon::start(&dir, &[pid], &[]);
    // Also what it did before the daemon was there.
    expect_rounds(daemon.profile(pid).process(), 1);
    step(&mut program);
    expect_rounds(daemon.profile(pid).process(), 2);

    let path = format!("/v1/profile?pid={pid}&seconds=2");
    let window = thread::scope(|scope| {
        let window = scope.spawn(|| daemon.get(&path));
        thread::sleep(Duration::from_millis(500));
        step(&mut program);
        window.join().expect("an answer")
    });
    assert_eq!(window.status, 200);
    assert_eq!(window.json()["schema"], "memprof.window/1");
    let window: Profile = serde_json::from_value(window.json()).expect("a window");
    expect_rounds(window.process(), 1);
    let go = window.process().go.as_ref().expect("Go");
    assert!(!go.since_start, "{go:?}");

    assert_eq!(send(&daemon, "POST", "/v1/reset", "").status, 200);
    let profile = daemon.profile(pid);
    expect_rounds(profile.process(), 0);
    let totals = profile.process().totals();
    assert!(
        totals.alloc_objects == 0 && totals.inuse_objects > 0,
        "what is held stays in use: {totals:?}"
    );
    step(&mut program);
    expect_rounds(daemon.profile(pid).process(), 1);

    program.close_stdin();
    program.finish().expect_code(0);
    let profile = daemon.profile_when(pid, |profile| profile.process().exited);
    expect_rounds(profile.process(), 1);
    let go = profile.process().go.as_ref().expect("Go");
    assert!(go.age_s.is_some(), "{go:?}");
    daemon.stop();
}

fn listed(daemon: &Daemon, pid: u32) -> Option<Value> {
    let processes = daemon.get("/v1/processes").json();
    let mut processes = processes.as_array().expect("a list").iter();
    processes.find(|process| process["pid"] == pid).cloned()
}

/// Check what the list, the statistics and `memprof ps` tell of a Go program: its version, its
/// rate, and how old the profile is that it has published, also when it has ended.
#[test]
fn told_in_lists() {
    let dir = TempDir::new("go-daemon");
    let mut program = start_in(&dir);
    let pid = program.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    let told = || listed(&daemon, pid).expect("in the list")["go"].clone();
    let go = told();
    assert_eq!(go["version"], go_version(), "{go}");
    assert_eq!(go["mem_profile_rate"], 1);
    assert!(go["age_s"].as_f64() < Some(5.0) && go["published_s"].is_null());
    assert!(go["refusal"].is_null() && go["failure"].is_null());

    step(&mut program);
    let age = |go: &Value| go["published_s"].as_f64();
    // Not a second after it was read last.
    let first = eventually(|| age(&told()));
    assert!(first < 5.0, "{first}");
    thread::sleep(Duration::from_millis(1500));
    let later = age(&told()).expect("an age");
    assert!(
        later > first + 1.0 && later < first + 10.0,
        "{first} {later}"
    );
    step(&mut program);
    eventually(|| (age(&told()) < Some(1.0)).then_some(()));
    let stats = daemon.stats();
    let stats = &stats["processes"][0]["go"];
    assert_eq!(
        (&stats["version"], &stats["mem_profile_rate"]),
        (&told()["version"], &1.into())
    );
    let finished = Running::spawn(&mut memprof(&["ps", "--socket", &daemon.socket])).finish();
    finished.expect_code(0);
    let cell = format!("{} every 1 B, ", go_version());
    assert!(finished.stdout.contains(&cell), "{finished}");
    assert!(finished.stdout.contains(" s old"), "{finished}");

    program.close_stdin();
    program.finish().expect_code(0);
    let is_over = || (listed(&daemon, pid)?["state"] == "ended").then_some(());
    eventually(is_over);
    let ended = told();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(told(), ended, "nothing of it gets older");
    daemon.stop();
}
