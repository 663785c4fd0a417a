//! Rules that choose among all processes: by what they choose, changed while running, and what
//! the others pay.
//!
//! Everything else that runs on the host is traced too where rules leave it in, so each test has
//! programs of names of their own, and speaks of these alone.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use memprof_tests::{
    Daemon, Profile, Running, TempDir, code::AllocatorCode, daemon::eventually, http, memprof,
    target, targets::copy_program,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Blocks so large that each is sampled, but for one in 10^13.
const LARGE: u64 = 2 << 20;

/// One daemon for all at a time: each traces the others' targets.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A daemon for all that `rules` let pass.
fn everyone(dir: &TempDir, rules: &[&str]) -> Daemon {
    let mut options = vec!["-a", "-i", "64KiB", "--probe", "auto"];
    options.extend(rules);
    Daemon::start(dir, &[], &options)
}

/// `hold.c` under a name of its own.
struct Program {
    path: String,
}

impl Program {
    fn named(dir: &TempDir, name: &str) -> Self {
        let path = dir.file(name);
        copy_program(target("hold.c").path(), Path::new(&path));
        Self { path }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.args(["10", &LARGE.to_string()]);
        command
    }

    fn start(&self) -> Running {
        let running = Running::spawn(&mut self.command());
        running.wait_stdout(|line| line == "ready");
        running
    }
}

/// Has it allocate ten blocks.
fn go(running: &mut Running) {
    let times = running.stdout().matches("done\n").count() + 1;
    running.send("go");
    eventually(|| (running.stdout().matches("done\n").count() == times).then_some(()));
}

fn state(daemon: &Daemon, pid: u32) -> Option<String> {
    let processes = daemon.get("/v1/processes").json();
    let processes = processes.as_array()?;
    let process = processes.iter().find(|process| process["pid"] == pid)?;
    Some(process["state"].as_str()?.to_owned())
}

fn is_traced(daemon: &Daemon, pid: u32) -> bool {
    state(daemon, pid).is_some_and(|state| state == "tracing")
}

fn wait_until_traced(daemon: &Daemon, pid: u32) {
    eventually(|| is_traced(daemon, pid).then_some(()));
}

/// Calls and bytes of a process's last image.
fn exact(daemon: &Daemon, pid: u32) -> (u64, u64) {
    let response = daemon.get(&format!("/v1/profile?pid={pid}"));
    assert_eq!(response.status, 200, "{}", response.json());
    let profile = Profile::parse(&response.body);
    let exact = profile.processes.last().expect("an image").exact();
    (exact.alloc_calls, exact.alloc_bytes)
}

fn put(daemon: &Daemon, body: &Value) -> http::Response {
    let socket = Path::new(&daemon.socket);
    http::request_with(socket, "PUT", "/v1/config", &body.to_string())
}

fn set_rules(daemon: &Daemon, include: &[&str], exclude: &[&str]) {
    let body = json!({"filters": {"include": include, "exclude": exclude}});
    let answer = put(daemon, &body);
    assert_eq!(answer.status, 200, "{}", answer.json());
}

fn engine(daemon: &Daemon, pid: u32) -> String {
    let profile = daemon.profile(pid);
    profile.process().engine.clone()
}

fn finish(mut running: Running) {
    running.close_stdin();
    running.finish().expect_code(0);
}

