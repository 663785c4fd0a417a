//! The prefilter in processes of all kinds: allocators, children, other programs.

use std::process::Command;

use memprof_tests::{
    Daemon, End, Record, Running, TempDir, Totals,
    daemon::eventually,
    engine::cleanup,
    memprof, target,
    targets::{shared_library, target_with},
};

const PREFILTER: &[&str] = &["--probe", "prefilter"];
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

/// 10 blocks of 100 bytes in `hold_here`, of which all stay, exactly; by a recording of a
/// running process.
fn check_exact(name: &str, command: &mut Command) {
    let dir = TempDir::new("prefilter-targets");
    let recorded = Record::every_allocation(&dir)
        .options(PREFILTER)
        .attach(command, End::Interrupt);
    let process = recorded.process();
    assert_eq!(process.engine, "prefilter", "{name}");
    assert_eq!(
        process.leaf_totals("hold_here"),
        Totals::of(10, 10, 100),
        "{name}"
    );
    let totals = process.exact();
    assert_eq!(totals.alloc_calls, process.totals().alloc_objects, "{name}");
    assert_eq!(totals.alloc_bytes, process.totals().alloc_bytes, "{name}");
}

/// Check that every call is seen, exactly, with each allocator.
#[test]
fn every_allocator() {
    check_exact("glibc", &mut target("hold.c").command(&["10", "100"]));
    check_exact(
        "static",
        &mut target_with("hold.c", &["-static"]).command(&["10", "100"]),
    );
    for library in [
        "libjemalloc.so.2",
        "libmimalloc.so.2",
        "libtcmalloc.so.4",
        "libtcmalloc_minimal.so.4",
    ] {
        let path = format!("{LIBRARIES}/{library}");
        assert!(
            std::fs::exists(&path).unwrap_or(false),
            "the tests need {path}"
        );
        let mut command = target("hold.c").command(&["10", "100"]);
        command.env("LD_PRELOAD", &path);
        check_exact(library, &mut command);
    }
}

/// Check that a forked child is left alone and can be cleaned up: its stubs are switched
/// off, and its blocks are not its parent's.
#[test]
fn forked_child() {
    let dir = TempDir::new("prefilter-targets");
    let mut parent = Running::spawn(&mut target("forks.c").command(&[]));
    parent.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[parent.pid()], PREFILTER);
    parent.send("fork");
    let line = parent.wait_stdout(|line| line.starts_with("child "));
    let child: u32 = line["child ".len()..].parse().expect("a pid");
    // It has allocated and freed in between, and holds one block of its own.
    let profile = daemon.profile_when(parent.pid(), |profile| {
        profile.process().totals().alloc_objects >= 1
    });
    assert_eq!(
        profile.process().leaf_totals("in_parent"),
        Totals::of(1, 1, 333)
    );
    assert_eq!(profile.process().leaf_totals("in_child").alloc_objects, 0);
    // While the daemon traces the parent.
    assert!(cleanup(child).contains("taken out"));
    assert!(cleanup(child).contains("no prefilter is in it"));
    parent.send("on");
    eventually(|| parent.stdout().contains("child ended 0").then_some(()));
    daemon.stop();
    parent.close_stdin();
    parent.finish().expect_code(0);
}

/// Check that a program which replaces the traced one gets the prefilter too, and that
/// the books of the first are closed.
#[test]
fn replaced_program() {
    let dir = TempDir::new("prefilter-targets");
    let hold = target("hold.c");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "echo ready; read go; exec \"$0\" 10 100", hold.text()]);
    let mut shell = Running::spawn(&mut command);
    shell.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[shell.pid()], PREFILTER);
    shell.send("go");
    eventually(|| (shell.stdout().matches("ready\n").count() == 2).then_some(()));
    // It is hooked a moment after it has begun; what came before is not seen.
    eventually(|| {
        let stats = daemon.stats();
        let process = &stats["processes"][0];
        (process["images"].as_array().map_or(0, Vec::len) == 2
            && process["image_bytes"].as_u64() > Some(0))
        .then_some(())
    });
    shell.send("go");
    eventually(|| shell.stdout().contains("done\n").then_some(()));
    let totals = || {
        let profile = memprof_tests::Profile::parse(&daemon.get("/v1/profile").body);
        let process = profile.processes.iter().find(|process| !process.exited)?;
        let totals = process.leaf_totals("hold_here");
        (totals == Totals::of(10, 10, 100)).then(|| process.engine.clone())
    };
    assert_eq!(eventually(totals), "prefilter");
    daemon.stop();
    shell.close_stdin();
    shell.finish().expect_code(0);
}

/// Check that an allocator which is loaded while the process is traced is hooked too, and
/// goes with the rest.
#[test]
fn second_allocator() {
    let dir = TempDir::new("prefilter-targets");
    let bump = shared_library("bump.c");
    let mut late = Running::spawn(&mut target("late_allocator.c").command(&[bump.text()]));
    late.wait_stdout(|line| line == "ready");
    let daemon = Daemon::start(&dir, &[late.pid()], PREFILTER);
    late.send("load");
    late.wait_stdout(|line| line == "loaded");
    eventually(|| (daemon.stats()["processes"][0]["sites"].as_u64() == Some(11)).then_some(()));
    late.send("go");
    late.wait_stdout(|line| line == "done");
    let profile = daemon.profile_when(late.pid(), |profile| {
        profile.process().leaf_totals("from_late").alloc_objects >= 20
    });
    assert_eq!(profile.process().engine, "prefilter");
    assert_eq!(
        profile.process().leaf_totals("from_late"),
        Totals::of(20, 5, 555)
    );
    daemon.stop();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", late.pid())).expect("maps");
    assert!(!maps.contains("memprof-prefilter"), "{maps}");
    late.close_stdin();
    late.finish().expect_code(0);
}

/// Check that `memprof check` says which engine a process would get, and why not the
/// other.
#[test]
fn check_says_which() {
    let hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    let finished = Running::spawn(&mut memprof::memprof(&[
        "check",
        "-p",
        &hold.pid().to_string(),
    ]))
    .finish();
    finished.expect_code(0);
    assert!(
        finished.stdout.contains("engine prefilter: 9 functions"),
        "{}",
        finished.stdout
    );
}
