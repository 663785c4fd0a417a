//! `memprof daemon`: its HTTP API, its socket, and `memprof dump`.

use std::{fs, os::unix::fs::PermissionsExt as _, os::unix::net::UnixListener, path::Path};

use memprof_tests::{
    Daemon, Profile, Running, TempDir, Totals, daemon::eventually, engine::is_prefilter, http,
    memprof, pprof, target,
};
use nix::sys::signal::Signal;

/// A process that waits for a go to allocate 10 blocks of 100 bytes.
fn holder() -> Running {
    let hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    hold
}

/// Lets it allocate once more.
fn go(hold: &mut Running, times: usize) {
    hold.send("go");
    eventually(|| (hold.stdout().matches("done\n").count() == times).then_some(()));
}

fn has_objects(profile: &Profile, objects: u64) -> bool {
    profile.process().totals().alloc_objects == objects
}

/// Check that the profile follows the process, and is still there when the
/// process has exited.
#[test]
fn profile_over_http() {
    let dir = TempDir::new("daemon");
    let mut hold = holder();
    let pid = hold.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    assert_eq!(daemon.profile(pid).process().totals(), Totals::default());
    for times in 1..=3 {
        go(&mut hold, times);
        let objects = 10 * times as u64;
        let profile = daemon.profile_when(pid, |profile| has_objects(profile, objects));
        let process = profile.process();
        assert_eq!((process.pid, process.exited), (pid, false));
        assert_eq!(
            process.leaf_totals("hold_here"),
            Totals::of(objects, objects, 100)
        );
    }
    hold.close_stdin();
    hold.finish().expect_code(0);
    let profile = daemon.profile_when(pid, |profile| profile.process().exited);
    assert_eq!(
        profile.process().leaf_totals("hold_here"),
        Totals::of(30, 30, 100)
    );
    daemon.stop();
}

/// Check what the other paths answer.
#[test]
fn paths() {
    let dir = TempDir::new("daemon");
    let hold = holder();
    let pid = hold.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);

    assert_eq!(daemon.get("/healthz").status, 200);

    let processes = daemon.get("/v1/processes");
    assert_eq!(processes.status, 200);
    let processes = processes.json();
    let processes = processes.as_array().expect("an array");
    assert_eq!(processes.len(), 1, "{processes:#?}");
    assert_eq!(processes[0]["pid"], pid);
    let comm = processes[0]["comm"].as_str().expect("a comm");
    assert!(comm.starts_with("hold-"), "{comm}");
    let exe = processes[0]["exe"].as_str().expect("an exe");
    assert!(exe.contains("/hold-"), "{exe}");
    assert!(processes[0]["state"].is_string());

    let stats = daemon.get("/v1/stats");
    assert_eq!(stats.status, 200);
    let stats = stats.json();
    assert_eq!(stats["processes"][0]["pid"], pid);
    assert!(
        stats["processes"][0]["sites"].as_u64() > Some(0),
        "{stats:#}"
    );
    assert_eq!(stats["undecodable_events"], 0);
    daemon.stop();
}

/// Check that each format can be asked for.
#[test]
fn formats() {
    let dir = TempDir::new("daemon");
    let mut hold = holder();
    let pid = hold.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    go(&mut hold, 1);
    let _ = daemon.profile_when(pid, |profile| has_objects(profile, 10));

    let get = |format: &str| {
        let response = daemon.get(&format!("/v1/profile?pid={pid}&format={format}"));
        assert_eq!(response.status, 200, "{format}");
        response
    };
    let json = get("json");
    assert!(
        json.header("content-type")
            .is_some_and(|kind| kind.starts_with("application/json"))
    );
    assert!(has_objects(&Profile::parse(&json.body), 10));
    for format in ["folded", "text"] {
        let body = String::from_utf8(get(format).body).expect("text");
        assert!(body.contains("hold_here"), "{format}: {body}");
    }
    let file = dir.file("profile.pb.gz");
    fs::write(&file, get("pprof").body).expect("writing the profile");
    let lines = pprof::top(&dir, &file, "inuse_space");
    let line = lines.iter().find(|line| line.function == "hold_here");
    assert_eq!(line.expect("the function").flat, 1000);
    daemon.stop();
}