/// Check that where probes are shared by all, what an exclude rule names is in no profile, and
/// that a change of rules while running lets go and takes on, from the next call on.
#[test]
fn excluded() {
    let _alone = alone();
    let dir = TempDir::new("excluded");
    let (inside, outside) = (
        Program::named(&dir, "fxi-one"),
        Program::named(&dir, "fxo-one"),
    );
    let (mut early_in, mut early_out) = (inside.start(), outside.start());
    let daemon = everyone(&dir, &["--exclude", "comm=fxo-*"]);
    let (mut in_, mut out) = (inside.start(), outside.start());
    for process in [&mut early_in, &mut in_, &mut early_out, &mut out] {
        go(process);
    }
    for process in [&early_in, &in_] {
        wait_until_traced(&daemon, process.pid());
        let (calls, bytes) = exact(&daemon, process.pid());
        assert!(calls >= 10 && bytes >= 10 * LARGE, "{calls} {bytes}");
        assert_eq!(engine(&daemon, process.pid()), "uprobe");
    }
    for process in [&early_out, &out] {
        assert_eq!(state(&daemon, process.pid()), None);
    }

    // The other way around.
    let before = exact(&daemon, in_.pid());
    set_rules(&daemon, &[], &["comm=fxi-*"]);
    eventually(|| (state(&daemon, in_.pid())? == "detached").then_some(()));
    go(&mut in_);
    assert_eq!(exact(&daemon, in_.pid()), before);
    go(&mut out);
    wait_until_traced(&daemon, out.pid());
    assert_eq!(exact(&daemon, out.pid()), (10, 10 * LARGE));
    go(&mut out);
    eventually(|| (exact(&daemon, out.pid()) == (20, 20 * LARGE)).then_some(()));

    // And back: its books begin anew.
    set_rules(&daemon, &[], &["comm=fxo-*"]);
    go(&mut in_);
    wait_until_traced(&daemon, in_.pid());
    assert_eq!(exact(&daemon, in_.pid()), (10, 10 * LARGE));
    daemon.stop();
    for process in [early_in, in_, early_out, out] {
        finish(process);
    }
}

/// Check that processes that rules name are taken on one by one, each by the engine that its
/// rule says, before the daemon and after its start; and that nothing is probed in others.
#[test]
fn named() {
    let _alone = alone();
    let dir = TempDir::new("named");
    let written = Program::named(&dir, "fna-one");
    let probed = Program::named(&dir, "fnb-one");
    let other = Program::named(&dir, "fnc-one");
    let mut early = [written.start(), probed.start(), other.start()];
    let daemon = everyone(
        &dir,
        &[
            "--include",
            "comm=fna-*,probe=prefilter",
            "--include",
            "comm=fnb-*",
        ],
    );
    let mut late = [written.start(), probed.start(), other.start()];
    for processes in [&mut early, &mut late] {
        let [written, probed, other] = processes;
        wait_until_traced(&daemon, written.pid());
        wait_until_traced(&daemon, probed.pid());
        for process in [&mut *written, probed, other] {
            go(process);
        }
        for (process, by) in [(&*written, "prefilter"), (&*probed, "uprobe")] {
            let here = daemon.profile_when(process.pid(), |profile| {
                profile.process().exact().alloc_calls >= 10
            });
            assert_eq!(here.process().exact().alloc_bytes, 10 * LARGE, "{here:?}");
            assert_eq!(engine(&daemon, process.pid()), by);
        }
        let code = AllocatorCode::in_file(written.pid());
        assert_ne!(AllocatorCode::in_memory(written.pid()), code);
        // Nothing, not even a breakpoint.
        assert_eq!(state(&daemon, other.pid()), None);
        assert_eq!(AllocatorCode::in_memory(other.pid()), code);
    }

    // Another engine: let go, and taken on anew.
    set_rules(&daemon, &["comm=fna-*", "comm=fnb-*"], &[]);
    let [first, ..] = &mut late;
    eventually(|| {
        (is_traced(&daemon, first.pid()) && engine(&daemon, first.pid()) == "uprobe").then_some(())
    });
    go(first);
    eventually(|| (exact(&daemon, first.pid()) == (10, 10 * LARGE)).then_some(()));

    daemon.stop();
    let code = AllocatorCode::in_file(early[0].pid());
    for process in early.into_iter().chain(late) {
        assert_eq!(AllocatorCode::in_memory(process.pid()), code);
        finish(process);
    }
}

