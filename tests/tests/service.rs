//! The daemon as a service: its file, its signals, its manager, its privileges.

use std::{
    fs::{self, Permissions},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::PermissionsExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::Path,
    process::Command,
    time::Duration,
};

use memprof_tests::{
    Daemon, Running, TempDir, Totals,
    daemon::eventually,
    engine::is_prefilter,
    http,
    memprof::{binary, memprof},
    target,
    targets::copy_program,
};
use nix::sys::signal::Signal;

fn holder() -> Running {
    let hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    hold
}

/// `memprof daemon` with a file that has `text` and the socket's path.
fn with_file(dir: &TempDir, text: &str) -> Command {
    write_file(dir, text);
    memprof(&["daemon", "--config", &dir.file("memprof.toml")])
}

fn write_file(dir: &TempDir, text: &str) {
    let text = format!("socket = \"{}\"\n{text}\n", dir.file("memprof.sock"));
    fs::write(dir.file("memprof.toml"), text).expect("a configuration file");
}

fn listening(mut command: Command, dir: &TempDir) -> Daemon {
    let running = Running::spawn(&mut command);
    running.wait_stderr(|line| line.contains("listening on"));
    Daemon {
        running,
        socket: dir.file("memprof.sock"),
    }
}

fn interval(daemon: &Daemon) -> u64 {
    let config = daemon.get("/v1/config").json();
    config["sample_interval_bytes"]
        .as_u64()
        .expect("an interval")
}

/// Check that a daemon takes what it does from its file, that the environment is stronger, and
/// the command line stronger still.
#[test]
fn file() {
    let dir = TempDir::new("service");
    let hold = holder();
    let text = format!("pid = {}\nsample-interval = \"64KiB\"", hold.pid());
    for (variable, option, expected) in [
        (None, None, 65_536),
        (Some("32KiB"), None, 32_768),
        (Some("32KiB"), Some("16KiB"), 16_384),
    ] {
        let mut command = with_file(&dir, &text);
        command.envs(variable.map(|value| ("MEMPROF_SAMPLE_INTERVAL", value)));
        command.args(option.map(|value| format!("-i{value}")));
        let daemon = listening(command, &dir);
        assert_eq!(interval(&daemon), expected);
        daemon.stop();
    }
}

/// Check that a mistake in the file ends the daemon as wrong usage does, with its place.
#[test]
fn mistakes_in_the_file() {
    let dir = TempDir::new("service");
    for (text, word) in [
        ("pids = 1", "line 2, column 1: `pids`"),
        ("pid = 1\nsample-interval = \"often\"", "line 3, column 1: "),
        ("pid = ", "line 2, column 7: "),
    ] {
        let finished = Running::spawn(&mut with_file(&dir, text)).finish();
        finished
            .expect_code(2)
            .expect_stderr(&["memprof.toml", word]);
        assert!(!Path::new(&dir.file("memprof.sock")).exists());
    }
}

/// Check that SIGHUP puts in force what the file says then, also over what was set by request;
/// that it tells what takes a restart; and that a file with mistakes changes nothing.
#[test]
fn hangup_reads_the_file_again() {
    let dir = TempDir::new("service");
    let hold = holder();
    let pid = format!("pid = {}\n", hold.pid());
    let daemon = listening(
        with_file(&dir, &format!("{pid}sample-interval = 4096")),
        &dir,
    );
    assert_eq!(interval(&daemon), 4096);

    write_file(
        &dir,
        &format!("{pid}sample-interval = 8192\nstack-depth = 3"),
    );
    daemon.running.signal(Signal::SIGHUP);
    daemon
        .running
        .wait_stderr(|line| line.contains("stack-depth") && line.contains("restart"));
    assert_eq!(interval(&daemon), 8192);
    let lines = daemon.running.stderr();
    assert!(lines.contains("sample interval  8192 bytes"), "{lines}");

    write_file(&dir, &format!("{pid}sample-interval = \"often\""));
    daemon.running.signal(Signal::SIGHUP);
    daemon
        .running
        .wait_stderr(|line| line.contains("line 3, column 1"));
    assert_eq!(interval(&daemon), 8192);

    let body = r#"{"sample_interval": "1"}"#;
    let answer = http::request_with(Path::new(&daemon.socket), "PUT", "/v1/config", body);
    assert_eq!((answer.status, interval(&daemon)), (200, 1));
    write_file(&dir, &format!("{pid}sample-interval = 8192"));
    daemon.running.signal(Signal::SIGHUP);
    eventually(|| (interval(&daemon) == 8192).then_some(()));
    daemon.stop();
}

