//! `-a`: every process that maps a known allocator.
//!
//! Processes are told by their exact totals and by blocks so large that each is sampled:
//! everything else that runs on the host is traced, too.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use memprof_tests::{
    Daemon, Process, Profile, Running, TempDir, Totals,
    container::{Container, User},
    daemon::eventually,
    http, memprof, target,
    targets::shared_library,
};
use serde_json::Value;

/// Mean bytes between samples ...
const INTERVAL: &str = "64KiB";
/// ... and blocks of which each is sampled, but for one in 10^13.
const LARGE: u64 = 2 << 20;

/// One daemon for all at a time: each traces the others' targets.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn everyone(dir: &TempDir, options: &[&str]) -> Daemon {
    let mut all = vec!["-a", "-i", INTERVAL];
    if !options.contains(&"--probe") {
        all.extend(["--probe", "uprobe"]);
    }
    all.extend(options);
    Daemon::start(dir, &[], &all)
}

/// `hold.c` with blocks that are all sampled.
fn large() -> Running {
    let running = Running::spawn(&mut target("hold.c").command(&["10", &LARGE.to_string()]));
    running.wait_stdout(|line| line == "ready");
    running
}

fn go(running: &mut Running, times: usize) {
    running.send("go");
    eventually(|| (running.stdout().matches("done\n").count() == times).then_some(()));
}

fn processes(daemon: &Daemon) -> Vec<Value> {
    let processes = daemon.get("/v1/processes").json();
    processes.as_array().expect("a list").clone()
}

/// The images of a process; none if it has not turned up.
fn images(daemon: &Daemon, pid: u32) -> Vec<Process> {
    let response = daemon.get(&format!("/v1/profile?pid={pid}"));
    match response.status {
        200 => Profile::parse(&response.body).processes,
        404 => Vec::new(),
        status => panic!("{status}"),
    }
}

#[track_caller]
fn check_calls(process: &Process, calls: u64, bytes: u64) {
    let exact = process.exact();
    assert_eq!(
        (exact.alloc_calls, exact.alloc_bytes),
        (calls, bytes),
        "{process:?}"
    );
    assert_eq!(process.engine, "uprobe");
    for cause in ["alloc_unreported", "live_map_full", "in_flight_full"] {
        assert_eq!(process.loss(cause), 0, "{cause}: {:?}", process.losses);
    }
}

/// Waits until a file is probed.
fn wait_for_sites(daemon: &Daemon, module: &str) {
    eventually(|| {
        let profile = daemon.get("/v1/profile").json();
        let sites = profile["probe"]["sites"].as_array()?;
        sites
            .iter()
            .any(|site| site["module"] == module)
            .then_some(())
    });
}

/// Waits until the last image's stack has its name: a process that turned up a moment ago is
/// still being read.
fn wait_for_names(daemon: &Daemon, pid: u32) {
    eventually(|| {
        let images = images(daemon, pid);
        let leaf = images.last()?.stacks.first()?.frames.first()?;
        leaf.is("hold_here").then_some(())
    });
}

/// Checks a process that has held ten large blocks `rounds` times.
#[track_caller]
fn check_large(daemon: &Daemon, pid: u32, rounds: u64) {
    wait_for_names(daemon, pid);
    let images = images(daemon, pid);
    let [process] = images.as_slice() else {
        panic!("{images:?}");
    };
    check_calls(process, 10 * rounds, 10 * rounds * LARGE);
    let here = process.leaf_totals("hold_here");
    assert_eq!(
        here,
        Totals::of(10 * rounds, 10 * rounds, LARGE),
        "{process:?}"
    );
    assert_eq!(process.totals(), here);
    assert!(process.exe.contains("hold"), "{process:?}");
    assert_eq!(process.comm.get(..4), Some("hold"));
}

/// Check that processes from before the daemon and from after its start are traced, each by
/// itself and once; that memprof's own is not; and that nothing is left in any of them.
#[track_caller]
fn before_and_after(mode: &str) {
    let _alone = alone();
    let dir = TempDir::new("system");
    let mut before = large();
    let daemon = everyone(&dir, &["--probe", mode]);
    let mut after = large();
    go(&mut before, 1);
    go(&mut after, 1);
    check_large(&daemon, before.pid(), 1);
    check_large(&daemon, after.pid(), 1);
    go(&mut after, 2);
    check_large(&daemon, after.pid(), 2);
    let stats = daemon.stats();
    assert_eq!(stats["traces_all"], true);
    assert_eq!(stats["unclaimed_calls"], 0, "{stats}");
    let own = daemon.running.pid();
    for process in processes(&daemon) {
        assert_ne!(process["pid"], own, "{process}");
        assert_eq!(process["engine"], "uprobe");
    }
    daemon.stop();
    for mut process in [before, after] {
        let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid())).expect("maps");
        assert!(!maps.contains("memprof-prefilter"), "{maps}");
        process.close_stdin();
        process.finish().expect_code(0);
    }
}

