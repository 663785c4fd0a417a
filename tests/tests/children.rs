//! `--children`: the children of processes that are named.

use std::{fs, path::Path};

use memprof_tests::{
    Daemon, LIMIT, Process, Profile, Running, TempDir, Totals,
    daemon::eventually,
    engine::is_prefilter,
    hold::maps,
    http, memprof,
    nursery::{Nursery, is_alive, order},
    target,
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Short children at a time.
const SHORT_ONES: u64 = 100;

fn follow(dir: &TempDir, nursery: &Nursery) -> Daemon {
    let daemon = Daemon::start(dir, &[nursery.pid()], &["--children"]);
    daemon
        .running
        .wait_stderr(|line| line.starts_with("memprof: recording children too"));
    daemon
}

fn summary(daemon: &Daemon, pid: u32) -> Option<Value> {
    let processes = daemon.get("/v1/processes").json();
    let mut processes = processes.as_array().expect("a list").iter();
    processes.find(|process| process["pid"] == pid).cloned()
}

/// Waits until the calls of a child's present program are looked at.
fn wait_until_traced(daemon: &Daemon, pid: u32) {
    eventually(|| {
        let process = summary(daemon, pid)?;
        // The prefilter is in the next program after a moment.
        (process["engine"] != "prefilter" || process["image_bytes"].as_u64()? > 0).then_some(())
    });
}

fn images(daemon: &Daemon, pid: u32) -> Vec<Process> {
    daemon.profile(pid).processes
}

fn image(daemon: &Daemon, pid: u32) -> Process {
    let mut images = images(daemon, pid);
    assert_eq!(images.len(), 1, "{images:?}");
    images.remove(0)
}

/// Check that so many rounds of work are all that a program is told to have done.
fn check_rounds(process: &Process, rounds: u64) {
    let (calls, bytes) = (10 * rounds, 1000 * rounds);
    let exact = process.exact();
    assert_eq!(
        (exact.alloc_calls, exact.alloc_bytes, exact.free_calls),
        (calls, bytes, 0),
        "{process:?}"
    );
    assert_eq!(
        process.leaf_totals("work_here"),
        Totals::of(calls, calls, 100)
    );
}

fn children(daemon: &Daemon) -> Value {
    let stats = daemon.stats();
    assert_eq!(stats["follows_children"], true);
    stats["children"].clone()
}

fn send(daemon: &Daemon, method: &str, path: &str, body: &str) -> http::Response {
    http::request_with(Path::new(&daemon.socket), method, path, body)
}

/// Check that a forked child has books of its own, which are exact from the moment on at which
/// it is traced, and what it has from its parent beside them; the same of its child; and that
/// nothing stays in any of them.
#[test]
fn forked() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let daemon = follow(&dir, &nursery);
    nursery.work(nursery.pid());
    let child = nursery.child(nursery.pid(), order::FORK);
    wait_until_traced(&daemon, child);
    nursery.work(child);
    nursery.work(child);
    let grandchild = nursery.child(child, order::FORK);
    wait_until_traced(&daemon, grandchild);
    nursery.work(grandchild);

    let of_parent = image(&daemon, nursery.pid());
    check_rounds(&of_parent, 1);
    assert_eq!((of_parent.inherited, of_parent.child_of), (None, None));
    for (pid, parent, rounds, held) in [(child, nursery.pid(), 2, 10), (grandchild, child, 1, 20)] {
        let process = image(&daemon, pid);
        check_rounds(&process, rounds);
        let of = process.child_of.expect("it is a child");
        assert_eq!(of.parent_pid, parent);
        assert!(
            of.untraced_s.is_some_and(|late| late > 0.0 && late < 60.0),
            "{of:?}"
        );
        let inherited = process.inherited.expect("it is a copy");
        assert_eq!(
            (inherited.parent_pid, inherited.objects, inherited.bytes),
            (parent, held, 100 * held)
        );
        let engine = if is_prefilter() {
            "prefilter"
        } else {
            "uprobe"
        };
        assert_eq!(process.engine, engine, "{:?}", process.engine_reason);
        assert_eq!(summary(&daemon, pid).expect("listed")["child_of"], parent);
    }

    nursery.end(grandchild);
    eventually(|| image(&daemon, grandchild).exited.then_some(()));
    check_rounds(&image(&daemon, grandchild), 1);
    let tally = children(&daemon);
    assert_eq!(tally["found"], 2, "{tally}");
    assert_eq!(
        (&tally["traced"], &tally["missed"]),
        (&2.into(), &0.into()),
        "{tally}"
    );
    daemon.stop();
    for pid in [nursery.pid(), child] {
        assert!(!maps(pid).contains("memprof-prefilter"), "{pid}");
    }
    nursery.work(child);
}

