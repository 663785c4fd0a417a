//! `--function` and `--free-function`: pools of a program's own, exactly.

use std::{fs, path::Path};

use memprof_tests::{
    Daemon, End, Process, Profile, Record, Running, TempDir, Totals, daemon::eventually,
    engine::is_prefilter, http, memprof::memprof, profile::sum, target,
};

/// The pools of functions.c.
const FUNCTIONS: [&str; 6] = [
    "--function=arena_blocks:count=2,size=3,out=4",
    "--function=local_take:size=1,return",
    "--function=outer_take:size=2",
    "--function=jumping_take:size=1",
    "--free-function=arena_give:ptr=2",
    "--free-function=local_give:ptr=1",
];

/// The same, as environment and file have them.
const ALLOCATING: [&str; 4] = [
    "arena_blocks:count=2,size=3,out=4",
    "local_take:size=1,return",
    "outer_take:size=2",
    "jumping_take:size=1",
];
const FREEING: [&str; 2] = ["arena_give:ptr=2", "local_give:ptr=1"];

/// How often each is called, and how many of the blocks stay.
const ROUNDS: u64 = 40;
const KEPT: u64 = 15;

/// What memprof is told to use: where the prefilter is tested it must choose uprobes by itself.
fn probe() -> Option<(&'static str, &'static str)> {
    is_prefilter().then_some(("MEMPROF_PROBE", "auto"))
}

fn every_allocation(dir: &TempDir) -> Record<'_> {
    let record = Record::every_allocation(dir);
    match probe() {
        Some((name, value)) => record.env(name, value),
        None => record,
    }
}

/// Checks what functions.c has done with blocks of that size.
#[track_caller]
fn check_pools(process: &Process, size: u64) {
    let blocks = Totals::of(ROUNDS, KEPT, size);
    for (function, from, more) in [
        ("arena_blocks", "from_arena", 0),
        ("local_take", "from_local", 1),
        ("outer_take", "from_outer", 0),
        ("jumping_take", "from_jumping", 0),
    ] {
        assert_eq!(sum(process.through(from)), blocks, "{from}");
        // The block that realloc gives up.
        let mut all = blocks;
        all.alloc_objects += more;
        all.alloc_bytes += more * size;
        assert_eq!(process.leaf_totals(function), all, "{function}");
        for stack in process.with_leaf(function) {
            let caller = stack.frames[1].name();
            assert!([from, "from_regrown"].contains(&caller), "{}", stack.path());
            assert_eq!(stack.frames[2].name(), "main", "{}", stack.path());
        }
    }
    assert_eq!(process.leaf_totals("from_malloc"), blocks);
    // Its first block has been given up, at the same address.
    let arena = Totals::of(1, 1, ROUNDS * size);
    assert_eq!(process.leaf_totals("make_arena"), arena);
    assert_eq!(process.leaf_totals("regrow"), Totals::of(1, 1, 2 * size));

    let totals = process.totals();
    assert_eq!(totals.alloc_objects, 5 * ROUNDS + 3);
    assert_eq!(totals.inuse_objects, 5 * KEPT + 2);
    let exact = process.exact();
    // And one call that has failed.
    assert_eq!(exact.alloc_calls, 5 * ROUNDS + 4);
    assert_eq!(exact.alloc_bytes, (6 * ROUNDS + 3) * size + 1000);
    assert_eq!(exact.free_calls, 5 * (ROUNDS - KEPT) + 1);
    for cause in ["alloc_unreported", "in_flight_full", "result_unreadable"] {
        assert_eq!(process.loss(cause), 0, "{cause}: {:?}", process.losses);
    }
    assert_eq!(process.engine, "uprobe");
}

/// Check each way in which a pool's function can hand out a block and give it up, of a process
/// that runs and of a command, by all ways to walk stacks.
#[test]
fn pools() {
    let target = target("functions.c");
    for unwind in ["auto", "fp"] {
        let dir = TempDir::new("functions");
        let record = every_allocation(&dir).options(&FUNCTIONS);
        let record = record.options(&["--unwind", unwind]);
        let recorded = record.attach(&mut target.command(&[]), End::Interrupt);
        let process = recorded.process();
        check_pools(process, 48);
        let reason = process.engine_reason.as_deref();
        assert_eq!(reason.is_some(), is_prefilter(), "{reason:?}");
        let expected = "arena_blocks, local_take, outer_take, jumping_take, arena_give, local_give";
        assert!(
            reason.is_none_or(|reason| reason.ends_with(expected)),
            "{reason:?}"
        );
    }
    let dir = TempDir::new("functions");
    let recorded = every_allocation(&dir)
        .options(&FUNCTIONS)
        .command(&target, &[]);
    // What the program's start has allocated is there, too.
    let blocks = Totals::of(ROUNDS, KEPT, 48);
    for from in ["from_arena", "from_local", "from_outer", "from_jumping"] {
        assert_eq!(sum(recorded.process().through(from)), blocks, "{from}");
    }
}

