//! The targets keep their own promises, without memprof.

use memprof_tests::{
    Finished, Running, target,
    targets::{freestanding, shared_library},
};

/// Runs a target through its handshake, with an allocator that counts.
fn run(file: &str, args: &[&str]) -> Finished {
    let mut command = target(file).command(args);
    command.env("LD_PRELOAD", shared_library("tally.c").path());
    let mut running = Running::spawn(&mut command);
    running.wait_stdout(|line| line == "ready");
    running.send("go");
    running.wait_stdout(|line| line == "done");
    running.close_stdin();
    let finished = running.finish();
    finished.expect_code(0);
    finished
}

#[track_caller]
fn check(finished: &Finished, allocs: u64, live: u64) {
    let tally = format!("tally allocs={allocs} frees={}\n", allocs - live);
    assert!(
        finished.stderr.contains(&tally),
        "expected {tally}: {finished}"
    );
}

/// Check that each target allocates and keeps as many blocks as the tests expect
/// of it, and nothing else.
#[test]
fn totals() {
    check(&run("leaks.c", &[]), 1103, 103);
    check(&run("family.c", &[]), 347, 66);
    check(&run("realloc.c", &[]), 1 + 100 + 7 + 8 + 9 + 6, 1 + 7 + 9);
    check(&run("sizes.c", &[]), 97_100, 97_100 / 2);
    check(&run("hold.c", &["10", "100"]), 10, 10);
    check(&run("recursion.c", &["12", "3"]), 3 << 12, 3 << 12);
    check(&run("constructor.c", &[]), 3, 3);
    check(&run("stacks.c", &[]), 1060, 1060);
}

/// Check that the targets with threads count what they hold.
#[test]
fn own_counts() {
    let threads = run("threads.c", &["20000", "1000"]);
    assert_eq!(
        (threads.value("pairs"), threads.value("inuse_objects")),
        (80_000, 4000)
    );
    assert!(threads.value("inuse_bytes") > 4000);
    let race = run("realloc_race.c", &["50000"]);
    assert!((1..=64).contains(&race.value("inuse_objects")), "{race}");
    assert!(race.value("inuse_bytes") >= 16 * race.value("inuse_objects"));
}

/// Check that the C++ and Rust targets run to their end.
#[test]
fn other_languages() {
    run("cpp.cpp", &[]);
    run("rust.rs", &[]);
}

/// Check that programs become another one.
#[test]
fn exec() {
    let hold = target("hold.c");
    for source in ["exec.c", "exec_thread.c"] {
        let mut exec = Running::spawn(&mut target(source).command(&[hold.text(), "3", "30"]));
        exec.send("go");
        exec.send_last("go");
        exec.finish().expect_code(0);
    }
}

/// Check that the program without an allocator runs, and has none.
#[test]
fn no_allocator() {
    let mut program = Running::spawn(&mut freestanding("no_allocator.c").command(&[]));
    program.wait_stdout(|line| line == "ready");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", program.pid()));
    assert!(!maps.expect("its maps").contains(".so"));
    program.close_stdin();
    program.finish().expect_code(0);
}
