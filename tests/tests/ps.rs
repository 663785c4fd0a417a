//! `memprof ps`, and what clients say when no daemon answers.

use std::{os::unix::net::UnixListener, os::unix::process::CommandExt as _, process::Command};

use memprof_tests::{
    Daemon, Finished, Running, TempDir, memprof, memprof::binary, target, targets::copy_program,
};
use serde_json::Value;

fn run(args: &[&str]) -> Finished {
    Running::spawn(&mut memprof(args)).finish()
}

/// Check that each process has a line with what it holds, who holds most first, and that JSON
/// is what the daemon answers; over the socket and over TCP.
#[test]
fn lists_processes() {
    let dir = TempDir::new("ps");
    let start = |size: &str| {
        let mut hold = Running::spawn(&mut target("hold.c").command(&["10", size]));
        hold.wait_stdout(|line| line == "ready");
        hold.send("go");
        hold.wait_stdout(|line| line == "done");
        hold
    };
    let (mut small, mut large) = (start("100"), start("100000"));
    let daemon = Daemon::start(&dir, &[small.pid(), large.pid()], &["--listen", "0"]);
    for hold in [&mut small, &mut large] {
        hold.send("go");
        memprof_tests::daemon::eventually(|| {
            (hold.stdout().matches("done\n").count() == 2).then_some(())
        });
    }
    // What is on its way is not in the list, and a rate takes a moment to be one.
    memprof_tests::daemon::eventually(|| {
        let processes = daemon.get("/v1/processes").json();
        let mut all = processes.as_array()?.iter();
        let is_told =
            |process: &Value| process["samples"] == 10 && process["alloc_bytes_per_s"].is_number();
        all.all(is_told).then_some(())
    });
    let url = daemon.tcp().url();
    for from in [["--socket", &daemon.socket], ["--connect", &url]] {
        let shown = run(&[&["ps"][..], &from].concat());
        shown.expect_code(0);
        let lines: Vec<Vec<&str>> = shown
            .stdout
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines.len(), 3, "{shown}");
        assert_eq!(lines[0][0], "PID");
        for (line, (pid, inuse)) in lines[1..]
            .iter()
            .zip([(&large, ["977", "KiB"]), (&small, ["1000", "B"])])
        {
            assert_eq!(line[0], pid.pid().to_string(), "{shown}");
            assert_eq!(line[1], "tracing");
            assert_eq!(line[3], "10");
            assert_eq!(line[4..6], inuse);
        }
        let json = run(&[&["ps", "--format", "json"][..], &from].concat());
        json.expect_code(0);
        let processes: Value = serde_json::from_str(&json.stdout).expect("JSON");
        let processes = processes.as_array().expect("a list");
        assert_eq!(processes.len(), 2);
        for process in processes {
            assert_eq!(process["samples"], 10);
            assert!(process["alloc_bytes_per_s"].as_f64() > Some(0.0));
            assert!(process["attach_ms"].as_f64() > Some(0.0));
            assert_eq!(process["losses"], serde_json::json!({}));
        }
    }
    daemon.stop();
}

/// Check that each client says what to do if there is no daemon, if it is not for this user,
/// and if what answers is something else.
#[test]
fn no_daemon() {
    let dir = TempDir::new("ps");
    let socket = dir.file("memprof.sock");
    for client in ["ps", "dump", "config"] {
        run(&[client, "--socket", &socket])
            .expect_code(1)
            .expect_stderr(&["start `memprof daemon`"]);
        // A port that was free a moment ago.
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let url = format!("http://{}", free.expect("a port"));
        run(&[client, "--connect", &url])
            .expect_code(1)
            .expect_stderr(&["--listen"]);
        run(&[client, "--connect", "https://127.0.0.1:1"])
            .expect_code(2)
            .expect_stderr(&["TLS"]);
        run(&[client, "--connect", &url, "--token-file", &socket])
            .expect_code(1)
            .expect_stderr(&["cannot read"]);
    }
    let hold = Running::spawn(&mut target("hold.c").command(&[]));
    hold.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    // Root may open everything: somebody else asks.
    let copy = dir.file("memprof");
    copy_program(binary(), copy.as_ref());
    let mut command = Command::new(&copy);
    command
        .args(["ps", "--socket", &socket])
        .uid(65_534)
        .gid(65_534);
    Running::spawn(&mut command)
        .finish()
        .expect_code(1)
        .expect_stderr(&["run as root"]);
    daemon.stop();
    let deaf = UnixListener::bind(&socket).expect("a socket");
    let ask = std::thread::spawn(move || run(&["ps", "--socket", &socket]));
    drop(deaf.accept().expect("a connection"));
    ask.join()
        .expect("an answer")
        .expect_code(1)
        .expect_stderr(&["did not answer"]);
}

/// Check that `memprof dump -s` writes what happens in a window, and that clients reach a daemon
/// over TCP for all that they do over its socket.
#[test]
fn over_tcp() {
    let dir = TempDir::new("ps");
    let mut hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[hold.pid()], &["--listen", "0"]);
    let url = daemon.tcp().url();
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    let pid = hold.pid().to_string();
    let dump = |options: &[&str]| {
        let all = [
            &["dump", "--connect", &url, "-p", &pid, "-f", "json"][..],
            options,
        ]
        .concat();
        let dumped = run(&all);
        dumped.expect_code(0);
        serde_json::from_str::<Value>(&dumped.stdout).expect("JSON")
    };
    let all = dump(&[]);
    assert_eq!(all["schema"], "memprof.profile/1");
    assert_eq!(all["processes"][0]["estimates"]["alloc_objects"], 10);
    let window = dump(&["-s", "1"]);
    assert_eq!(window["schema"], "memprof.window/1");
    assert_eq!(window["processes"][0]["estimates"]["alloc_objects"], 0);
    let set = run(&["config", "--connect", &url, "-i", "4096"]);
    set.expect_code(0);
    assert_eq!(set.stdout, "sample interval  4096 bytes (4 KiB)\n");
    run(&["dump", "--connect", &url, "-p", "1"])
        .expect_code(1)
        .expect_stderr(&["process 1 is not traced"]);
    daemon.stop();
}
