//! Stacks from where programs are hard to unwind: a library of more than 100 MB, the
//! loader before main, a program that has replaced another.

use std::{collections::BTreeSet, thread, time::Duration};

use memprof_tests::{
    Profile, Record, Running, Stack, TempDir,
    engine::is_prefilter,
    memprof,
    profile::Frame,
    record::End,
    running::LONG_LIMIT,
    targets::{target, target_with},
};

const FLAGS: &[&str] = &["-O2", "-fomit-frame-pointer"];

fn expect_complete(stack: &Stack) {
    assert_eq!(stack.end, "complete", "{}", stack.path());
    assert!(!stack.by_frame_pointer, "{}", stack.path());
}

/// Check walks through Debian's libLLVM: every one of thousands of stacks is whole.
#[test]
fn large_library() {
    let dir = TempDir::new("places");
    let target = target_with("llvm.c", FLAGS);
    let record = Record::with(&dir, &["-i", "512"]).limit(LONG_LIMIT);
    let recorded = record.attach(&mut target.command(&["20"]), End::TargetExits);
    let process = recorded.process();
    let mut through = 0;
    let mut deepest = 0;
    for stack in process.through("optimize") {
        let inside = stack.frames.iter();
        let inside = inside
            .filter(|frame| is_in(Some(frame), "/libLLVM"))
            .count();
        assert!(
            stack.names().ends_with(&[
                "main",
                "__libc_start_call_main",
                "__libc_start_main_impl",
                "_start"
            ]),
            "{}",
            stack.path()
        );
        expect_complete(stack);
        through += usize::from(inside > 0);
        deepest = deepest.max(inside);
    }
    println!(
        "{} stacks, {through} through libLLVM, up to {deepest} frames there",
        process.stacks.len()
    );
    assert!(through > 1000, "{through}");
    assert!(deepest > 15, "{deepest}");
    // None went elsewhere.
    let cut: Vec<String> = process
        .stacks
        .iter()
        .filter(|stack| stack.end != "complete")
        .map(Stack::path)
        .collect();
    assert!(cut.is_empty(), "{cut:#?}");
}

/// Whether a frame is in a file whose path has `part`.
fn is_in(frame: Option<&Frame>, part: &str) -> bool {
    let module = frame.and_then(|frame| frame.module.as_deref());
    module.is_some_and(|module| module.contains(part))
}

/// Check what is allocated before main: by a constructor of a preloaded library, by the
/// loader itself, which that constructor has load another, and by the program's own. Each
/// stack is whole, the first two up to the loader's first function.
#[test]
fn before_main() {
    let dir = TempDir::new("places");
    let program = target_with("early.c", FLAGS);
    let library = [FLAGS, &["-shared", "-fPIC"]].concat();
    let preloaded = target_with("early.c", &[&library[..], &["-DPRELOAD"]].concat());
    let file = dir.file("profile.json");
    let mut command = memprof(&["record", "-i", "1", "-f", "json", "-o", &file, "--"]);
    command.arg(program.text());
    command.env("LD_PRELOAD", preloaded.text());
    command.env("EARLY", target_with("plugin.c", &library).text());
    Running::spawn(&mut command).finish().expect_code(0);

    let profile = Profile::read(&file);
    let mut by_loader = 0;
    for stack in &profile.process().stacks {
        expect_complete(stack);
        let names = stack.names();
        let is_early = names.contains(&"in_library") || names.contains(&"loads");
        assert_eq!(
            is_in(stack.frames.last(), "/ld-linux"),
            is_early,
            "{names:?}"
        );
        by_loader +=
            usize::from(names.contains(&"loads") && is_in(stack.frames.first(), "/ld-linux"));
    }
    assert!(
        by_loader >= 3,
        "what the loader allocates itself: {by_loader}"
    );
    let early: Vec<&Stack> = profile.process().with_leaf("early");
    let callers: BTreeSet<&str> = early.iter().map(|stack| stack.names()[1]).collect();
    assert_eq!(callers, BTreeSet::from(["in_library", "in_program"]));
}

/// Check that stacks are whole in a program that has replaced another, by its own tables.
#[test]
fn after_exec() {
    let dir = TempDir::new("places");
    let file = dir.file("profile.json");
    let hold = target_with("hold.c", FLAGS);
    let mut becoming = Running::spawn(&mut target("exec.c").command(&[hold.text(), "17", "170"]));
    becoming.wait_stdout(|line| line == "ready");
    let pid = becoming.pid().to_string();
    let mut command = memprof(&["record", "-i", "1", "-o", &file, "-p", &pid]);
    let recording = Running::spawn(command.env("MEMPROF_LOG", "info"));
    recording.wait_stderr(|line| line.starts_with("memprof: recording"));
    becoming.send("go");
    // The prefilter does not see calls before it is in the new program.
    let told = if is_prefilter() {
        "the new program is hooked"
    } else {
        "has replaced its program"
    };
    recording.wait_stderr(|line| line.contains(told));
    // Within that time tables are there.
    thread::sleep(Duration::from_millis(100));
    becoming.send_last("go");
    becoming.wait_stdout(|line| line == "done");
    becoming.finish().expect_code(0);
    recording.finish().expect_code(0);

    let profile = Profile::read(&file);
    let stack = profile.processes[1].only_stack("hold_here");
    let start = ["__libc_start_call_main", "__libc_start_main_impl", "_start"];
    assert_eq!(stack.names(), [&["hold_here", "main"][..], &start].concat());
    expect_complete(stack);
    assert_eq!(stack.alloc_objects, 17);
}