/// Check that a change from rules that name few to none, and back, counts each call once: the
/// probes of each are gone before those of all come.
#[test]
fn from_few_to_all() {
    let _alone = alone();
    let dir = TempDir::new("few");
    let program = Program::named(&dir, "fff-one");
    let (mut one, mut other) = (program.start(), program.start());
    let rule = format!("pid={}", one.pid());
    let daemon = everyone(&dir, &["--include", &rule]);
    wait_until_traced(&daemon, one.pid());
    go(&mut one);
    assert_eq!(state(&daemon, other.pid()), None);
    eventually(|| (exact(&daemon, one.pid()) == (10, 10 * LARGE)).then_some(()));

    set_rules(&daemon, &[], &[]);
    for process in [&mut one, &mut other] {
        eventually(|| {
            go(process);
            is_traced(&daemon, process.pid()).then_some(())
        });
        let (calls, _) = exact(&daemon, process.pid());
        go(process);
        eventually(|| (exact(&daemon, process.pid()).0 == calls + 10).then_some(()));
    }

    set_rules(&daemon, &[&rule], &[]);
    eventually(|| (state(&daemon, other.pid())? == "detached").then_some(()));
    eventually(|| {
        // It is forgotten before it is taken on anew.
        let is_anew = is_traced(&daemon, one.pid()) && exact(&daemon, one.pid()).0 == 0;
        is_anew.then_some(())
    });
    let code = AllocatorCode::in_file(other.pid());
    eventually(|| (AllocatorCode::in_memory(other.pid()) == code).then_some(()));
    go(&mut one);
    eventually(|| (exact(&daemon, one.pid()) == (10, 10 * LARGE)).then_some(()));
    daemon.stop();
    finish(one);
    finish(other);
}

/// Check that processes are told by each of what rules can ask.
#[test]
fn each_condition() {
    let _alone = alone();
    let dir = TempDir::new("conditions");
    let program = Program::named(&dir, "fec-one");
    let daemon = everyone(&dir, &["--include", "comm=fec-none"]);
    let one = program.start();
    let pid = one.pid();
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("a cgroup");
    let cgroup = cgroup
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .expect("a path in cgroup2");
    for (rule, fits) in [
        (format!("pid={pid}"), true),
        (format!("pid={}", daemon.running.pid()), false),
        ("comm=fec-*".to_owned(), true),
        ("comm=fec".to_owned(), false),
        (format!("exe={}", program.path), true),
        (format!("exe={}x", program.path), false),
        ("comm=fec-*,uid=root".to_owned(), true),
        ("comm=fec-*,uid=1".to_owned(), false),
        (format!("comm=fec-*,cgroup={cgroup}"), true),
        (
            format!("comm=fec-*,cgroup={}/no", cgroup.trim_end_matches('/')),
            false,
        ),
    ] {
        set_rules(&daemon, &[&rule], &[]);
        eventually(|| (is_traced(&daemon, pid) == fits).then_some(()));
        // An exclude rule is stronger.
        set_rules(&daemon, &[&rule], &["comm=fec-one"]);
        eventually(|| (!is_traced(&daemon, pid)).then_some(()));
    }
    daemon.stop();
    finish(one);
}

/// Check that a program that is run by one that is left out is taken on, and the other way
/// around: by probes of each, and by those of all.
#[test]
fn replaced_program() {
    let _alone = alone();
    let dir = TempDir::new("replaced");
    let (wanted, unwanted) = (
        Program::named(&dir, "frw-one"),
        Program::named(&dir, "fru-one"),
    );
    let own_shell = dir.file("frw-sh");
    copy_program(Path::new("/bin/sh"), Path::new(&own_shell));
    for rules in [["--include", "comm=frw-*"], ["--exclude", "comm=fru-*"]] {
        let daemon = everyone(&dir, &rules);
        // A shell that waits, and then is one of the two.
        let shell = |program: &Program| {
            let script = format!("read go; exec {} 10 {LARGE}", program.path);
            Running::spawn(Command::new("sh").args(["-c", &script]))
        };
        let mut to_wanted = shell(&wanted);
        to_wanted.send("go");
        to_wanted.wait_stdout(|line| line == "ready");
        eventually(|| {
            go(&mut to_wanted);
            is_traced(&daemon, to_wanted.pid()).then_some(())
        });
        // That may have been before it was.
        go(&mut to_wanted);
        eventually(|| (exact(&daemon, to_wanted.pid()).1 >= 10 * LARGE).then_some(()));

        // A shell that is traced itself, until it is the other.
        let script = format!("read a; read b; exec {} 10 {LARGE}", unwanted.path);
        let mut to_unwanted = Running::spawn(Command::new(&own_shell).args(["-c", &script]));
        to_unwanted.send("a");
        wait_until_traced(&daemon, to_unwanted.pid());
        to_unwanted.send("b");
        to_unwanted.wait_stdout(|line| line == "ready");
        let pid = to_unwanted.pid();
        let is_let_go = || {
            let state = state(&daemon, pid);
            matches!(state.as_deref(), None | Some("detached")).then_some(())
        };
        eventually(is_let_go);
        go(&mut to_unwanted);
        assert_eq!(is_let_go(), Some(()));
        finish(to_unwanted);
        finish(to_wanted);
        daemon.stop();
    }
}

