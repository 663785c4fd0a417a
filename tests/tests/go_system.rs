//! Go programs where every process is traced: none of them calls an allocator, and none was asked
//! for.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use memprof_tests::{
    Daemon, Profile, Running, TempDir,
    container::{Container, User},
    daemon::eventually,
    golang::{expect_same, start, step},
    http,
    memprof::memprof,
    target,
    targets::{Target, copy_program, target_with},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// What one round of the program allocates in `churnHere`.
const ROUND: u64 = 20_000;

/// Why a program without profiling has no profile.
const REMOVED: &str = "the Go linker has taken memory profiling out of it";

/// One daemon for all at a time: each traces the others' targets.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn everyone(dir: &TempDir, options: &[&str]) -> Daemon {
    let mut all = vec!["-a", "-i", "64KiB", "--probe", "uprobe"];
    all.extend(options);
    Daemon::start(dir, &[], &all)
}

/// `program` under a name of its own.
fn named(dir: &TempDir, name: &str, program: &Target) -> String {
    let path = dir.file(name);
    copy_program(program.path(), Path::new(&path));
    path
}

fn listed(daemon: &Daemon, pid: u32) -> Option<Value> {
    let processes = daemon.get("/v1/processes").json();
    let mut processes = processes.as_array().expect("a list").iter();
    processes.find(|process| process["pid"] == pid).cloned()
}

fn state(daemon: &Daemon, pid: u32) -> Option<String> {
    Some(listed(daemon, pid)?["state"].as_str()?.to_owned())
}

fn wait_for_state(daemon: &Daemon, pid: u32, expected: &str) {
    eventually(|| (state(daemon, pid)? == expected).then_some(()));
}

fn set_rules(daemon: &Daemon, include: &[&str], exclude: &[&str]) {
    let body = json!({"filters": {"include": include, "exclude": exclude}}).to_string();
    let answer = http::request_with(Path::new(&daemon.socket), "PUT", "/v1/config", &body);
    assert_eq!(answer.status, 200, "{}", answer.json());
}

/// How many blocks its last program has allocated in `churnHere`.
fn churned(daemon: &Daemon, pid: u32) -> u64 {
    let profile = daemon.profile(pid);
    let process = profile.processes.last().expect("an image");
    assert_eq!(process.engine, "go runtime", "{process:?}");
    process.leaf_totals("main.churnHere").alloc_objects
}

fn finish(mut running: Running) {
    running.close_stdin();
    running.finish().expect_code(0);
}

/// Check that Go programs from before the daemon and from after its start have their own profile,
/// line by line, each once; that each is kept when it has ended; and that a program in C beside
/// them is as ever.
#[test]
fn before_and_after() {
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let builds: [&[&str]; 2] = [&[], &["-buildmode=pie", "-ldflags=-s -w"]];
    let run = |when: &str, flags: &[&str]| {
        let own = dir.file(&format!("{when}{}", flags.len()));
        let program = target_with("heap.go", flags);
        (start(&mut program.command(&[&own, "1"])), own)
    };
    let mut programs: Vec<_> = builds.map(|flags| run("before", flags)).into();
    let daemon = everyone(&dir, &[]);
    programs.extend(builds.map(|flags| run("after", flags)));
    let mut hold = Running::spawn(&mut target("hold.c").command(&["10", "2097152"]));
    hold.wait_stdout(|line| line == "ready");
    for (program, own) in &mut programs {
        wait_for_state(&daemon, program.pid(), "tracing");
        step(program);
        let pid = program.pid();
        let profile = daemon.profile(pid);
        let process = profile.process();
        assert_eq!(process.engine, "go runtime");
        let go = process.go.as_ref().expect("Go");
        assert!(go.since_start && go.collected && go.mem_profile_rate == Some(1));
        let file = dir.file("memprof.pb.gz");
        let body = daemon.get(&format!("/v1/profile?pid={pid}&format=pprof"));
        fs::write(&file, body.body).expect("writing the profile");
        expect_same(&dir, &file, &format!("{own}.0"), 0);
        let listed = listed(&daemon, pid).expect("in the list");
        assert_eq!(listed["engine"], "go runtime", "{listed}");
        assert!(listed["losses"] == json!({}) && listed["samples"].as_u64() > Some(ROUND));
    }
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    eventually(|| {
        let profile = daemon.profile(hold.pid());
        let process = profile.process();
        (process.go.is_none() && process.engine == "uprobe").then_some(())?;
        (process.exact().alloc_calls >= 10).then_some(())
    });
    for (mut program, _) in programs {
        let pid = program.pid();
        program.close_stdin();
        program.finish().expect_code(0);
        wait_for_state(&daemon, pid, "ended");
        assert_eq!(churned(&daemon, pid), ROUND);
    }
    daemon.stop();
    finish(hold);
}