/// Check that bad requests get 400 and unknown things 404, as JSON, and that the
/// daemon serves on.
#[test]
fn bad_requests() {
    let dir = TempDir::new("daemon");
    let hold = holder();
    let pid = hold.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    for (path, status) in [
        ("/", 404),
        ("/v1/nothing", 404),
        ("/v1/profile?pid=1", 404),
        ("/v1/profile?pid=none", 400),
        ("/v1/profile?pid=-1", 400),
        ("/v1/profile?pid=99999999999999999999", 400),
        (&format!("/v1/profile?pid={pid}&format=xml"), 400),
    ] {
        let response = daemon.get(path);
        assert_eq!(response.status, status, "{path}");
        let error = response.json();
        let message = error["error"].as_str().unwrap_or_default();
        assert!(!message.is_empty(), "{path}: {error}");
    }
    assert_eq!(
        http::request(Path::new(&daemon.socket), "POST", "/v1/profile").status,
        405
    );
    assert_eq!(daemon.get("/healthz").status, 200);
    daemon.stop();
}

/// Check that only root can talk to the daemon, and that its socket goes with it.
#[test]
fn socket_mode() {
    let dir = TempDir::new("daemon");
    let hold = holder();
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    let socket = daemon.socket.clone();
    let mode = fs::metadata(&socket)
        .expect("the socket")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    daemon.stop();
    assert!(!Path::new(&socket).exists(), "the socket stays behind");
}

/// Check that a second daemon does not take the socket of a live one.
#[test]
fn socket_in_use() {
    let dir = TempDir::new("daemon");
    let hold = holder();
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    let mut command = memprof(&["daemon", "--socket", &daemon.socket]);
    command.args(["-p", &hold.pid().to_string()]);
    let second = Running::spawn(&mut command).finish();
    second.expect_code(1).expect_stderr(&[&daemon.socket]);
    assert_eq!(
        daemon.get("/healthz").status,
        200,
        "the first one serves on"
    );
    daemon.stop();
}

/// Check that a socket that nobody listens on is replaced, and that another file
/// in its place is not.
#[test]
fn stale_socket() {
    let dir = TempDir::new("daemon");
    let hold = holder();
    let socket = dir.file("memprof.sock");
    drop(UnixListener::bind(&socket).expect("a socket"));
    assert!(Path::new(&socket).exists());
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    assert_eq!(daemon.get("/healthz").status, 200);
    daemon.stop();

    let file = dir.file("a-file");
    fs::write(&file, "precious").expect("a file");
    let mut command = memprof(&["daemon", "--socket", &file]);
    command.args(["-p", &hold.pid().to_string()]);
    Running::spawn(&mut command).finish().expect_code(1);
    assert_eq!(fs::read_to_string(&file).expect("the file"), "precious");
}

/// Check that `memprof dump` hands on what the daemon says, in each format, to
/// stdout and to files.
#[test]
fn dump() {
    let dir = TempDir::new("daemon");
    let mut hold = holder();
    let pid = hold.pid();
    let daemon = Daemon::start(&dir, &[pid], &[]);
    go(&mut hold, 1);
    let _ = daemon.profile_when(pid, |profile| has_objects(profile, 10));
    let socket = daemon.socket.clone();
    let dump = |options: &[&str]| {
        let mut command = memprof(&["dump", "--socket", &socket]);
        Running::spawn(command.args(options)).finish()
    };

    let json = dump(&["-p", &pid.to_string(), "-f", "json", "-o", "-"]);
    json.expect_code(0);
    assert!(has_objects(&Profile::parse(&json.stdout_bytes), 10));

    let file = dir.file("dump.json");
    dump(&["-o", &file]).expect_code(0);
    assert!(has_objects(&Profile::read(&file), 10));

    let file = dir.file("dump.pb.gz");
    dump(&["-o", &file]).expect_code(0);
    assert!(
        fs::read(&file)
            .expect("the dump")
            .starts_with(&[0x1f, 0x8b])
    );

    let text = dump(&["-f", "text"]);
    text.expect_code(0);
    assert!(text.stdout.contains("hold_here"), "{text}");

    dump(&["-p", "1"]).expect_code(1);
    dump(&["-o", &dir.file("no-directory/dump.json")]).expect_code(1);
    daemon.stop();
    dump(&[]).expect_code(1).expect_stderr(&["memprof.sock"]);
}

