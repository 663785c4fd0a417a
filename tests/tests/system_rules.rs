//! `-a` with rules: which of all processes are traced, and how.
//!
//! Other tests and the host run beside. So each test has programs with names of its own,
//! and says nothing about any others.

use std::{
    path::Path,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use memprof_tests::{
    Daemon, Process, Profile, Running, TempDir, daemon::eventually, hold, http, target,
    targets::copy_program,
};
use serde_json::{Value, json};

/// Blocks of a go, and their bytes.
const BLOCKS: u64 = 10;
const BYTES: u64 = 100;

/// A user that nothing on the host is, and that has no name.
const USER: u32 = 61_234;

/// One daemon at a time: a probe in a library that all share is in the way of others' prefilter.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A copy of a program with that name, which is its comm, too.
fn named(dir: &TempDir, name: &str, source: &str) -> String {
    assert!(name.len() <= 15, "{name}");
    let path = dir.file(name);
    // It may run: then it cannot be written.
    if !Path::new(&path).exists() {
        copy_program(target(source).path(), Path::new(&path));
    }
    path
}

/// A holder with that name.
fn holder(dir: &TempDir, name: &str) -> Running {
    started(&mut Command::new(named(dir, name, "hold.c")))
}

fn started(command: &mut Command) -> Running {
    let running = Running::spawn(command.args([BLOCKS.to_string(), BYTES.to_string()]));
    running.wait_stdout(|line| line == "ready");
    running
}

/// A daemon for all with options, that writes to nobody unless they say so.
fn everyone(dir: &TempDir, options: &[&str]) -> Daemon {
    let mut all = vec!["-a", "-i", "64KiB"];
    if !options.contains(&"--probe") {
        all.extend(["--probe", "uprobe"]);
    }
    all.extend(options);
    Daemon::start(dir, &[], &all)
}

/// Has a holder allocate.
fn go(running: &mut Running) {
    let before = running.stdout().matches("done\n").count();
    running.send("go");
    eventually(|| (running.stdout().matches("done\n").count() > before).then_some(()));
}

fn end(mut running: Running) {
    running.close_stdin();
    running.finish().expect_code(0);
}

/// The images of a process; none if it is not known.
fn images(daemon: &Daemon, pid: u32) -> Vec<Process> {
    let response = daemon.get(&format!("/v1/profile?pid={pid}"));
    match response.status {
        200 => Profile::parse(&response.body).processes,
        404 => Vec::new(),
        status => panic!("{status}"),
    }
}

/// What the list says of a process; none if it is not there.
fn listed(daemon: &Daemon, pid: u32) -> Option<Value> {
    let processes = daemon.get("/v1/processes").json();
    let processes = processes.as_array().expect("a list");
    processes
        .iter()
        .find(|process| process["pid"] == pid)
        .cloned()
}

fn state(daemon: &Daemon, pid: u32) -> Option<String> {
    let listed = listed(daemon, pid)?;
    Some(listed["state"].as_str().expect("a state").to_owned())
}

/// How many calls of a process were counted.
fn calls(daemon: &Daemon, pid: u32) -> u64 {
    let images = images(daemon, pid);
    images.last().map_or(0, |image| image.exact().alloc_calls)
}

/// Waits until a holder's calls are counted, and checks that then all of them are.
#[track_caller]
fn check_traced(daemon: &Daemon, running: &mut Running) {
    let pid = running.pid();
    let traced_calls = || (state(daemon, pid)? == "tracing").then(|| calls(daemon, pid));
    eventually(|| {
        // Its first call may be what makes it known.
        let before = traced_calls();
        go(running);
        (traced_calls()? > before?).then_some(())
    });
    let before = calls(daemon, pid);
    for round in 1..=3 {
        go(running);
        assert_eq!(calls(daemon, pid), before + round * BLOCKS);
    }
    assert_eq!(state(daemon, pid).as_deref(), Some("tracing"));
}

/// Checks that a holder's calls are not counted, and never were.
#[track_caller]
fn check_left_alone(daemon: &Daemon, running: &mut Running) {
    // A call makes it known to BPF, and may have it let go.
    go(running);
    go(running);
    assert!(images(daemon, running.pid()).is_empty());
    assert_eq!(listed(daemon, running.pid()), None);
}

/// Waits until a holder is let go, and checks that its books stay.
#[track_caller]
fn check_let_go(daemon: &Daemon, running: &mut Running) {
    let pid = running.pid();
    eventually(|| (state(daemon, pid).as_deref() == Some("detached")).then_some(()));
    let before = calls(daemon, pid);
    assert!(before > 0);
    go(running);
    assert_eq!(calls(daemon, pid), before);
}

fn put(daemon: &Daemon, include: &[&str], exclude: &[&str]) {
    let body = json!({"filters": {"include": include, "exclude": exclude}});
    let answer = http::request_with(
        Path::new(&daemon.socket),
        "PUT",
        "/v1/config",
        &body.to_string(),
    );
    assert_eq!(answer.status, 200, "{}", answer.json());
    assert_eq!(answer.json()["filters"], body["filters"]);
}

/// Check that a rule that excludes is stronger than those that include, whatever their order,
/// and that all conditions of a rule must hold.
#[test]
fn exclude_is_stronger() {
    let _alone = alone();
    let dir = TempDir::new("filters");
    let mut kept = holder(&dir, "fxs-kept");
    let mut left_out = holder(&dir, "fxs-out");
    let mut half = holder(&dir, "fxs-half");
    let exe = format!("exe={}/fxs-out", dir.path().display());
    let half_rule = format!("comm=fxs-half,uid={USER}");
    for options in [
        ["--include", "comm=fxs-[ko]*", "--exclude", &exe],
        ["--exclude", &exe, "--include", "comm=fxs-[ko]*"],
    ] {
        let options: Vec<&str> = options
            .into_iter()
            .chain(["--include", &half_rule])
            .collect();
        let daemon = everyone(&dir, &options);
        check_traced(&daemon, &mut kept);
        check_left_alone(&daemon, &mut left_out);
        check_left_alone(&daemon, &mut half);
        daemon.stop();
    }
    [kept, left_out, half].into_iter().for_each(end);
}

/// Check that a process that was let go by hand is not taken on by rules that include it, as
/// long as nobody asks for it; whether probes are shared or not.
#[test]
fn let_go_by_hand() {
    let _alone = alone();
    let dir = TempDir::new("filters");
    let mut one = holder(&dir, "fxh-one");
    let mut two = holder(&dir, "fxh-two");
    let path = format!("/v1/targets/{}", two.pid());
    for (first, then) in [
        (
            (&[][..], &["comm=fxh-x"][..]),
            (&[][..], &["comm=fxh-y"][..]),
        ),
        ((&["comm=fxh-*"], &[]), (&["comm=fxh-*", "comm=fxh-y"], &[])),
    ] {
        let daemon = everyone(&dir, &[]);
        put(&daemon, first.0, first.1);
        check_traced(&daemon, &mut one);
        check_traced(&daemon, &mut two);
        let send = |method, path: &str, body: &str| {
            http::request_with(Path::new(&daemon.socket), method, path, body).status
        };
        assert_eq!(send("DELETE", &path, ""), 200);
        put(&daemon, then.0, then.1);
        check_traced(&daemon, &mut one);
        check_let_go(&daemon, &mut two);
        let body = json!({ "pid": two.pid() }).to_string();
        // Jobs of its earlier life may be under way.
        eventually(|| (send("POST", "/v1/targets", &body) == 201).then_some(()));
        check_traced(&daemon, &mut two);
        daemon.stop();
    }
    [one, two].into_iter().for_each(end);
}

/// Check that a rule says how a process is looked at: one has the prefilter, for which it is
/// written to, the others have not; that the first rule that holds says so; and that the
/// prefilter goes when the rules do not want it any more.
#[test]
fn engines() {
    let _alone = alone();
    let dir = TempDir::new("filters");
    let mut written = holder(&dir, "fxg-written");
    let mut probed = holder(&dir, "fxg-probed");
    let is_written = |running: &Running| hold::maps(running.pid()).contains("memprof-prefilter");
    let engine = |daemon: &Daemon, running: &Running| {
        listed(daemon, running.pid()).expect("it")["engine"].clone()
    };
    let rules = [
        "--include",
        "comm=fxg-written,probe=prefilter",
        "--include",
        "comm=fxg-*",
    ];
    let options: Vec<&str> = ["--probe", "auto"].into_iter().chain(rules).collect();
    let daemon = everyone(&dir, &options);
    check_traced(&daemon, &mut written);
    check_traced(&daemon, &mut probed);
    assert_eq!(engine(&daemon, &written), "prefilter");
    assert_eq!(engine(&daemon, &probed), "uprobe");
    assert!(is_written(&written) && !is_written(&probed));
    // One that comes later.
    let mut later = holder(&dir, "fxg-written");
    check_traced(&daemon, &mut later);
    assert_eq!(engine(&daemon, &later), "prefilter");
    put(
        &daemon,
        &["comm=fxg-*", "comm=fxg-written,probe=prefilter"],
        &[],
    );
    eventually(|| (!is_written(&written) && !is_written(&later)).then_some(()));
    for process in [&mut written, &mut later, &mut probed] {
        check_traced(&daemon, process);
        assert_eq!(engine(&daemon, process), "uprobe");
    }
    // By probes that all share, and back.
    put(&daemon, &[], &["comm=fxg-probed"]);
    check_let_go(&daemon, &mut probed);
    check_traced(&daemon, &mut written);
    assert_eq!(engine(&daemon, &written), "uprobe");
    put(&daemon, &["comm=fxg-w*,probe=auto", "comm=fxg-*"], &[]);
    check_traced(&daemon, &mut probed);
    eventually(|| {
        let listed = listed(&daemon, written.pid())?;
        (listed["engine"] == "prefilter" && listed["state"] == "tracing").then_some(())
    });
    check_traced(&daemon, &mut written);
    put(&daemon, &[], &["comm=fxg-probed"]);
    eventually(|| (!is_written(&written)).then_some(()));
    check_traced(&daemon, &mut written);
    check_let_go(&daemon, &mut probed);
    daemon.stop();
    assert!(!is_written(&written) && !is_written(&later));
    [written, probed, later].into_iter().for_each(end);
}

/// Check that a child of a process that is traced by a rule is found, although it maps nothing.
#[test]
fn forked_child() {
    let _alone = alone();
    let dir = TempDir::new("filters");
    let program = named(&dir, "fxk-forks", "forks.c");
    let daemon = everyone(&dir, &["--include", "comm=fxk-forks"]);
    let mut parent = Running::spawn(&mut Command::new(program));
    parent.wait_stdout(|line| line == "ready");
    eventually(|| (state(&daemon, parent.pid()).as_deref() == Some("tracing")).then_some(()));
    parent.send("go");
    let line = parent.wait_stdout(|line| line.starts_with("child "));
    let child: u32 = line["child ".len()..].parse().expect("a pid");
    eventually(|| (state(&daemon, child).as_deref() == Some("tracing")).then_some(()));
    parent.send("go");
    parent.wait_stdout(|line| line == "child ended 0");
    eventually(|| (state(&daemon, child).as_deref() == Some("ended")).then_some(()));
    end(parent);
    daemon.stop();
}
