//! Go programs in the daemon: windows, resets, lists, programs that become others, and their end.

use std::{fs, path::Path, thread, time::Duration};

use memprof_tests::{
    Daemon, Process, Profile, Running, TempDir, Totals,
    daemon::eventually,
    golang::{go_version, start, step},
    http, memprof, target,
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

/// Check that metrics have the numbers of the list for a Go program, and its engine.
#[test]
fn metrics() {
    let dir = TempDir::new("go-daemon");
    let mut program = start_in(&dir);
    let pid = program.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    step(&mut program);
    // Read after that, and not again.
    expect_rounds(daemon.profile(pid).process(), 1);
    let listed = listed(&daemon, pid).expect("in the list");
    let text = String::from_utf8(daemon.get("/metrics").body).expect("text");
    let comm = listed["comm"].as_str().expect("a name");
    let labels = format!("pid=\"{pid}\",comm=\"{comm}\"");
    let value = |name: &str| -> f64 {
        let series = format!("{name}{{{labels}}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&series));
        let line = line.unwrap_or_else(|| panic!("no {series} in {text}"));
        line.parse().expect("a number")
    };
    for (name, field) in [
        ("memprof_target_samples_total", "samples"),
        ("memprof_target_allocated_bytes_total", "alloc_bytes"),
        ("memprof_target_allocated_objects_total", "alloc_objects"),
        ("memprof_target_inuse_bytes", "inuse_bytes"),
        ("memprof_target_inuse_objects", "inuse_objects"),
    ] {
        let number = listed[field].as_f64().expect("a number");
        assert!(number > 0.0, "{field}: {listed}");
        assert_eq!(value(name), number, "{name}");
    }
    assert_eq!(value("memprof_target_losses_total"), 0.0);
    let info = format!("memprof_target_info{{{labels},engine=\"go runtime\"}} 1\n");
    assert!(text.contains(&info), "{info}: {text}");
    assert!(
        text.contains("memprof_missed_go_programs_total 0\n"),
        "{text}"
    );
    daemon.stop();
}

/// Check that a program in C that becomes one in Go, and the other way around, has a profile of
/// each program, of its kind.
#[test]
fn exec() {
    let dir = TempDir::new("go-daemon");
    let heap = target_with("heap.go", &[]);
    let own = dir.file("own");
    let mut to_go = Running::spawn(&mut target("exec.c").command(&[heap.text(), &own, "1"]));
    to_go.wait_stdout(|line| line == "ready");
    let hold = target("hold.c");
    let become_hold = [hold.text(), "10", "1000"];
    let mut to_c = start(&mut target_with("heap_exec.go", &[]).command(&become_hold));
    let daemon = Daemon::start(&dir, &[to_go.pid(), to_c.pid()], &[]);
    let images = |pid: u32| daemon.profile(pid).processes;
    // Not before the second program was read.
    let wait_for_second = |pid: u32, is_go: bool| {
        eventually(|| {
            let listed = listed(&daemon, pid)?;
            (listed["go"].is_object() == is_go && images(pid).len() == 2).then_some(())
        });
    };

    to_go.send("go");
    eventually(|| (to_go.stdout().matches("ready\n").count() == 2).then_some(()));
    wait_for_second(to_go.pid(), true);
    step(&mut to_go);
    let [first, second] = &images(to_go.pid())[..] else {
        panic!("two programs");
    };
    assert!(first.exited && first.engine != "go runtime" && first.go.is_none());
    assert_eq!(first.exact().alloc_bytes, 555);
    assert!(!second.exited && second.exe == heap.text(), "{second:?}");
    expect_rounds(second, 1);
    assert!(second.totals.is_none());

    step(&mut to_c);
    thread::sleep(Duration::from_millis(2500));
    to_c.send("exec");
    eventually(|| (to_c.stdout().matches("ready\n").count() == 2).then_some(()));
    wait_for_second(to_c.pid(), false);
    let modules = || listed(&daemon, to_c.pid()).map(|listed| listed["modules"].to_string());
    eventually(|| modules()?.contains("libc").then_some(()));
    to_c.send("go");
    eventually(|| (to_c.stdout().matches("done\n").count() == 2).then_some(()));
    let [first, second] = &images(to_c.pid())[..] else {
        panic!("two programs");
    };
    assert!(first.exited && first.engine == "go runtime", "{first:?}");
    let churned = first.leaf_totals("main.churnHere");
    assert_eq!((churned.alloc_objects, churned.inuse_objects), (1000, 0));
    assert!(!second.exited && second.go.is_none() && second.engine != "go runtime");
    assert_eq!(second.leaf_totals("hold_here"), Totals::of(10, 10, 1000));
    daemon.stop();
}

fn descriptors(pid: u32) -> usize {
    let directory = fs::read_dir(format!("/proc/{pid}/fd"));
    directory.expect("its descriptors").count()
}

/// Check that a daemon that takes Go programs on and lets them go again and again, one with C code
/// among them, holds no more descriptors than after the first time; and that each begins anew.
#[test]
fn attached_again_and_again() {
    const TIMES: usize = 50;
    let dir = TempDir::new("go-daemon");
    let anchor = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    anchor.wait_stdout(|line| line == "ready");
    let mut program = start_in(&dir);
    step(&mut program);
    let with_c = start(&mut target_with("heap_cgo.go", &[]).command(&[]));
    let daemon = Daemon::start(&dir, &[anchor.pid()], &[]);
    let mut counts = Vec::new();
    for _ in 0..=TIMES {
        for pid in [program.pid(), with_c.pid()] {
            let body = format!("{{\"pid\": {pid}}}");
            let answer = send(&daemon, "POST", "/v1/targets", &body);
            assert_eq!(answer.status, 201, "{}", answer.json());
            let answer = send(&daemon, "DELETE", &format!("/v1/targets/{pid}"), "");
            assert_eq!(answer.status, 200, "{}", answer.json());
        }
        counts.push(descriptors(daemon.running.pid()));
    }
    // What is under way for others can hold some at a moment.
    let (first, last) = (
        counts[0],
        eventually(|| {
            let now = descriptors(daemon.running.pid());
            (now <= counts[0] + 2).then_some(now)
        }),
    );
    assert!(last <= first + 2, "{counts:?}");
    expect_rounds(daemon.profile(program.pid()).process(), 1);
    daemon.stop();
}

/// Check that of a Go program that has ended the last reading stays for `--keep-exited` and no
/// longer, and its descriptors do not.
#[test]
fn kept_when_it_has_ended() {
    let dir = TempDir::new("go-daemon");
    let anchor = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    anchor.wait_stdout(|line| line == "ready");
    let mut program = start_in(&dir);
    let pid = program.pid();
    step(&mut program);
    let pids = [anchor.pid(), pid];
    let daemon = Daemon::start(&dir, &pids, &["--keep-exited", "6"]);
    let during = descriptors(daemon.running.pid());
    program.close_stdin();
    program.finish().expect_code(0);
    let is_over = || (listed(&daemon, pid)?["state"] == "ended").then_some(());
    eventually(is_over);
    let profile = daemon.profile(pid);
    assert!(profile.process().exited);
    expect_rounds(profile.process(), 1);
    eventually(|| (descriptors(daemon.running.pid()) + 2 <= during).then_some(()));
    eventually(|| listed(&daemon, pid).is_none().then_some(()));
    let gone = daemon.get(&format!("/v1/profile?pid={pid}"));
    assert_eq!(gone.status, 404);
    daemon.stop();
}