/// Check that a daemon without a file ends at SIGHUP as it does at SIGTERM, and one that was
/// started to ignore it goes on.
#[test]
fn hangup_without_a_file() {
    let dir = TempDir::new("service");
    let hold = holder();
    let daemon = Daemon::start(&dir, &[hold.pid()], &[]);
    daemon.running.signal(Signal::SIGHUP);
    daemon.running.finish().expect_code(0);
    assert!(!Path::new(&daemon.socket).exists());

    let mut command = Command::new("nohup");
    command
        .arg(binary())
        .args(["daemon", "--socket", &daemon.socket]);
    command.args(["-p", &hold.pid().to_string()]);
    let daemon = listening(command, &dir);
    daemon.running.signal(Signal::SIGHUP);
    for _ in 0..5 {
        assert_eq!(daemon.get("/healthz").status, 200);
    }
    daemon.stop();
}

/// What the service manager has heard, line by line.
struct Manager(UnixDatagram);

impl Manager {
    fn new(address: &SocketAddr) -> Self {
        let socket = UnixDatagram::bind_addr(address).expect("a manager's socket");
        let limit = Some(Duration::from_secs(30));
        socket.set_read_timeout(limit).expect("a time limit");
        Self(socket)
    }

    /// The next message that has a line.
    fn wait(&self, line: &str) -> Vec<String> {
        loop {
            let mut message = [0; 4096];
            let length = self
                .0
                .recv(&mut message)
                .unwrap_or_else(|error| panic!("{line}: {error}"));
            let text = std::str::from_utf8(&message[..length]).expect("text");
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            if lines.iter().any(|one| one == line) {
                return lines;
            }
        }
    }
}

/// Check that a service manager hears of each step, at a socket with a path and at one without,
/// and that it hears nothing more once the daemon does not answer.
#[test]
fn service_manager() {
    let dir = TempDir::new("service");
    let hold = holder();
    let path = dir.file("notify");
    let name = format!("memprof-test-{}", std::process::id());
    for (variable, address) in [
        (path.clone(), SocketAddr::from_pathname(&path)),
        (format!("@{name}"), SocketAddr::from_abstract_name(&name)),
    ] {
        let manager = Manager::new(&address.expect("an address"));
        let mut command = with_file(&dir, &format!("pid = {}", hold.pid()));
        command.env("NOTIFY_SOCKET", &variable);
        command.env("WATCHDOG_USEC", "200000");
        let daemon = listening(command, &dir);
        let ready = manager.wait("READY=1");
        assert!(
            ready.contains(&"STATUS=Tracing 1 process".to_owned()),
            "{ready:?}"
        );
        for _ in 0..3 {
            manager.wait("WATCHDOG=1");
        }
        daemon.running.signal(Signal::SIGHUP);
        let reloading = manager.wait("RELOADING=1");
        let time = reloading
            .iter()
            .find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
        let time = time.and_then(|time| time.parse::<u64>().ok());
        assert!(time > Some(0), "{reloading:?}");
        manager.wait("READY=1");
        daemon.running.signal(Signal::SIGTERM);
        manager.wait("STOPPING=1");
        daemon.running.finish().expect_code(0);
    }
}

/// Check that a manager's socket that is not there, and a watchdog of another process, do not
/// keep the daemon from its work.
#[test]
fn manager_that_is_gone() {
    let dir = TempDir::new("service");
    let hold = holder();
    let nowhere = dir.file("nobody");
    let variables = [
        ("NOTIFY_SOCKET", nowhere.as_str()),
        ("WATCHDOG_USEC", "1000"),
        ("WATCHDOG_PID", "1"),
    ];
    let socket = dir.file("memprof.sock");
    let daemon = Daemon::start_with(&socket, &[hold.pid()], &[], &variables);
    daemon
        .running
        .wait_stderr(|line| line.contains("cannot tell the service manager"));
    assert_eq!(daemon.get("/healthz").status, 200);
    let finished = daemon.stop();
    // At the start, at the end, and now and then.
    let told = finished
        .stderr
        .matches("cannot tell the service manager")
        .count();
    assert!(told < 10, "{finished}");
}