/// Check that the function itself is not taken for one of as many frames as are wanted.
#[test]
fn stack_depth() {
    let dir = TempDir::new("functions-depth");
    let record = every_allocation(&dir).options(&FUNCTIONS);
    let recorded = record
        .options(&["--stack-depth", "1"])
        .attach(&mut target("functions.c").command(&[]), End::Interrupt);
    let process = recorded.process();
    let names = |function: &str| -> Vec<Vec<&str>> {
        let stacks = process.with_leaf(function).into_iter();
        stacks.map(|stack| stack.names()).collect()
    };
    assert_eq!(names("arena_blocks"), [["arena_blocks", "from_arena"]]);
    assert_eq!(names("jumping_take"), [["jumping_take", "from_jumping"]]);
    assert_eq!(names("from_malloc"), [["from_malloc"]]);
}

/// Check that calls are counted that are not sampled, and what they call is not.
#[test]
fn no_samples() {
    let dir = TempDir::new("functions-none");
    let mut record = Record::with(&dir, &["-i", "0"]).options(&FUNCTIONS);
    if let Some((name, value)) = probe() {
        record = record.env(name, value);
    }
    let recorded = record.attach(&mut target("functions.c").command(&[]), End::Interrupt);
    let process = recorded.process();
    let exact = process.exact();
    assert_eq!(exact.alloc_calls, 5 * ROUNDS + 4);
    assert_eq!(exact.free_calls, 5 * (ROUNDS - KEPT) + 1);
    assert_eq!(process.totals(), Totals::default());
}

/// Check that a pool whose function throws goes on as ever, and is counted: what is allocated
/// for the exception while the function has not ended is no call of the program's.
#[test]
fn throws() {
    let target = target("function_throws.cpp");
    let dir = TempDir::new("functions-throws");
    let functions = [
        "--function=_ZN4Pool4takeEm:size=2",
        "--free-function=_ZN4Pool4giveEPv:ptr=2",
    ];
    let record = every_allocation(&dir).options(&functions);
    let recorded = record.attach(&mut target.command(&[]), End::Interrupt);
    let process = recorded.process();
    let (thrown, kept) = (
        recorded.target.value("thrown"),
        recorded.target.value("kept"),
    );
    assert_eq!((thrown, kept), (300, 300));
    // A quarter is given up and made anew.
    let given = kept / 4;
    let blocks = Totals::of(kept + given, kept, 48);
    assert_eq!(process.totals(), blocks);
    assert_eq!(process.leaf_totals("Pool::take(unsigned long)"), blocks);
    assert_eq!(sum(process.through("after_a_throw")), blocks);
    let exact = process.exact();
    assert_eq!(exact.alloc_calls, kept + given + thrown);
    // The exceptions are given up when they have been caught.
    assert_eq!(exact.free_calls, given + thrown);
}

/// Mean bytes between samples ...
const INTERVAL: &str = "64KiB";
/// ... and blocks of which each is sampled, but for one in 10^13.
const LARGE: u64 = 2 << 20;

/// Check that with -a every process that has the functions is traced by them, that others are
/// traced without, and that options come from the environment.
#[test]
fn everyone() {
    let dir = TempDir::new("functions-all");
    let size = LARGE.to_string();
    let mut pool = Running::spawn(&mut target("functions.c").command(&[&size]));
    let mut other = Running::spawn(&mut target("hold.c").command(&["10", &size]));
    for target in [&pool, &other] {
        target.wait_stdout(|line| line == "ready");
    }
    let (allocating, freeing) = (ALLOCATING.join(" "), FREEING.join(" "));
    let mut environment = vec![
        ("MEMPROF_FUNCTION", allocating.as_str()),
        ("MEMPROF_FREE_FUNCTION", &freeing),
    ];
    environment.extend(probe());
    let options = ["-a", "-i", INTERVAL];
    let daemon = Daemon::start_with(&dir.file("memprof.sock"), &[], &options, &environment);
    for target in [&mut pool, &mut other] {
        target.send("go");
        target.wait_stdout(|line| line == "done");
    }
    let process = |pid: u32, leaf: &str| {
        eventually(|| {
            let response = daemon.get(&format!("/v1/profile?pid={pid}"));
            let processes = (response.status == 200).then(|| Profile::parse(&response.body))?;
            let process = processes.processes.into_iter().next()?;
            // One that turned up a moment ago is still being read.
            let is_named = !process.with_leaf(leaf).is_empty();
            is_named.then_some(process)
        })
    };
    check_pools(&process(pool.pid(), "jumping_take"), LARGE);
    let other = process(other.pid(), "hold_here");
    assert_eq!(other.totals(), Totals::of(10, 10, LARGE));
    daemon.stop();
}

