//! Other tools' uprobes beside the prefilter: where a function begins they do no harm.

use std::{fs, process::Command, thread, time::Duration};

use memprof_tests::{
    Daemon, Running, TempDir, code::AllocatorCode, daemon::eventually, memprof, target,
};
use nix::sys::signal::Signal;

const LIBC: &str = "/usr/lib/x86_64-linux-gnu/libc.so.6";

/// A C library of the target's own: a uprobe is in all processes that map its file, and the
/// other tests' are none of ours.
fn own_libc(dir: &TempDir) -> String {
    let copy = dir.file("libc.so.6");
    fs::copy(LIBC, &copy).expect("a copy of the C library");
    copy
}

fn start(dir: &TempDir, program: &str, arguments: &[&str]) -> Running {
    let mut command = target(program).command(arguments);
    command.env("LD_LIBRARY_PATH", dir.path());
    let running = Running::spawn(&mut command);
    running.wait_stdout(|line| line == "ready");
    running
}

/// bpftrace that counts calls of the functions of `libc` by `kind` of probe, and prints a
/// line a second.
fn bpftrace(libc: &str, kind: &str) -> Running {
    let functions = [
        "malloc",
        "free",
        "calloc",
        "realloc",
        "reallocarray",
        "posix_memalign",
        "aligned_alloc",
        "valloc",
        "pvalloc",
    ];
    let probes: Vec<String> = functions
        .iter()
        .map(|function| format!("{kind}:{libc}:{function}"))
        .collect();
    let program = format!(
        "BEGIN {{ printf(\"begun\\n\"); }} {} {{ @calls = count(); }} \
         interval:s:1 {{ print(@calls); }}",
        probes.join(",")
    );
    let bpftrace = Running::spawn(Command::new("bpftrace").args(["-B", "line", "-e", &program]));
    bpftrace.wait_stdout(|line| line.contains("begun"));
    bpftrace
}

fn finish(bpftrace: Running) {
    bpftrace.signal(Signal::SIGINT);
    let _ = bpftrace.finish();
}

/// Check that bpftrace can probe every function of the C library where it begins, by uprobes
/// and by return probes, come and go, while the prefilter is in a process of threads that
/// allocate, fork and get signals, and stay while it goes: no block is lost or changed, and
/// the text is then as before.
#[test]
fn at_functions() {
    let dir = TempDir::new("uprobes");
    let libc = own_libc(&dir);
    let mut storm = start(&dir, "storm.c", &["4"]);
    let pid = storm.pid();
    let options = [
        "--probe",
        "prefilter",
        "-i",
        "64KiB",
        "--attach-timeout",
        "20",
    ];
    for kind in ["uprobe", "uretprobe"] {
        let daemon = Daemon::start(&dir, &[pid], &options);
        let first = bpftrace(&libc, kind);
        // Calls come to both.
        first.wait_stdout(|line| line.starts_with("@calls"));
        let samples = || {
            let profile = daemon.profile(pid);
            profile.process().totals().alloc_objects
        };
        let before = samples();
        eventually(|| (samples() > before).then_some(()));
        finish(first);
        assert!(storm.is_running(), "{kind}");
        let second = bpftrace(&libc, kind);
        daemon.stop();
        assert!(storm.is_running(), "{kind}");
        finish(second);
        assert!(storm.is_running(), "{kind}");
        // The kernel takes its breakpoints out when the tool's last descriptor is gone.
        eventually(|| (AllocatorCode::in_memory(pid) == AllocatorCode::in_file(pid)).then_some(()));
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
        assert!(!maps.contains("memprof-prefilter"), "{maps}");
    }
    storm.send_last("over");
    storm.finish().expect_code(0);
}

/// Check that a process in which another tool's uprobe is gets no prefilter, and is told so
/// with its place; and that it gets uprobes by default.
#[test]
fn refused_beside_one() {
    let dir = TempDir::new("uprobes");
    let libc = own_libc(&dir);
    let mut hold = start(&dir, "hold.c", &["10", "100"]);
    let pid = hold.pid().to_string();
    let bpftrace = bpftrace(&libc, "uprobe");
    thread::sleep(Duration::from_millis(200));
    let record = ["record", "--probe", "prefilter", "-d", "0.1", "-p", &pid];
    Running::spawn(&mut memprof::memprof(&record))
        .finish()
        .expect_code(1)
        .expect_stderr(&["another tool has a breakpoint at"]);
    let daemon = Daemon::start(&dir, &[hold.pid()], &["--probe", "auto"]);
    let profile = daemon.profile_when(hold.pid(), |_| true);
    assert_eq!(profile.process().engine, "uprobe");
    let reason = profile.process().engine_reason.clone().unwrap_or_default();
    assert!(reason.contains("breakpoint"), "{reason}");
    daemon.stop();
    finish(bpftrace);
    hold.close_stdin();
    hold.finish().expect_code(0);
}