/// Check that lines for the journal have a priority, no colours and no time, and that another
/// stderr than the journal's gets plain lines.
#[test]
fn journal() {
    let dir = TempDir::new("service");
    let hold = holder();
    let config = dir.file("memprof.toml");
    write_file(&dir, &format!("pid = {}", hold.pid()));
    let script = r#"export JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2)$1; shift; exec "$@""#;
    for (suffix, prefix) in [("", "<4>"), ("0", "")] {
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", suffix]);
        command.arg(binary()).args(["daemon", "--config", &config]);
        let daemon = listening(command, &dir);
        write_file(&dir, &format!("pid = {}\nstack-depth = 3", hold.pid()));
        daemon.running.signal(Signal::SIGHUP);
        let line = daemon
            .running
            .wait_stderr(|line| line.contains("takes a restart"));
        assert_eq!(
            line.starts_with("<4>stack-depth has changed"),
            !prefix.is_empty(),
            "{line}"
        );
        assert!(!line.contains('\x1b'), "{line}");
        write_file(&dir, &format!("pid = {}", hold.pid()));
        daemon.stop();

        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", suffix]);
        command
            .arg(binary())
            .args(["daemon", "--socket", "/no/such/dir/s", "-p", "1"]);
        let failed = Running::spawn(&mut command).finish();
        failed.expect_code(1);
        let fatal = if prefix.is_empty() {
            "memprof: "
        } else {
            "<3>memprof: "
        };
        assert!(failed.stderr.starts_with(fatal), "{failed}");
    }
}

/// The capabilities that docs/service.md names, as the kernel shows them.
const KEPT: u64 = 1 << 39 | 1 << 38 | 1 << 19 | 1 << 40 | 1 << 2 | 1 << 14;
const SYS_ADMIN: u64 = 1 << 21;
const SYS_NICE: u64 = 1 << 23;

/// The sets of every thread of a process, by their names in its status.
fn capabilities(pid: u32, set: &str) -> Vec<u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    threads
        .map(|thread| {
            let status = thread.expect("a thread").path().join("status");
            let status = fs::read_to_string(status).expect("its status");
            let line = status.lines().find_map(|line| line.strip_prefix(set));
            u64::from_str_radix(line.expect("a set").trim(), 16).expect("a set")
        })
        .collect()
}