/// Check that of a program with C code there are both profiles, as if it had been asked for: of
/// one that has made its calls of malloc before the daemon came, and of one that comes later.
#[test]
fn cgo() {
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let program = target_with("heap_cgo.go", &[]);
    let mut before = start(&mut program.command(&[]));
    let daemon = everyone(&dir, &[]);
    let mut after = start(&mut program.command(&[]));
    for (program, is_exact) in [(&mut before, true), (&mut after, false)] {
        let pid = program.pid();
        // Both are known before it goes on.
        eventually(|| {
            let profile = daemon.get(&format!("/v1/profile?pid={pid}"));
            (profile.status == 200).then_some(())?;
            let profile = Profile::parse(&profile.body);
            (profile.processes.len() == 2).then_some(())
        });
        step(program);
        let profile = daemon.profile(pid);
        let [go, malloc] = &profile.processes[..] else {
            panic!("two profiles: {profile:#?}");
        };
        assert_eq!((&*go.engine, &*malloc.engine), ("go runtime", "uprobe"));
        let stacks = go.with_leaf("main.goHere");
        let kept = stacks.iter().map(|stack| stack.totals());
        let kept = kept.max_by_key(|kept| kept.inuse_bytes).expect("a stack");
        assert!((100..110).contains(&kept.inuse_objects), "{kept:?}");
        let calls = malloc.exact();
        if is_exact {
            assert_eq!((calls.alloc_calls, calls.alloc_bytes), (100, 100_000));
        } else {
            // And those of its start.
            assert!(calls.alloc_calls > 100 && calls.alloc_bytes > 100_000);
        }
    }
    daemon.stop();
    finish(before);
    finish(after);
}

/// Check that a program whose profiling the linker has removed is in the list and in profiles,
/// with the reason and not as one that allocates nothing, and that nothing else suffers.
#[test]
fn refused() {
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let program = target_with("heap_unprofiled.go", &[]);
    let before = start(&mut program.command(&[]));
    let daemon = everyone(&dir, &[]);
    let after = start(&mut program.command(&[]));
    for program in [before, after] {
        let pid = program.pid();
        wait_for_state(&daemon, pid, "refused");
        let listed = listed(&daemon, pid).expect("in the list");
        assert_eq!(listed["engine"], "go runtime", "{listed}");
        let profile = daemon.profile(pid);
        let process = profile.process();
        assert!(process.go.is_none() && process.stacks.is_empty());
        assert!(process.totals.is_none(), "{process:?}");
        let reason = process.go_refusal.as_deref().expect("a reason");
        assert!(reason.contains(REMOVED), "{reason}");
        let text = daemon
            .get(&format!("/v1/profile?pid={pid}&format=text"))
            .body;
        let text = String::from_utf8(text).expect("text");
        assert!(
            text.contains(REMOVED) && text.contains("Nothing is known of its heap"),
            "{text}"
        );
        assert!(!text.contains("samples"), "{text}");
        finish(program);
        wait_for_state(&daemon, pid, "ended");
    }
    daemon.stop();
}

/// Check that rules and `DELETE` hold for Go programs: what is left out is not read, what is let
/// in by new rules has its whole history, and who is let go stays so.
#[test]
fn rules() {
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let heap = target_with("heap.go", &[]);
    let run = |name: &str| {
        let path = named(&dir, name, &heap);
        start(Command::new(path).args([&dir.file(&format!("own-{name}")), "1"]))
    };
    let mut early = run("gxo-early");
    let daemon = everyone(&dir, &["--exclude", "comm=gxo-*"]);
    let mut late = run("gxo-late");
    let mut other = run("gxi-other");
    for program in [&mut early, &mut late, &mut other] {
        step(program);
    }
    wait_for_state(&daemon, other.pid(), "tracing");
    for program in [&early, &late] {
        assert_eq!(state(&daemon, program.pid()), None);
    }

    set_rules(&daemon, &[], &["comm=gxi-*"]);
    wait_for_state(&daemon, other.pid(), "detached");
    step(&mut other);
    assert_eq!(churned(&daemon, other.pid()), ROUND);
    for program in [&mut early, &mut late] {
        wait_for_state(&daemon, program.pid(), "tracing");
        assert_eq!(churned(&daemon, program.pid()), ROUND);
    }

    let pid = late.pid();
    let socket = Path::new(&daemon.socket);
    let gone = http::request(socket, "DELETE", &format!("/v1/targets/{pid}"));
    assert_eq!(gone.status, 200, "{}", gone.json());
    // Looks through all processes.
    set_rules(&daemon, &[], &[]);
    wait_for_state(&daemon, other.pid(), "tracing");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(state(&daemon, pid).as_deref(), Some("detached"));
    let body = format!("{{\"pid\": {pid}}}");
    let again = http::request_with(socket, "POST", "/v1/targets", &body);
    assert_eq!(again.status, 201, "{}", again.json());
    step(&mut late);
    assert_eq!(churned(&daemon, pid), 2 * ROUND);
    assert_eq!(churned(&daemon, other.pid()), 2 * ROUND);
    daemon.stop();
    for program in [early, late, other] {
        finish(program);
    }
}

