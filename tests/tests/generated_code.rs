//! Code that compilers make at run time: its names, and the way through it to the frames
//! of the program below.

use std::{fs, path::Path, process::Command};

use memprof_tests::{Profile, Running, Stack, TempDir, memprof, running::LONG_LIMIT};
use nix::sys::signal::Signal;

fn source(name: &str) -> String {
    format!("{}/targets/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Records `target`, which has compiled what it runs and is told to run it, until it is
/// done; `prepare` is given its pid before.
fn record(dir: &TempDir, target: &mut Command, prepare: impl FnOnce(u32)) -> Vec<Stack> {
    let mut target = Running::spawn(target);
    target.wait_stdout_for(LONG_LIMIT, |line| line == "ready");
    prepare(target.pid());
    let file = dir.file("profile.json");
    let pid = target.pid().to_string();
    let mut command = memprof(&["record", "-i", "1", "-f", "json", "-o", &file, "-p", &pid]);
    let recording = Running::spawn(&mut command);
    recording.wait_stderr(|line| line.starts_with("memprof: recording"));
    target.send("go");
    target.wait_stdout_for(LONG_LIMIT, |line| line == "done");
    recording.signal(Signal::SIGINT);
    recording.finish_within(LONG_LIMIT).expect_code(0);
    target.close_stdin();
    target.finish().expect_code(0);
    let _ = fs::remove_file(format!("/tmp/perf-{pid}.map"));
    Profile::read(&file).process().stacks.clone()
}

/// How many blocks, of about 70,000 bytes each, have a whole stack; and how many there
/// are. What is said to be whole has to pass through `functions`, inner first, and end in
/// `end`.
fn through(stacks: &[Stack], functions: &[&str], end: &str) -> (u64, u64) {
    let is_one = |stack: &&Stack| stack.alloc_bytes / stack.alloc_objects.max(1) / 100 == 700;
    let all: Vec<&Stack> = stacks.iter().filter(is_one).collect();
    let whole = all.iter().filter(|stack| {
        let names = stack.names();
        let mut names_left = names.iter();
        let has_all = functions
            .iter()
            .all(|wanted| names_left.any(|name| name.contains(wanted)));
        let ends = names.last().is_some_and(|name| name.contains(end));
        let is_whole = stack.end == "complete";
        assert!(!is_whole || has_all && ends, "{}", stack.path());
        is_whole && stack.by_frame_pointer
    });
    let whole = whole.map(|stack| stack.alloc_objects).sum();
    (whole, all.iter().map(|stack| stack.alloc_objects).sum())
}

fn paths(stacks: &[Stack]) -> Vec<String> {
    stacks
        .iter()
        .map(|stack| format!("{} {}: {}", stack.alloc_objects, stack.end, stack.path()))
        .collect()
}

/// Check JavaScript in node: its functions by name, compiled and interpreted ones, the C++
/// functions that they call and those that call them. `prefix` runs node.
fn expect_node(prefix: &[&str]) {
    assert!(Path::new("/usr/bin/node").exists(), "the tests need node");
    let dir = TempDir::new("generated");
    let script = source("generated.js");
    let words = [
        "/usr/bin/node",
        "--perf-basic-prof",
        "--interpreted-frames-native-stack",
        &script,
    ];
    let words = [prefix, &words].concat();
    let mut target = Command::new(words[0]);
    // It leaves a log where it runs.
    target.current_dir(dir.path());
    let stacks = record(&dir, target.args(&words[1..]), |_| {});
    let wanted = [
        "AllocateUninitialized",
        "round",
        "listOnTimeout",
        "uv_run",
        "node::Start",
    ];
    let (whole, all) = through(&stacks, &wanted, "_start");
    println!("node {prefix:?}: {whole} of {all} stacks are whole");
    assert!(all >= 1000, "{all}");
    // In the first rounds V8 maps what memprof learns of a moment later.
    assert!(
        whole * 100 >= all * 80,
        "{whole} of {all}: {:#?}",
        paths(&stacks)
    );
}

/// Check node as anybody runs it.
#[test]
fn node() {
    expect_node(&[]);
}

/// Check node that has a /tmp of its own, in which it names its code.
#[test]
fn node_in_a_namespace() {
    // The script may be below /tmp itself.
    let own_tmp = "for script; do :; done; text=$(cat \"$script\") && mount -t tmpfs tmpfs /tmp \
         && { [ -e \"$script\" ] || { mkdir -p \"${script%/*}\" \
         && printf '%s\\n' \"$text\" >\"$script\"; }; } && exec \"$@\"";
    expect_node(&["unshare", "--mount", "sh", "-c", own_tmp, "sh"]);
}

/// Runs Java with `flags`, and expects every stack to go through all of `methods`, down to
/// the C function that allocates and up to the one that started the thread.
fn expect_java(flags: &[&str], methods: &[&str]) {
    assert!(Path::new("/usr/bin/java").exists(), "the tests need java");
    let dir = TempDir::new("generated");
    let compiled = Command::new("javac")
        .args(["-nowarn", "-d", &dir.file(""), &source("Generated.java")])
        .output()
        .expect("the tests need javac");
    assert!(compiled.status.success(), "{compiled:?}");
    let mut target = Command::new("java");
    target.args(["-Xmx64m", "-XX:+UseSerialGC", "-XX:+PreserveFramePointer"]);
    target.args(flags).args(["-cp", &dir.file(""), "Generated"]);
    let stacks = record(&dir, &mut target, |pid| {
        let wrote = Command::new("jcmd")
            .args([&pid.to_string(), "Compiler.perfmap"])
            .output()
            .expect("the tests need jcmd");
        assert!(wrote.status.success(), "{wrote:?}");
    });
    let native = ["os::malloc", "Unsafe_AllocateMemory0"];
    let wanted = [&native, methods, &["JavaCalls::call_helper", "JavaMain"]].concat();
    let (whole, all) = through(&stacks, &wanted, "clone3");
    println!("java {flags:?}: {whole} of {all} stacks are whole");
    assert_eq!(all, 500);
    assert_eq!(whole, all, "{:#?}", paths(&stacks));
}

/// Check methods that are compiled before they run, by name.
#[test]
fn java_compiled() {
    let mut flags = vec!["-Xcomp", "-XX:CompileCommand=quiet"];
    let only = ["Generated", "jdk.internal.misc.Unsafe", "sun.misc.Unsafe"]
        .map(|class| format!("-XX:CompileCommand=compileonly,{class}::*"));
    flags.extend(only.iter().map(String::as_str));
    expect_java(&flags, &["allocateMemory0", "Generated.main"]);
}

/// Check methods that are interpreted: the interpreter returns to places behind no call.
#[test]
fn java_interpreted() {
    expect_java(&["-Xint"], &["Interpreter"]);
}

/// Check Java as anybody runs it: what is compiled, and when, is up to it.
#[test]
fn java_mixed() {
    expect_java(&[], &[]);
}