/// Check programs that children go over to: at once, by `posix_spawn`, and when they have been
/// traced already.
#[test]
fn programs() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let daemon = follow(&dir, &nursery);
    for order in [order::FORK_TO_EXEC, order::SPAWN] {
        let child = nursery.program(nursery.pid(), order);
        wait_until_traced(&daemon, child);
        nursery.work(child);
        let images = images(&daemon, child);
        let last = images.last().expect("an image");
        check_rounds(last, 1);
        assert!(last.exe.contains("nursery"), "{last:?}");
        assert_eq!(last.inherited, None, "it is no copy");
        assert_eq!(last.child_of.map(|of| of.parent_pid), Some(nursery.pid()));
        nursery.end(child);
    }

    let child = nursery.child(nursery.pid(), order::FORK);
    wait_until_traced(&daemon, child);
    nursery.work(child);
    nursery.tell(child, order::BECOME_ANEW, &format!("ready {child}"));
    eventually(|| (images(&daemon, child).len() == 2).then_some(()));
    wait_until_traced(&daemon, child);
    nursery.work(child);
    let images = images(&daemon, child);
    let [first, second] = images.as_slice() else {
        panic!("{images:?}");
    };
    assert!(first.exited && !second.exited);
    check_rounds(first, 1);
    check_rounds(second, 1);
    assert_eq!(second.inherited, None);
    daemon.stop();
}

/// Check that the children that there are at the start are traced, and theirs, and that of
/// those that come later nothing is missed.
#[test]
fn there_before() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let child = nursery.child(nursery.pid(), order::FORK);
    let grandchild = nursery.program(child, order::FORK_TO_EXEC);
    let daemon = follow(&dir, &nursery);
    assert!(
        daemon
            .running
            .stderr()
            .contains("recording children too, 2 by now")
    );
    for (pid, parent) in [(child, nursery.pid()), (grandchild, child)] {
        nursery.work(pid);
        let process = image(&daemon, pid);
        check_rounds(&process, 1);
        let of = process.child_of.expect("it is a child");
        assert_eq!((of.parent_pid, of.untraced_s), (parent, None));
        assert_eq!(
            process.inherited, None,
            "what it has from untraced times is not known"
        );
    }
    let later = nursery.child(grandchild, order::FORK);
    wait_until_traced(&daemon, later);
    nursery.work(later);
    check_rounds(&image(&daemon, later), 1);
    daemon.stop();
}

/// Check that a child is followed whose parent has ended before it could be traced, as daemons
/// and shells do.
#[test]
fn parent_is_gone() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let daemon = follow(&dir, &nursery);
    for _ in 0..5 {
        let child = nursery.child(nursery.pid(), order::FORK_TWICE);
        wait_until_traced(&daemon, child);
        nursery.work(child);
        check_rounds(&image(&daemon, child), 1);
        nursery.end(child);
    }
    let tally = eventually(|| {
        let tally = children(&daemon);
        (tally["traced"].as_u64()? + tally["missed"].as_u64()? == 10).then_some(tally)
    });
    assert_eq!(tally["found"], 10, "{tally}");
    daemon.stop();
}

/// Check a server that forks its workers before there is work, and again when it is told to.
#[test]
fn workers() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let daemon = follow(&dir, &nursery);
    nursery.work(nursery.pid());
    for generation in 0..2 {
        let workers: Vec<u32> = (0..8)
            .map(|_| nursery.child(nursery.pid(), order::FORK))
            .collect();
        for &worker in &workers {
            wait_until_traced(&daemon, worker);
        }
        for (rounds, &worker) in workers.iter().enumerate() {
            for _ in 0..rounds {
                nursery.work(worker);
            }
        }
        for (rounds, &worker) in workers.iter().enumerate() {
            let process = image(&daemon, worker);
            let exact = process.exact();
            assert_eq!(exact.alloc_calls, 10 * rounds as u64, "{process:?}");
            assert_eq!(process.inherited.expect("a copy").objects, 10);
        }
        for &worker in &workers {
            nursery.end(worker);
        }
        let ended = 8 * (generation + 1);
        eventually(|| {
            let processes = daemon.get("/v1/processes").json();
            let processes = processes.as_array()?;
            let over = processes
                .iter()
                .filter(|process| process["state"] == "ended");
            (over.count() == ended).then_some(())
        });
    }
    check_rounds(&image(&daemon, nursery.pid()), 1);
    let tally = children(&daemon);
    assert_eq!(
        (&tally["found"], &tally["traced"]),
        (&16.into(), &16.into()),
        "{tally}"
    );
    daemon.stop();
}