/// See [`before_and_after`].
#[test]
fn by_sessions() {
    before_and_after("session");
}

/// See [`before_and_after`].
#[test]
fn by_multi_links() {
    before_and_after("multi");
}

/// See [`before_and_after`].
#[test]
fn by_perf_events() {
    before_and_after("perf");
}

/// Check that a program that replaces another has books of its own, and that the first one's
/// are closed.
#[test]
fn exec() {
    let _alone = alone();
    let dir = TempDir::new("system");
    let daemon = everyone(&dir, &[]);
    let hold = target("hold.c");
    for source in ["exec.c", "exec_thread.c"] {
        let large = LARGE.to_string();
        let mut running = Running::spawn(&mut target(source).command(&[hold.text(), "3", &large]));
        running.send("go");
        running.wait_stdout(|line| line == "ready");
        go(&mut running, 1);
        wait_for_names(&daemon, running.pid());
        let images = images(&daemon, running.pid());
        let [first, second] = images.as_slice() else {
            panic!("{source}: {images:?}");
        };
        assert!(first.exited && !second.exited);
        assert!(first.comm.starts_with("exec"), "{first:?}");
        assert!(second.comm.starts_with("hold"), "{second:?}");
        assert!(second.exe.contains("hold"), "{second:?}");
        check_calls(second, 3, 3 * LARGE);
        assert_eq!(second.leaf_totals("hold_here"), Totals::of(3, 3, LARGE));
        running.close_stdin();
        running.finish().expect_code(0);
    }
    daemon.stop();
}

/// Check that programs that were replaced are forgotten like processes that have ended, that
/// what they have counted stays in their process's sums, and that the last is traced on.
#[test]
fn replaced_programs_are_forgotten() {
    let _alone = alone();
    let dir = TempDir::new("system");
    let daemon = everyone(&dir, &["--keep-exited", "3"]);
    let (exec, hold, large) = (target("exec.c"), target("hold.c"), LARGE.to_string());
    let mut running = Running::spawn(&mut exec.command(&[exec.text(), hold.text(), "3", &large]));
    for ready in 1..=3 {
        eventually(|| (running.stdout().matches("ready\n").count() == ready).then_some(()));
        running.send("go");
    }
    running.wait_stdout(|line| line == "done");
    let pid = running.pid();
    let number = |value: &Value| value.as_f64().expect("a number");
    let process = eventually(|| {
        let stats = daemon.stats();
        let listed = stats["processes"].as_array()?;
        let process = listed.iter().find(|process| process["pid"] == pid)?;
        let images = process["images"].as_array()?;
        (images.len() == 1 && images[0]["epoch"] == 2).then(|| process.clone())
    });
    // Each program before has asked for five blocks of 111 bytes.
    let bytes = number(&process["alloc_bytes_per_s"]) * number(&process["traced_s"]);
    assert_eq!(
        bytes.round(),
        (2 * 5 * 111 + 3 * LARGE) as f64,
        "{process:#}"
    );
    go(&mut running, 2);
    check_calls(&images(&daemon, pid)[0], 6, 6 * LARGE);
    running.close_stdin();
    running.finish().expect_code(0);
    daemon.stop();
}

/// Check that a forked child has books of its own: its parent's blocks are not in them, and
/// its own are not in its parent's.
#[test]
fn fork() {
    let _alone = alone();
    let dir = TempDir::new("system");
    let daemon = everyone(&dir, &[]);
    let mut parent = Running::spawn(&mut target("forks.c").command(&[]));
    parent.send("go");
    let line = parent.wait_stdout(|line| line.starts_with("child "));
    let child: u32 = line["child ".len()..].parse().expect("a pid");
    let exact = |pid| match images(&daemon, pid).as_slice() {
        [process] => process.exact(),
        images => panic!("{images:?}"),
    };
    let (of_parent, of_child) = (exact(parent.pid()), exact(child));
    let inherited = images(&daemon, child)[0].inherited.expect("the parent's");
    assert_eq!(inherited.parent_pid, parent.pid());
    assert_eq!(images(&daemon, parent.pid())[0].inherited, None);
    // The compiler leaves out what is freed at once.
    assert_eq!(
        (
            of_child.alloc_calls,
            of_child.alloc_bytes,
            of_child.free_calls
        ),
        (1, 444, 0)
    );
    assert!(of_parent.alloc_calls < 10 && of_parent.alloc_bytes >= 333);
    parent.send_last("go");
    parent.finish().expect_code(0);
    eventually(|| images(&daemon, child).first()?.exited.then_some(()));
    let of_child = exact(child);
    assert_eq!((of_child.alloc_calls, of_child.free_calls), (2, 1));
    daemon.stop();
}

