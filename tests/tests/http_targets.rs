//! `/v1/targets` and `/v1/reset`: what is traced and from when on it counts, while the daemon
//! runs.

use std::{fs, path::Path};

use memprof_tests::{
    Daemon, Profile, Running, TempDir, Totals, code::AllocatorCode, daemon::eventually, http,
    target, targets::freestanding,
};
use serde_json::Value;

fn start(file: &str) -> Running {
    let running = Running::spawn(&mut target(file).command(&["100", "1000"]));
    running.wait_stdout(|line| line == "ready");
    running
}

fn go(running: &mut Running, times: usize) {
    running.send("go");
    eventually(|| (running.stdout().matches("done\n").count() == times).then_some(()));
}

fn send(daemon: &Daemon, method: &str, path: &str, body: &str) -> http::Response {
    http::request_with(Path::new(&daemon.socket), method, path, body)
}

fn state(daemon: &Daemon, pid: u32) -> Value {
    daemon.get(&format!("/v1/targets/{pid}")).json()["state"].clone()
}

fn totals(profile: &Profile, function: &str) -> Totals {
    profile.process().leaf_totals(function)
}

/// Check that a process can be added to a running daemon, let go and added again: nothing
/// stays in it, its last profile stays, and a second life begins with nothing.
#[test]
fn attach_and_detach() {
    let dir = TempDir::new("targets");
    let (first, mut second) = (start("hold.c"), start("hold.c"));
    let daemon = Daemon::start(&dir, &[first.pid()], &[]);
    let pid = second.pid();
    let path = format!("/v1/targets/{pid}");
    let body = format!("{{\"pid\": {pid}}}");
    assert_eq!(daemon.get(&path).status, 404);

    for life in 1..=2 {
        let attached = send(&daemon, "POST", "/v1/targets", &body);
        assert_eq!(attached.status, 201, "{:?}", attached.json());
        assert_eq!(attached.header("location"), Some(path.as_str()));
        assert!(attached.json()["sites"].as_u64() > Some(0));
        assert_eq!(send(&daemon, "POST", "/v1/targets", &body).status, 409);
        assert_eq!(state(&daemon, pid), "tracing");
        assert_ne!(AllocatorCode::in_memory(pid), AllocatorCode::in_file(pid));
        assert_eq!(daemon.profile(pid).process().totals(), Totals::default());

        go(&mut second, 2 * life - 1);
        let left = send(&daemon, "DELETE", &path, "");
        assert_eq!(left.status, 200, "{:?}", left.json());
        assert_eq!(left.json()["remains"], Value::Null);
        assert_eq!(AllocatorCode::in_memory(pid), AllocatorCode::in_file(pid));
        assert_eq!(state(&daemon, pid), "detached");
        assert_eq!(send(&daemon, "DELETE", &path, "").status, 404);

        // It goes on, and nobody counts.
        go(&mut second, 2 * life);
        let profile = daemon.profile(pid);
        assert!(profile.process().exited);
        assert_eq!(totals(&profile, "hold_here"), Totals::of(100, 100, 1000));
        assert_eq!(profile.process().exact().alloc_calls, 100);
    }
    // Sums go on over what has been forgotten.
    let stats = daemon.stats();
    assert_eq!(stats["sums"]["alloc_events"], 200, "{stats:#}");
    assert_eq!(
        (&stats["attached"], &stats["failed_to_attach"]),
        (&3.into(), &0.into())
    );
    daemon.stop();
    second.close_stdin();
    second.finish().expect_code(0);
}

/// Check that a process that is let go while others are traced leaves their numbers alone, and
/// that its exit is no news then.
#[test]
fn the_others_go_on() {
    let dir = TempDir::new("targets");
    let (mut one, mut other) = (start("hold.c"), start("hold.c"));
    let daemon = Daemon::start(&dir, &[one.pid(), other.pid()], &[]);
    go(&mut one, 1);
    go(&mut other, 1);
    let path = format!("/v1/targets/{}", one.pid());
    assert_eq!(send(&daemon, "DELETE", &path, "").status, 200);
    go(&mut other, 2);
    let profile = daemon.profile(other.pid());
    assert_eq!(totals(&profile, "hold_here"), Totals::of(200, 200, 1000));
    let pid = one.pid();
    one.close_stdin();
    one.finish().expect_code(0);
    assert_eq!(state(&daemon, pid), "detached");
    let profile = daemon.profile(pid);
    assert_eq!(totals(&profile, "hold_here"), Totals::of(100, 100, 1000));
    daemon.stop();
}