/// Check that two daemons on one process are both right, also when one of them
/// goes; and that the prefilter keeps others away until it is gone.
#[test]
fn two_daemons() {
    let dir = TempDir::new("daemon");
    let mut hold = holder();
    let pid = hold.pid();
    let first = Daemon::start_on(&dir.file("first.sock"), &[pid], &[]);
    if is_prefilter() {
        // Neither a second prefilter nor uprobes can go beside the first.
        for engine in ["prefilter", "auto", "uprobe"] {
            let socket = dir.file("second.sock");
            let pid = pid.to_string();
            let options = ["daemon", "--socket", &socket, "--probe", engine, "-p", &pid];
            Running::spawn(&mut memprof::memprof(&options))
                .finish()
                .expect_code(1)
                .expect_stderr(&["is traced by another memprof, by its prefilter"]);
        }
        go(&mut hold, 1);
        let profile = first.profile_when(pid, |profile| has_objects(profile, 10));
        assert_eq!(
            profile.process().leaf_totals("hold_here"),
            Totals::of(10, 10, 100)
        );
        first.stop();
        let second = Daemon::start_on(&dir.file("second.sock"), &[pid], &[]);
        go(&mut hold, 2);
        let profile = second.profile_when(pid, |profile| has_objects(profile, 10));
        assert_eq!(
            profile.process().leaf_totals("hold_here"),
            Totals::of(10, 10, 100)
        );
        second.stop();
        return;
    }
    let second = Daemon::start_on(&dir.file("second.sock"), &[pid], &[]);
    go(&mut hold, 1);
    for daemon in [&first, &second] {
        let profile = daemon.profile_when(pid, |profile| has_objects(profile, 10));
        assert_eq!(
            profile.process().leaf_totals("hold_here"),
            Totals::of(10, 10, 100)
        );
    }
    first.stop();
    go(&mut hold, 2);
    let profile = second.profile_when(pid, |profile| has_objects(profile, 20));
    assert_eq!(
        profile.process().leaf_totals("hold_here"),
        Totals::of(20, 20, 100)
    );
    second.stop();
    assert!(hold.is_running());
}

/// Check that one daemon keeps several processes apart.
#[test]
fn several_processes() {
    let dir = TempDir::new("daemon");
    let (mut one, mut other) = (holder(), holder());
    let daemon = Daemon::start(&dir, &[one.pid(), other.pid()], &[]);
    go(&mut one, 1);
    go(&mut other, 1);
    go(&mut other, 2);
    let profile = daemon.profile_when(other.pid(), |profile| has_objects(profile, 20));
    assert_eq!(profile.process().pid, other.pid());
    let profile = daemon.profile_when(one.pid(), |profile| has_objects(profile, 10));
    assert_eq!(profile.process().pid, one.pid());
    let both = Profile::parse(&daemon.get("/v1/profile").body);
    assert_eq!(both.processes.len(), 2);
    daemon.stop();
}

/// Check that SIGINT ends the daemon too, and twice is safe.
#[test]
fn interrupted_twice() {
    let dir = TempDir::new("daemon");
    let mut hold = holder();
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    daemon.running.signal(Signal::SIGINT);
    daemon.running.signal(Signal::SIGINT);
    daemon.running.finish().expect_code(0);
    go(&mut hold, 1);
}
