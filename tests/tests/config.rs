//! Changing the interval of a running daemon.

use std::path::Path;

use memprof_tests::{
    Daemon, Profile, Running, TempDir, Totals, daemon::eventually, http, memprof, target,
};

const COUNT: u64 = 2000;
const SIZE: u64 = 20_000;

fn put(daemon: &Daemon, body: &str) -> http::Response {
    http::request_with(Path::new(&daemon.socket), "PUT", "/v1/config", body)
}

fn leaf(profile: &Profile, function: &str) -> Totals {
    profile.process().leaf_totals(function)
}

/// Check that blocks keep the weight that they were sampled with when the
/// interval changes: what was sampled at 512 KiB and freed at 1 leaves nothing,
/// exactly; and what is allocated at 1 is counted exactly.
#[test]
fn old_blocks_keep_their_weight() {
    let dir = TempDir::new("config");
    let args = [COUNT.to_string(), SIZE.to_string()];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut target = Running::spawn(&mut target("generations.c").command(&args));
    target.wait_stdout(|line| line == "ready");
    let pid = target.pid();
    let daemon = Daemon::start(&dir, &[pid], &["-i", "512KiB"]);
    let mut go = |times: usize| {
        target.send("go");
        eventually(|| (target.stdout().matches("done\n").count() == times).then_some(()));
    };

    go(1);
    let before = daemon.profile(pid);
    assert_eq!(before.sample_interval_bytes, 512 << 10);
    let old = before.process().only_stack("old_here");
    assert_eq!(old.inuse_bytes, old.alloc_bytes);
    assert!(old.samples < COUNT / 4, "{old:?}");
    let [low, high] = old.inuse_bytes_ci95;
    assert!(low < old.inuse_bytes && old.inuse_bytes < high, "{old:?}");

    let answer = put(&daemon, r#"{"sample_interval": "1"}"#);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["sample_interval_bytes"], 1);
    go(2);
    let between = daemon.profile_when(pid, |profile| {
        leaf(profile, "new_here").alloc_objects == COUNT
    });
    assert_eq!(between.sample_interval_bytes, 1);
    assert_eq!(leaf(&between, "old_here"), old.totals());
    let new = between.process().only_stack("new_here");
    assert_eq!(new.totals(), Totals::of(COUNT, COUNT, SIZE));
    assert_eq!(new.samples, COUNT);
    assert_eq!(new.inuse_bytes_ci95, [COUNT * SIZE; 2]);

    go(3);
    let after = daemon.profile_when(pid, |profile| leaf(profile, "old_here").inuse_bytes == 0);
    let freed = after.process().only_stack("old_here");
    assert_eq!((freed.inuse_objects, freed.inuse_bytes), (0, 0));
    assert_eq!(freed.alloc_bytes, old.alloc_bytes);
    assert_eq!(leaf(&after, "new_here"), Totals::of(COUNT, COUNT, SIZE));
    // The totals went on through all of it.
    let exact = after.process().exact();
    assert_eq!(
        (exact.alloc_calls, exact.alloc_bytes, exact.free_calls),
        (2 * COUNT, 2 * COUNT * SIZE, COUNT)
    );
    daemon.stop();
}

/// Check that sampling can be switched off and on again, by command: by the interval, and by a
/// pause; a program that is attached to in a pause is not sampled either.
#[test]
fn by_command() {
    let dir = TempDir::new("config");
    let mut hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    let pid = hold.pid();
    let daemon = Daemon::start(&dir, &[pid], &["-i", "64KiB"]);
    let config = |args: &[&str]| {
        let mut command = memprof(&["config", "--socket", &daemon.socket]);
        Running::spawn(command.args(args)).finish()
    };
    let shown = config(&[]);
    shown.expect_code(0);
    assert_eq!(shown.stdout, "sample interval  65536 bytes (64 KiB)\n");
    let mut done = 0;
    for (interval, objects) in [("0", 0), ("1", 10), ("0", 10), ("1", 20)] {
        config(&["-i", interval]).expect_code(0);
        assert_eq!(
            daemon.get("/v1/stats").json()["sample_interval_bytes"].to_string(),
            interval
        );
        hold.send("go");
        done += 1;
        eventually(|| (hold.stdout().matches("done\n").count() == done).then_some(()));
        let profile = daemon.profile(pid);
        assert_eq!(profile.process().totals().alloc_objects, objects);
        assert_eq!(profile.process().exact().alloc_calls, 10 * done as u64);
    }
    // One that is attached to in a pause.
    let mut late = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    late.wait_stdout(|line| line == "ready");
    // At another interval meanwhile, which counts when sampling goes on.
    for (args, objects) in [
        (&["--pause"][..], 20),
        (&["-i", "1"], 20),
        (&["--resume"], 30),
    ] {
        let shown = config(args);
        shown.expect_code(0);
        let is_paused = objects == 20;
        assert_eq!(shown.stdout.contains("nothing is sampled"), is_paused);
        assert_eq!(daemon.get("/v1/config").json()["paused"], is_paused);
        if done == 4 {
            let body = format!(r#"{{"pid": {}}}"#, late.pid());
            let socket = Path::new(&daemon.socket);
            let answer = http::request_with(socket, "POST", "/v1/targets", &body);
            assert_eq!(answer.status, 201);
        }
        done += 1;
        for (target, before) in [(&mut hold, 20), (&mut late, 0)] {
            let count = target.stdout().matches("done\n").count() + 1;
            target.send("go");
            eventually(|| (target.stdout().matches("done\n").count() == count).then_some(()));
            let profile = daemon.profile(target.pid());
            let sampled = before + objects - 20;
            assert_eq!(profile.process().totals().alloc_objects, sampled);
            assert_eq!(profile.process().exact().alloc_calls, 10 * count as u64);
        }
    }
    late.close_stdin();
    late.finish().expect_code(0);
    for wrong in [&["-i", "5GiB"][..], &["--pause", "--resume"]] {
        config(wrong).expect_code(2);
    }
    daemon.stop();
}

/// Check that a body that makes no sense is refused in words and changes nothing.
#[test]
fn bad_bodies() {
    let dir = TempDir::new("config");
    let hold = Running::spawn(&mut target("hold.c").command(&[]));
    hold.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[hold.pid()], &["-i", "64KiB"]);
    for body in [
        "",
        "{}",
        "1",
        r#"{"sample_interval": "often"}"#,
        r#"{"sample_interval_bytes": 4294967296}"#,
        r#"{"sample_interval": "1", "stack_depth": 3}"#,
        r#"{"paused": "yes"}"#,
    ] {
        let answer = put(&daemon, body);
        assert_eq!(answer.status, 400, "{body}");
        let error = answer.json();
        assert!(
            error["error"]
                .as_str()
                .is_some_and(|error| !error.is_empty())
        );
    }
    let config = daemon.get("/v1/config");
    assert_eq!(config.status, 200);
    assert_eq!(config.json()["sample_interval_bytes"], 65_536);
    assert_eq!(
        http::request(Path::new(&daemon.socket), "DELETE", "/v1/config").status,
        405
    );
    let answer = put(&daemon, r#"{"sample_interval_bytes": 4096}"#);
    assert_eq!(answer.json()["sample_interval_bytes"], 4096);
    // As it is shown, it can be sent back.
    let shown = daemon.get("/v1/config").json();
    assert_eq!(put(&daemon, &shown.to_string()).json(), shown);
    daemon.stop();
}