/// Check that of children which are over in no time none is lost without a word: each is
/// traced, or told to have been missed.
#[test]
fn short_ones() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let daemon = follow(&dir, &nursery);
    nursery.tell(nursery.pid(), order::SHORT_ONES, "short 100");
    let tally = eventually(|| {
        let tally = children(&daemon);
        (tally["traced"].as_u64()? + tally["missed"].as_u64()? == SHORT_ONES).then_some(tally)
    });
    assert_eq!(
        (&tally["found"], &tally["refused"]),
        (&SHORT_ONES.into(), &0.into()),
        "{tally}"
    );
    // It goes on, and so does what comes next.
    let child = nursery.child(nursery.pid(), order::FORK);
    wait_until_traced(&daemon, child);
    nursery.work(child);
    check_rounds(&image(&daemon, child), 1);
    let stats = daemon.stats();
    let slots = stats["free_slots"].as_u64().expect("a number");
    assert!(slots >= 1024 - 2 - SHORT_ONES, "{slots}");
    daemon.stop();
}

/// Check that a child which has its parent's memory is let be: it does no harm, and is told
/// to have been missed.
#[test]
fn shared_memory() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let daemon = follow(&dir, &nursery);
    nursery.work(nursery.pid());
    let child = nursery.child(nursery.pid(), order::SHARE_MEMORY);
    nursery.work(nursery.pid());
    assert!(!is_alive(child), "the parent goes on after it only");
    eventually(|| (children(&daemon)["missed"] == 1).then_some(()));
    assert_eq!(summary(&daemon, child), None);
    check_rounds(&image(&daemon, nursery.pid()), 2);
    let process = summary(&daemon, nursery.pid()).expect("the parent");
    assert_eq!(
        process["engine"],
        if is_prefilter() {
            "prefilter"
        } else {
            "uprobe"
        }
    );
    daemon.stop();
}

/// Check that a child in which the parent's stubs cannot be unmapped, since words on its stack
/// look like the way back to them, is traced by uprobes.
#[test]
fn stubs_that_stay() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let options = ["--children", "--probe", "auto"];
    let daemon = Daemon::start(&dir, &[nursery.pid()], &options);
    let child = nursery.child(nursery.pid(), order::FORK_WITH_WORDS);
    wait_until_traced(&daemon, child);
    nursery.work(child);
    let process = image(&daemon, child);
    check_rounds(&process, 1);
    assert_eq!(process.engine, "uprobe");
    let reason = process.engine_reason.expect("why it is no prefilter");
    assert!(reason.contains("its memory stays mapped"), "{reason}");
    assert!(maps(child).contains("memprof-prefilter"));
    // The parent's are as they were.
    nursery.work(nursery.pid());
    let of_parent = image(&daemon, nursery.pid());
    check_rounds(&of_parent, 1);
    assert_eq!(of_parent.engine, "prefilter");
    daemon.stop();
    nursery.work(child);
}

/// Check that a child which is let go is not taken on again, nor are its children, until it is
/// asked for.
#[test]
fn let_go() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let daemon = follow(&dir, &nursery);
    let child = nursery.child(nursery.pid(), order::FORK);
    wait_until_traced(&daemon, child);
    nursery.work(child);
    let left = send(&daemon, "DELETE", &format!("/v1/targets/{child}"), "");
    assert_eq!(left.status, 200, "{:?}", left.json());
    nursery.tell(child, order::BECOME_ANEW, &format!("ready {child}"));
    let of_its_own = nursery.child(child, order::FORK);
    // Something that is taken on comes after all that is not.
    let other = nursery.child(nursery.pid(), order::FORK);
    wait_until_traced(&daemon, other);
    assert_eq!(summary(&daemon, of_its_own), None);
    assert_eq!(
        summary(&daemon, child).expect("its profile")["state"],
        "detached"
    );
    nursery.work(child);
    check_rounds(&image(&daemon, child), 1);

    let asked = send(
        &daemon,
        "POST",
        "/v1/targets",
        &format!("{{\"pid\": {child}}}"),
    );
    assert_eq!(asked.status, 201, "{:?}", asked.json());
    // Its children with it.
    wait_until_traced(&daemon, of_its_own);
    let next = nursery.child(child, order::FORK);
    wait_until_traced(&daemon, next);
    nursery.work(next);
    check_rounds(&image(&daemon, next), 1);
    daemon.stop();
}