/// Check that every thread of a daemon has given up what it does not need, also for programs
/// that it would start; and that it traces a process of another user, whose program only that
/// user may read, through a new program in it to the end, and takes all back from another.
#[test]
fn capabilities_are_given_up() {
    let dir = TempDir::new("service");
    let place = dir.path().join("private");
    fs::create_dir(&place).expect("a directory");
    let mut programs = Vec::new();
    for source in ["exec.c", "hold.c"] {
        let path = place.join(source);
        copy_program(target(source).path(), &path);
        for path in [&path, &place] {
            fs::set_permissions(path, Permissions::from_mode(0o700)).expect("its permissions");
            nix::unistd::chown(path, Some(65534.into()), Some(65534.into())).expect("its owner");
        }
        programs.push(path);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args(&programs).args(["7", "70"]);
    let mut exec = Running::spawn(&mut command);
    exec.wait_stdout(|line| line == "ready");
    let mut other = holder();
    let daemon = Daemon::start(&dir, &[exec.pid(), other.pid()], &[]);

    let by_perf = daemon.stats()["probe_mode"] == "perf";
    let mut kept = KEPT;
    if by_perf || is_prefilter() {
        kept |= SYS_ADMIN;
    }
    if is_prefilter() {
        kept |= SYS_NICE;
    }
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        for held in capabilities(daemon.running.pid(), set) {
            assert_eq!(held & !kept, 0, "{set} {held:x}");
            // What it had, it has: all of it, if root has not been deprived before.
            let had = capabilities(std::process::id(), set)[0];
            assert_eq!(held, had & kept, "{set} {held:x}");
        }
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert!(
            capabilities(daemon.running.pid(), set)
                .iter()
                .all(|&held| held == 0)
        );
    }

    exec.send("go");
    let sites = |count: u64| {
        eventually(|| {
            let stats = daemon.stats();
            let processes = stats["processes"].as_array()?;
            let process = processes
                .iter()
                .find(|process| process["pid"] == exec.pid())?;
            let images = process["images"].as_array()?.len() as u64;
            (images == count && process["sites"].as_u64()? > 0).then_some(())
        });
    };
    sites(2);
    exec.wait_stdout(|line| line == "ready");
    exec.send("go");
    exec.wait_stdout(|line| line == "done");
    let profile = eventually(|| {
        let profile = daemon.profile(exec.pid());
        let last = profile.processes.last()?;
        (last.totals().alloc_objects >= 7).then_some(profile)
    });
    let (first, last) = (&profile.processes[0], &profile.processes[1]);
    assert_eq!(first.leaf_totals("before_exec").alloc_objects, 5);
    let leaf = last.only_stack("hold_here");
    assert_eq!((leaf.inuse_objects, leaf.inuse_bytes), (7, 490));
    assert_eq!(leaf.names()[..2], ["hold_here", "main"]);
    exec.close_stdin();
    exec.finish().expect_code(0);
    eventually(|| {
        let processes = daemon.get("/v1/processes").json();
        let states = processes.as_array()?.iter();
        (states.filter(|process| process["state"] == "ended").count() == 1).then_some(())
    });

    let finished = daemon.stop();
    assert!(
        !finished.stderr.to_lowercase().contains("permitted"),
        "{finished}"
    );
    assert!(other.is_running());
    let code = memprof_tests::code::AllocatorCode::in_memory(other.pid());
    assert_eq!(
        code,
        memprof_tests::code::AllocatorCode::in_file(other.pid())
    );
    other.send("go");
    other.wait_stdout(|line| line == "done");
}

/// Check that a process under a seccomp filter is traced by a daemon that has nothing but what
/// the unit lets it have: without a right to suspend the filter, by uprobes, and it says why;
/// with that right, by the prefilter if that is wanted.
#[test]
fn confined_process() {
    let dir = TempDir::new("service");
    let unit = "-all,+bpf,+perfmon,+sys_ptrace,+checkpoint_restore,+dac_read_search,+ipc_lock";
    for may_suspend in [false, true] {
        let mut confined = Running::spawn(&mut target("confined.c").command(&["1000", "777"]));
        confined.wait_stdout(|line| line == "ready");
        let mut command = Command::new("setpriv");
        let rights = if may_suspend { ",+sys_admin" } else { "" };
        command.arg(format!("--bounding-set={unit}{rights}"));
        command.arg(binary()).args(["daemon", "-i", "1"]);
        command.args(["--socket", &dir.file("memprof.sock")]);
        // Not the prefilter or an error: what cannot have it gets uprobes.
        let probe = if is_prefilter() { "auto" } else { "uprobe" };
        command.args(["--probe", probe]);
        let daemon = listening(
            {
                command.args(["-p", &confined.pid().to_string()]);
                command
            },
            &dir,
        );
        confined.send("go");
        confined.wait_stdout(|line| line == "done");
        let profile = daemon.profile_when(confined.pid(), |profile| {
            profile.process().totals().alloc_objects == 1000
        });
        let process = profile.process();
        let totals = process.leaf_totals("confined_alloc");
        assert_eq!(totals, Totals::of(1000, 1, 777));
        let wanted = if is_prefilter() && may_suspend {
            "prefilter"
        } else {
            "uprobe"
        };
        assert_eq!(process.engine, wanted, "{:?}", process.engine_reason);
        let reason = process.engine_reason.as_deref().unwrap_or_default();
        assert_eq!(
            reason.contains("seccomp"),
            is_prefilter() && !may_suspend,
            "{reason}"
        );
        daemon.stop();
        assert!(confined.is_running());
        confined.close_stdin();
        confined.finish().expect_code(0);
    }
}