/// Check that a file's rules are read again at SIGHUP, and shown.
#[test]
fn at_hangup() {
    let _alone = alone();
    let dir = TempDir::new("hangup");
    let program = Program::named(&dir, "fhu-one");
    let one = program.start();
    let file = dir.file("memprof.toml");
    fs::write(&file, "all = true\ninclude = [\"comm=fhu-none\"]\n").expect("a file");
    let daemon = Daemon::start(&dir, &[], &["--config", &file, "--probe", "auto"]);
    assert!(!is_traced(&daemon, one.pid()));
    let text = "all = true\ninclude = [\"comm=fhu-none\", \"comm=fhu-*,probe=auto\"]\n";
    fs::write(&file, text).expect("a file");
    daemon.running.signal(Signal::SIGHUP);
    let line = daemon
        .running
        .wait_stderr(|line| line.contains("read again"));
    assert!(
        line.contains("include          comm=fhu-*,probe=auto"),
        "{line}"
    );
    wait_until_traced(&daemon, one.pid());
    assert_eq!(engine(&daemon, one.pid()), "prefilter");

    // By command: what is given takes the place of all.
    let config = |arguments: &[&str]| {
        let mut command = memprof(&["config", "--socket", &daemon.socket]);
        Running::spawn(command.args(arguments)).finish()
    };
    config(&["--exclude", "comm=fhu-*"]).expect_code(0);
    eventually(|| (!is_traced(&daemon, one.pid())).then_some(()));
    let shown = config(&[]);
    shown.expect_code(0);
    assert!(
        shown.stdout.contains("exclude          comm=fhu-*"),
        "{}",
        shown.stdout
    );
    assert!(!shown.stdout.contains("include"), "{}", shown.stdout);
    config(&["--include", "name=a"]).expect_code(2);
    // A rule that makes no sense leaves those that are in force.
    fs::write(&file, "all = true\ninclude = [\"fhu\"]\n").expect("a file");
    daemon.running.signal(Signal::SIGHUP);
    daemon
        .running
        .wait_stderr(|line| line.contains("stay as they were"));
    assert!(!is_traced(&daemon, one.pid()));
    daemon.stop();
    finish(one);
}

/// Check that rules are refused where they make no sense, and why.
#[test]
fn refused() {
    let _alone = alone();
    let dir = TempDir::new("refused");
    let socket = dir.file("memprof.sock");
    for (arguments, words) in [
        (&["-p", "1", "--include", "comm=a"][..], "need -a"),
        (&["-a", "--include", "comm=*,probe=prefilter"], "named"),
        (&["-a", "--exclude", "comm=a,probe=auto"], "excludes"),
        (
            &["-a", "--probe", "uprobe", "--include", "comm=a,probe=auto"],
            "--probe",
        ),
    ] {
        let mut command = memprof(&["daemon", "--socket", &socket]);
        let finished = Running::spawn(command.args(arguments)).finish();
        assert_ne!(finished.code(), 0, "{arguments:?}");
        finished.expect_no_panic().expect_stderr(&[words]);
    }
    let one = Program::named(&dir, "fre-one").start();
    let daemon = Daemon::start(&dir, &[one.pid()], &[]);
    let answer = put(&daemon, &json!({"filters": {"include": ["comm=a"]}}));
    assert_eq!(answer.status, 409, "{}", answer.json());
    for rules in [
        json!({"include": ["comm"]}),
        json!({"exclude": ["comm=a,probe=auto"]}),
    ] {
        assert_eq!(put(&daemon, &json!({"filters": rules})).status, 400);
    }
    daemon.stop();
    finish(one);
}