/// Check that a recording goes on until the last child has ended, has an entry for each, and
/// tells of those that it has not traced.
#[test]
fn recorded() {
    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let before = nursery.child(nursery.pid(), order::FORK);
    let file = dir.file("profile.json");
    let pid = nursery.pid().to_string();
    let arguments = ["record", "-p", &pid, "--children", "-i", "1", "-o", &file];
    let record = Running::spawn(&mut memprof(&arguments));
    record.wait_stderr(|line| line == "memprof: recording children too, 1 by now");
    // It does not answer; but one that waits that long is traced.
    let later = nursery.child(nursery.pid(), order::FORK_TWICE);
    std::thread::sleep(LIMIT / 30);
    for pid in [nursery.pid(), before, later] {
        nursery.work(pid);
    }
    nursery.end(before);
    nursery.end(nursery.pid());
    nursery.work(later);
    nursery.end(later);
    let record = record.finish();
    record.expect_code(0);
    assert!(
        record
            .stderr
            .contains("1 of 3 children were not traced: 1 ended before"),
        "{}",
        record.stderr
    );
    let profile = Profile::read(&file);
    let process = |pid: u32| {
        let mut its = profile
            .processes
            .iter()
            .filter(|process| process.pid == pid);
        let process = its.next().expect("an entry");
        assert!(its.next().is_none() && process.exited);
        process
    };
    check_rounds(process(nursery.pid()), 1);
    check_rounds(process(before), 1);
    check_rounds(process(later), 2);
    assert_eq!(profile.processes.len(), 3);
}

/// Check that a command's children are traced with it.
#[test]
fn of_a_command() {
    let dir = TempDir::new("children");
    let file = dir.file("profile.json");
    let hold = target("hold.c");
    // The shell waits for it.
    let script = format!("{} 10 100; true", hold.text());
    let arguments = [
        "record",
        "--children",
        "-i",
        "1",
        "-o",
        &file,
        "--",
        "/bin/sh",
        "-c",
        &script,
    ];
    let mut record = Running::spawn(&mut memprof(&arguments));
    record.wait_stdout(|line| line == "ready");
    std::thread::sleep(LIMIT / 30);
    record.send("go");
    record.wait_stdout(|line| line == "done");
    record.close_stdin();
    record.finish().expect_code(0);
    let profile = Profile::read(&file);
    let of_hold = profile
        .processes
        .iter()
        .find(|process| process.comm.starts_with("hold"))
        .expect("the command's child");
    assert_eq!(of_hold.leaf_totals("hold_here"), Totals::of(10, 10, 100));
    assert!(profile.processes.iter().any(|process| process.comm == "sh"));
    assert!(of_hold.child_of.is_some());
}

/// Check that the option is refused beside `-a`, and that a file and the environment can have
/// it.
#[test]
fn option() {
    let refused = Running::spawn(&mut memprof(&["record", "-a", "--children"])).finish();
    refused
        .expect_code(2)
        .expect_stderr(&["cannot be used with"]);

    let dir = TempDir::new("children");
    let nursery = Nursery::start();
    let file = dir.file("memprof.toml");
    fs::write(&file, format!("pid = {}\nchildren = true\n", nursery.pid())).expect("a file");
    let socket = dir.file("memprof.sock");
    let daemon = Daemon::start_on(&socket, &[], &["--config", &file]);
    assert_eq!(daemon.stats()["follows_children"], true);
    daemon.stop();

    for (value, follows) in [("1", true), ("0", false)] {
        let pids = [nursery.pid()];
        let environment = [("MEMPROF_CHILDREN", value)];
        let daemon = Daemon::start_with(&socket, &pids, &[], &environment);
        assert_eq!(daemon.stats()["follows_children"], follows);
        assert_eq!(daemon.stats()["children"]["found"], 0);
        daemon.stop();
    }
    nursery.running.signal(Signal::SIGTERM);
}