/// Check that a container that is started later, with a C library of its own, is traced.
#[test]
fn container() {
    let _alone = alone();
    let dir = TempDir::new("system");
    let daemon = everyone(&dir, &[]);
    let mut container = Container::start(&dir, User::Root);
    // The file is new to the host.
    wait_for_sites(&daemon, "/lib/ld-musl-x86_64.so.1");
    container.running.send("go");
    container.running.wait_stdout(|line| line == "done");
    let images = images(&daemon, container.pid);
    let [process] = images.as_slice() else {
        panic!("{images:?}");
    };
    check_calls(process, 10, 1000);
    assert_eq!(process.namespace_pids, [container.pid, container.inner_pid]);
    let libc = serde_json::json!(["/lib/ld-musl-x86_64.so.1"]);
    // It is being read.
    eventually(|| {
        let listed = processes(&daemon);
        let listed = listed
            .iter()
            .find(|listed| listed["pid"] == container.pid)?;
        (listed["modules"] == libc).then_some(())
    });
    container.running.close_stdin();
    daemon.stop();
}

/// Check that an allocator that a process loads while it is traced is probed.
#[test]
fn late_allocator() {
    let _alone = alone();
    let dir = TempDir::new("system");
    let daemon = everyone(&dir, &[]);
    let library = shared_library("bump.c");
    let mut late = Running::spawn(&mut target("late_allocator.c").command(&[library.text()]));
    late.wait_stdout(|line| line == "ready");
    late.send("go");
    late.wait_stdout(|line| line == "loaded");
    let name = library.text();
    let is_probed = || {
        let profile = daemon.get("/v1/profile").json();
        let sites = profile["probe"]["sites"].as_array()?;
        sites
            .iter()
            .any(|site| site["module"] == name)
            .then_some(())
    };
    eventually(is_probed);
    let before = images(&daemon, late.pid()).first().map(Process::exact);
    late.send("go");
    late.wait_stdout(|line| line == "done");
    let after = images(&daemon, late.pid())[0].exact();
    let (calls, bytes, frees) = before.map_or((0, 0, 0), |before| {
        (before.alloc_calls, before.alloc_bytes, before.free_calls)
    });
    assert_eq!(
        (
            after.alloc_calls - calls,
            after.alloc_bytes - bytes,
            after.free_calls - frees
        ),
        (20, 20 * 555, 15)
    );
    late.close_stdin();
    late.finish().expect_code(0);
    daemon.stop();
}

/// How many descriptors a process has open, maps and programs of BPF among them.
fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("its descriptors")
        .count()
}