/// Check that where rules name a few, Go programs are among them, from before and after the
/// start; that one which cannot be read is listed; and that another is left out.
#[test]
fn named_by_rules() {
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let heap = target_with("heap.go", &[]);
    let (chosen, out) = (named(&dir, "gxn-one", &heap), named(&dir, "gxm-one", &heap));
    let unprofiled = named(&dir, "gxn-none", &target_with("heap_unprofiled.go", &[]));
    let run = |path: &str, when: &str| {
        start(Command::new(path).args([&dir.file(&format!("own-{when}")), "1"]))
    };
    let mut early = run(&chosen, "early");
    let daemon = everyone(&dir, &["--include", "comm=gxn-*"]);
    let (mut late, mut left) = (run(&chosen, "late"), run(&out, "left"));
    let none = run(&unprofiled, "none");
    for program in [&mut early, &mut late] {
        wait_for_state(&daemon, program.pid(), "tracing");
        step(program);
        assert_eq!(churned(&daemon, program.pid()), ROUND);
    }
    wait_for_state(&daemon, none.pid(), "refused");
    step(&mut left);
    assert_eq!(state(&daemon, left.pid()), None);
    daemon.stop();
    for program in [early, late, left, none] {
        finish(program);
    }
}

/// Check that of Go programs that end at once each has been read or is counted as missed, whoever
/// has started it: a process that has called malloc before is traced when it becomes one.
#[test]
fn short() {
    const PROGRAMS: usize = 30;
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let path = named(&dir, "gxs-short", &target_with("heap.go", &[]));
    let own = dir.file("own");
    let daemon = everyone(&dir, &[]);
    for number in 0..PROGRAMS {
        let mut command = Command::new(if number % 2 == 0 { &path } else { "sh" });
        if number % 2 == 1 {
            command.args(["-c", r#""$0" "$@" < /dev/null; true"#, &path]);
        }
        let mut running = Running::spawn(command.args([&own, "1"]));
        running.close_stdin();
        running.finish().expect_code(0);
    }
    eventually(|| {
        let processes = daemon.get("/v1/processes").json();
        let processes = processes.as_array().expect("a list").iter();
        let is_read =
            |process: &&Value| process["exe"] == path.as_str() && process["engine"] == "go runtime";
        let read = processes.filter(is_read);
        let has_ended = |process: &Value| process["state"] == "ended";
        let (ended, live): (Vec<_>, Vec<_>) = read.partition(|process| has_ended(process));
        let missed = daemon.stats()["missed_go_programs"].as_u64();
        let missed = usize::try_from(missed.expect("a number")).expect("a small one");
        // Those of others are among the missed.
        (live.is_empty() && ended.len() + missed >= PROGRAMS).then_some(())
    });
    daemon.stop();
}

/// Check that a Go program in a container, which has files of its own, has its own profile.
#[test]
fn container() {
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let daemon = everyone(&dir, &[]);
    let mut container = Container::run(&dir, User::Root, &target_with("heap.go", &[]));
    let pid = container.pid;
    wait_for_state(&daemon, pid, "tracing");
    step(&mut container.running);
    let profile = daemon.profile(pid);
    let process = profile.process();
    assert_eq!(process.namespace_pids, [pid, container.inner_pid]);
    let go = process.go.as_ref().expect("Go");
    assert_eq!(go.mem_profile_rate, Some(100), "{go:?}");
    let file = dir.file("memprof.pb.gz");
    let body = daemon.get(&format!("/v1/profile?pid={pid}&format=pprof"));
    fs::write(&file, body.body).expect("writing the profile");
    // What the program has written into its root.
    expect_same(&dir, &file, &dir.file("root/10.0"), 100);
    container.running.close_stdin();
    daemon.stop();
}

/// Check that `record -a` has Go programs, and those that cannot be read.
#[test]
fn record() {
    let _alone = alone();
    let dir = TempDir::new("go-system");
    let mut heap = start(&mut target_with("heap.go", &[]).command(&[&dir.file("own"), "1"]));
    let none = start(&mut target_with("heap_unprofiled.go", &[]).command(&[]));
    let file = dir.file("all.json");
    let mut command = memprof(&["record", "-a", "--probe", "uprobe", "-i", "64KiB"]);
    command.args(["-f", "json", "-o", &file]);
    let memprof = Running::spawn(&mut command);
    memprof.wait_stderr(|line| line.starts_with("memprof: recording all processes"));
    step(&mut heap);
    memprof.signal(Signal::SIGINT);
    memprof.finish().expect_code(0);
    let profile = Profile::read(&file);
    let of = |pid: u32| {
        let mut its = profile
            .processes
            .iter()
            .filter(|process| process.pid == pid);
        let process = its.next().expect("a profile");
        assert!(its.next().is_none());
        process
    };
    let process = of(heap.pid());
    assert_eq!(process.engine, "go runtime");
    assert_eq!(process.leaf_totals("main.churnHere").alloc_objects, ROUND);
    let refusal = of(none.pid()).go_refusal.as_deref();
    assert!(refusal.is_some_and(|reason| reason.contains(REMOVED)));
    finish(heap);
    finish(none);
}