/// Check that a daemon takes the functions from its file, each time for a process that is asked
/// for, and that it refuses one that has not all of them.
#[test]
fn daemon() {
    let dir = TempDir::new("functions-daemon");
    let config = dir.file("memprof.toml");
    let text = format!("function = {ALLOCATING:?}\nfree-function = {FREEING:?}\n");
    fs::write(&config, text).expect("a file");
    let mut pool = Running::spawn(&mut target("functions.c").command(&[]));
    let other = Running::spawn(&mut target("hold.c").command(&["10", "10"]));
    for target in [&pool, &other] {
        target.wait_stdout(|line| line == "ready");
    }
    let environment: Vec<_> = probe().into_iter().collect();
    let options = ["--config", config.as_str()];
    let socket = dir.file("memprof.sock");
    let daemon = Daemon::start_with(&socket, &[pool.pid()], &options, &environment);
    pool.send("go");
    pool.wait_stdout(|line| line == "done");
    let profile = daemon.profile_when(pool.pid(), |profile| {
        let totals = profile.process().totals();
        totals.alloc_objects == 5 * ROUNDS + 3 && totals.inuse_objects == 5 * KEPT + 2
    });
    check_pools(profile.process(), 48);
    let body = format!("{{\"pid\": {}}}", other.pid());
    let refused = http::request_with(Path::new(&socket), "POST", "/v1/targets", &body);
    let text = String::from_utf8_lossy(&refused.body);
    assert_eq!(refused.status, 422, "{text}");
    assert!(text.contains("no function `arena_blocks`"), "{text}");
    daemon.stop();
}

/// Check that memprof shows where it would probe, and how it would see each return.
#[test]
fn check() {
    let pool = Running::spawn(&mut target("functions.c").command(&[]));
    pool.wait_stdout(|line| line == "ready");
    let mut command = memprof(&["check", "-p", &pool.pid().to_string()]);
    command.args(FUNCTIONS);
    let finished = Running::spawn(&mut command).finish();
    finished.expect_code(0);
    let line = |name: &str| {
        let mut lines = finished.stdout.lines();
        let line = lines.find(|line| line.trim_start().starts_with(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("{name}: {}", finished.stdout))
    };
    for name in [
        "arena_blocks",
        "local_take",
        "outer_take",
        "arena_give",
        "local_give",
    ] {
        assert!(line(name).contains("; returns: "), "{}", line(name));
    }
    let jumping = line("jumping_take");
    assert!(jumping.ends_with("; return probe"), "{jumping}");
    assert!(!line("malloc").contains("return"), "{}", line("malloc"));
    let engine = "engine uprobe, no prefilter: functions named by --function";
    assert!(finished.stdout.contains(engine), "{}", finished.stdout);
}

/// Check that what cannot be traced is an error that says what and where, and that nothing is
/// left behind.
#[test]
fn errors() {
    let pool = Running::spawn(&mut target("functions.c").command(&[]));
    pool.wait_stdout(|line| line == "ready");
    let pid = pool.pid().to_string();
    let dir = TempDir::new("functions-errors");
    let file = dir.file("profile.json");
    let run = |options: &[&str]| {
        let mut command = memprof(&["record", "-d", "5", "-o", &file, "-p", &pid]);
        command.args(options).env_remove("MEMPROF_PROBE");
        Running::spawn(&mut command).finish()
    };
    for (options, code, said) in [
        (
            ["--function", "no_such:size=1"].as_slice(),
            1,
            ["no function `no_such`", "functions-"].as_slice(),
        ),
        (
            &[
                "--function",
                "local_take:size=1",
                "--free-function",
                "gone:ptr=1",
            ],
            1,
            &["no function `gone`", "--free-function"],
        ),
        (
            &["--function", "local_take:sise=1"],
            2,
            &[
                "--function <NAME:size=ARG",
                "at character 12, `sise=1`",
                "size=ARG",
            ],
        ),
        (
            &["--function", "local_take:size=7"],
            2,
            &["character 17, `7`", "1 to 6"],
        ),
        (
            &["--function", "local_take"],
            2,
            &["local_take", "behind the name"],
        ),
        (
            &["--function=local_take:size=1", "--free-function=a:size=1"],
            2,
            &["--free-function <NAME:ptr=ARG>", "ptr=ARG is needed"],
        ),
        (
            &[
                "--function=local_take:size=1",
                "--function=local_take:size=1",
            ],
            1,
            &["`local_take` is named twice"],
        ),
        (
            &[
                "--function=local_take:size=1",
                "--free-function=local_take:ptr=1",
            ],
            1,
            &["`local_take` is named twice"],
        ),
        (
            &["--free-function=local_give:ptr=1"],
            1,
            &["needs a --function"],
        ),
        (
            &["--function=malloc:size=1"],
            1,
            &["`malloc`", "without --function"],
        ),
        (
            &["--function=local_take:size=1", "--probe=prefilter"],
            1,
            &["not with --probe prefilter"],
        ),
    ] {
        let finished = run(options);
        finished.expect_no_panic();
        finished.expect_code(code).expect_stderr(said);
        assert!(!fs::exists(&file).expect("a directory"), "{options:?}");
    }
}