/// Check that more processes than can be traced at a time come and go, one after the other,
/// that each of them is booked exactly however short it lives, and that nothing of them is
/// left in the daemon when they are forgotten.
#[test]
fn short_processes() {
    const BATCHES: usize = 22;
    const BATCH: usize = 50;
    let _alone = alone();
    let dir = TempDir::new("system");
    let daemon = everyone(&dir, &["--keep-exited", "8"]);
    let hold = target("hold.c");
    let input = dir.file("input");
    fs::write(&input, "\n").expect("the input");
    let run = |_| -> u32 {
        let input = fs::File::open(&input).expect("the input");
        let mut command = Command::new(hold.path());
        command.args(["10", "100"]).stdin(input);
        let mut child = command.stdout(Stdio::null()).spawn().expect("hold");
        assert!(child.wait().expect("its end").success());
        child.id()
    };
    let _warm: Vec<u32> = (0..20).map(run).collect();
    let before = descriptors(daemon.running.pid());
    // Of 1024, a few may be resting.
    let slots_before = 1000;
    let mut pids = Vec::new();
    for _ in 0..BATCHES {
        let batch: Vec<u32> = (0..BATCH).map(run).collect();
        // Without the names of the stacks of all that runs on this host.
        let (stats, listed) = (daemon.stats(), processes(&daemon));
        let stats = stats["processes"].as_array().expect("processes");
        for &pid in &batch {
            let find = |list: &[Value]| list.iter().find(|process| process["pid"] == pid).cloned();
            let (stats, listed) = (find(stats), find(&listed));
            let (stats, listed) = (stats.expect("its numbers"), listed.expect("the process"));
            let images = stats["images"].as_array().expect("images");
            assert_eq!(images.len(), 1, "{stats:#}");
            let totals = &images[0]["totals"];
            assert_eq!(
                (&totals["alloc_calls"], &totals["alloc_bytes"]),
                (&Value::from(10), &Value::from(1000)),
                "{stats:#}"
            );
            assert_eq!(listed["exe"], hold.text(), "{listed:#}");
            assert!(
                listed["comm"]
                    .as_str()
                    .is_some_and(|comm| comm.starts_with("hold"))
            );
        }
        pids.extend(batch);
    }
    let stats = daemon.stats();
    assert_eq!(stats["unclaimed_calls"], 0, "{stats}");
    eventually(|| {
        let stats = daemon.stats();
        let known = stats["processes"].as_array()?;
        let is_known = |pid: u32| known.iter().any(|process| process["pid"] == pid);
        let are_forgotten = !pids.iter().any(|&pid| is_known(pid));
        // Others run on this host, too: each has a slot, and two descriptors watch it.
        let slots = usize::try_from(stats["free_slots"].as_u64()?).ok()? + known.len();
        let open = descriptors(daemon.running.pid());
        let are_back = slots >= slots_before && open <= before + 2 * known.len() + 20;
        (are_forgotten && are_back).then_some(())
    });
    assert!(daemon.stats()["forgotten_processes"].as_u64() >= Some(pids.len() as u64));
    daemon.stop();
}

/// Check that a process that is let go is left alone until it is asked for again.
#[test]
fn let_go_and_taken_back() {
    let _alone = alone();
    let dir = TempDir::new("system");
    let daemon = everyone(&dir, &[]);
    let mut held = large();
    let pid = held.pid();
    go(&mut held, 1);
    check_large(&daemon, pid, 1);
    let path = format!("/v1/targets/{pid}");
    let body = format!("{{\"pid\": {pid}}}");
    let send = |method, path: &str, body: &str| {
        http::request_with(Path::new(&daemon.socket), method, path, body)
    };
    assert_eq!(send("POST", "/v1/targets", &body).status, 409);
    for life in 1..=3 {
        assert_eq!(send("DELETE", &path, "").status, 200);
        go(&mut held, 3 * life - 1);
        let state = daemon.get(&path).json()["state"].clone();
        assert_eq!(state, "detached");
        let attached = send("POST", "/v1/targets", &body);
        assert_eq!(attached.status, 201, "{:?}", attached.json());
        go(&mut held, 3 * life);
        check_large(&daemon, pid, 1);
        go(&mut held, 3 * life + 1);
        check_large(&daemon, pid, 2);
    }
    held.close_stdin();
    held.finish().expect_code(0);
    daemon.stop();
}

/// Check that a recording of all ends with its time, and has a process that came while it
/// ran.
#[test]
fn recording() {
    let _alone = alone();
    let dir = TempDir::new("system");
    let file = dir.file("profile.json");
    let mut command = memprof(&["record", "-a", "-i", INTERVAL, "-d", "3", "-o", &file]);
    let memprof = Running::spawn(command.args(["--probe", "uprobe"]));
    memprof.wait_stderr(|line| line.starts_with("memprof: recording all processes: "));
    let mut held = large();
    go(&mut held, 1);
    memprof.finish().expect_code(0);
    let profile = Profile::read(&file);
    let process = profile
        .processes
        .iter()
        .find(|process| process.pid == held.pid());
    let process = process.expect("the process");
    check_calls(process, 10, 10 * LARGE);
    assert_eq!(process.leaf_totals("hold_here"), Totals::of(10, 10, LARGE));
    assert!(
        profile
            .probe
            .sites
            .iter()
            .any(|site| site.function == "malloc")
    );
    held.close_stdin();
    held.finish().expect_code(0);
}

/// Check that what cannot be meant is refused, in words.
#[test]
fn refusals() {
    for (arguments, words) in [
        (&["record", "-a", "-p", "1"][..], "cannot be used with"),
        (&["record", "-a", "--", "true"], "cannot be used with"),
        (&["daemon", "-a", "-p", "1"], "cannot be used with"),
        (
            &["record", "-a", "-d", "1", "--probe", "prefilter"],
            "uprobes",
        ),
    ] {
        let finished = Running::spawn(&mut memprof(arguments)).finish();
        assert_ne!(finished.code(), 0);
        finished.expect_stderr(&[words]);
    }
}