/// Check that what cannot be traced is refused with a reason, and what makes no sense, too.
#[test]
fn refused() {
    let dir = TempDir::new("targets");
    let hold = start("hold.c");
    let none =
        Running::spawn(&mut memprof_tests::targets::freestanding("no_allocator.c").command(&[]));
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    for (body, status) in [
        ("", 400),
        ("{}", 400),
        (r#"{"pid": "1"}"#, 400),
        (r#"{"pid": 0}"#, 400),
        (r#"{"pid": 1, "interval": 1}"#, 400),
        (r#"{"pid": 4194304}"#, 404),
        (&format!("{{\"pid\": {}}}", none.pid()), 422),
    ] {
        let response = send(&daemon, "POST", "/v1/targets", body);
        assert_eq!(response.status, status, "{body}: {:?}", response.json());
        assert!(
            response.json()["error"]
                .as_str()
                .is_some_and(|e| !e.is_empty())
        );
    }
    for path in ["/v1/targets/none", "/v1/targets/-1", "/v1/targets/4194304"] {
        assert_eq!(daemon.get(path).status, 404, "{path}");
        assert_eq!(send(&daemon, "DELETE", path, "").status, 404, "{path}");
    }
    assert_eq!(daemon.stats()["failed_to_attach"], 2);
    daemon.stop();
}

/// Check that after a reset what was allocated before counts for what is in use only, through
/// its being freed; and that statistics go on.
#[test]
fn reset() {
    let dir = TempDir::new("targets");
    let mut generations = start("generations.c");
    let pid = generations.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    go(&mut generations, 1);
    let reset = send(&daemon, "POST", "/v1/reset", "");
    assert_eq!(reset.status, 200);
    assert!(reset.json()["counted_since"].is_string());

    let held = Totals {
        inuse_objects: 100,
        inuse_bytes: 100_000,
        ..Totals::default()
    };
    let profile = daemon.profile(pid);
    assert_eq!(totals(&profile, "old_here"), held);
    assert_eq!(profile.process().exact().alloc_calls, 0);
    go(&mut generations, 2);
    let profile = daemon.profile(pid);
    assert_eq!(totals(&profile, "old_here"), held);
    assert_eq!(totals(&profile, "new_here"), Totals::of(100, 100, 1000));
    go(&mut generations, 3);
    let profile = daemon.profile(pid);
    assert_eq!(profile.process().totals(), Totals::of(100, 100, 1000));
    let exact = profile.process().exact();
    assert_eq!((exact.alloc_calls, exact.free_calls), (100, 100));
    assert_eq!(daemon.images(pid)[0]["alloc_events"], 200);
    daemon.stop();
}

/// Check that a window has what happens in it, in JSON that says so, also for a process that is
/// added meanwhile, and that a process that is not traced is told of at once.
#[test]
fn windows() {
    let dir = TempDir::new("targets");
    let mut generations = start("generations.c");
    let mut added = start("hold.c");
    let pid = generations.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    go(&mut generations, 1);
    assert_eq!(daemon.get("/v1/profile?pid=1&seconds=3600").status, 404);
    let profile = std::thread::scope(|scope| {
        let asking = scope.spawn(|| daemon.get("/v1/profile?seconds=4").json());
        std::thread::sleep(std::time::Duration::from_secs(1));
        go(&mut generations, 2);
        go(&mut generations, 3);
        let body = format!("{{\"pid\": {}}}", added.pid());
        assert_eq!(send(&daemon, "POST", "/v1/targets", &body).status, 201);
        go(&mut added, 1);
        asking.join().expect("a window")
    });
    let window = profile["window_s"].as_f64().expect("its length");
    assert!((4.0..10.0).contains(&window), "{window}");
    let processes = profile["processes"].as_array().expect("processes");
    assert_eq!(processes.len(), 2);
    let of = |pid: u32| {
        let process = processes.iter().find(|process| process["pid"] == pid);
        process.expect("the process")
    };
    let estimates = &of(pid)["estimates"];
    assert_eq!(estimates["alloc_bytes"], 100_000, "{estimates}");
    assert_eq!(estimates["inuse_bytes"], 0, "{estimates}");
    let leaf = |stack: &Value| stack["frames"][0]["function"].as_str() == Some("old_here");
    let stacks = of(pid)["stacks"].as_array().expect("stacks");
    let old = stacks.iter().find(|stack| leaf(stack)).expect("the stack");
    assert_eq!(old["inuse_bytes"], -100_000);
    assert_eq!(
        old["inuse_bytes_ci95"],
        serde_json::json!([-100_000, -100_000])
    );
    assert_eq!(of(pid)["totals"]["free_calls"], 100);
    assert_eq!(of(added.pid())["estimates"]["alloc_bytes"], 100_000);
    // As text: what grew, and by how much less all of it is.
    let text = daemon.get("/v1/profile?seconds=1&format=text").body;
    let text = String::from_utf8(text).expect("text");
    assert!(text.contains("+0 B"), "{text}");
    daemon.stop();
}

/// Check that slots come back: of processes that cannot be traced, more of which are asked for
/// than can be traced at a time, and of those that are let go.
#[test]
fn slots_are_given_back() {
    let dir = TempDir::new("slots");
    let (first, second) = (start("hold.c"), start("hold.c"));
    let daemon = Daemon::start(&dir, &[first.pid()], &[]);
    let free = || daemon.stats()["free_slots"].as_u64().expect("a number");
    let before = free();

    let mut without = Running::spawn(&mut freestanding("no_allocator.c").command(&[]));
    without.wait_stdout(|line| line == "ready");
    let body = format!("{{\"pid\": {}}}", without.pid());
    for attempt in 0..1100 {
        let refused = send(&daemon, "POST", "/v1/targets", &body).json();
        let error = refused["error"].as_str().unwrap_or_default();
        assert!(error.contains("no known allocator"), "{attempt}: {refused}");
    }
    let path = format!("/v1/targets/{}", second.pid());
    let body = format!("{{\"pid\": {}}}", second.pid());
    let descriptors = || {
        let open = fs::read_dir(format!("/proc/{}/fd", daemon.running.pid()));
        open.expect("the daemon's descriptors").count()
    };
    let open_before = descriptors();
    for _ in 0..10 {
        assert_eq!(send(&daemon, "POST", "/v1/targets", &body).status, 201);
        assert_eq!(send(&daemon, "DELETE", &path, "").status, 200);
    }
    eventually(|| (free() == before).then_some(()));
    // What holds a file or a process is given back, too, though the process lives on. Some
    // are of a connection, or of files that were held already.
    eventually(|| (descriptors() < open_before + 10).then_some(()));

    without.close_stdin();
    without.finish().expect_code(0);
    for mut process in [first, second] {
        process.close_stdin();
        process.finish().expect_code(0);
    }
    daemon.stop();
}
