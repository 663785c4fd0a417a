//! Hazards to unwinding, one a test: the chain of functions has to be whole and right, or
//! cut and marked.

use memprof_tests::{
    Process, Record, Stack, TempDir,
    targets::{Target, target_with},
};

const FLAGS: &[&str] = &["-O2", "-fomit-frame-pointer"];

/// What the C library calls main from.
const START: [&str; 3] = ["__libc_start_call_main", "__libc_start_main_impl", "_start"];

fn hazards(flags: &[&str]) -> Target {
    target_with("hazards.c", &[FLAGS, flags].concat())
}

fn record(target: &Target, arguments: &[&str], options: &[&str]) -> Process {
    let dir = TempDir::new("unwind");
    let record = Record::every_allocation(&dir).options(options);
    record.command(target, arguments).process().clone()
}

/// The stacks that begin in `leaf`.
fn leaves(process: &Process) -> Vec<&Stack> {
    let stacks: Vec<&Stack> = process
        .stacks
        .iter()
        .filter(|stack| names(stack).first() == Some(&"leaf"))
        .collect();
    assert!(!stacks.is_empty(), "nothing was allocated in leaf");
    stacks
}

fn names(stack: &Stack) -> Vec<&str> {
    stack
        .frames
        .iter()
        .map(|frame| frame.function.as_deref().unwrap_or("?"))
        .collect()
}

/// Checks the only stack from `leaf`: its functions, then main and what called it.
fn expect_whole(process: &Process, functions: &[&str]) {
    let stacks = leaves(process);
    assert_eq!(
        stacks.len(),
        1,
        "{:?}",
        stacks.iter().map(|s| names(s)).collect::<Vec<_>>()
    );
    let expected = [&["leaf"], functions, &["main"], &START].concat();
    assert_eq!(names(stacks[0]), expected);
    assert_eq!(stacks[0].end, "complete");
    assert!(!stacks[0].truncated);
}

/// Check programs at any address and at a fixed one.
#[test]
fn fixed_and_free() {
    for flags in [&["-pie"][..], &["-no-pie"]] {
        let process = record(&hazards(flags), &["plain"], &[]);
        expect_whole(&process, &["plain"]);
        assert!(!leaves(&process)[0].by_frame_pointer);
    }
}

/// Check programs that hold the C library themselves.
#[test]
fn static_programs() {
    let process = record(&hazards(&["-static"]), &["plain"], &[]);
    let stacks = leaves(&process);
    assert_eq!(names(stacks[0])[..3], ["leaf", "plain", "main"]);
    assert_eq!(names(stacks[0]).last(), Some(&"_start"));
    assert_eq!(stacks[0].end, "complete");
}

/// Check an allocation in a signal handler: the instruction that was interrupted follows,
/// also when the handler has a stack of its own.
#[test]
fn signal_handlers() {
    for what in ["signal", "sigaltstack"] {
        let process = record(&hazards(&[]), &[what], &[]);
        // What the handler returns to is no function to everyone.
        let returned = names(leaves(&process)[0])[2].to_owned();
        assert!(returned == "?" || returned == "__restore_rt", "{returned}");
        expect_whole(&process, &["on_signal", &returned, "interrupted"]);
    }
}

/// Check that a thread's stack ends where the C library made it.
#[test]
fn threads() {
    let process = record(&hazards(&[]), &["thread"], &[]);
    let stacks = leaves(&process);
    let names = names(stacks[0]);
    assert_eq!(names[..3], ["leaf", "thread_main", "start_thread"]);
    assert!(names[3].contains("clone3"), "{names:?}");
    assert_eq!((names.len(), stacks[0].end.as_str()), (4, "complete"));
}

/// Check that a coroutine's stack, a block of the heap, ends at its first function.
#[test]
fn coroutines() {
    let process = record(&hazards(&[]), &["coroutine"], &[]);
    let stacks = leaves(&process);
    let names = names(stacks[0]);
    assert_eq!(names[..2], ["leaf", "coroutine_body"]);
    assert!(names.len() <= 3, "{names:?}");
    assert_eq!(stacks[0].end, "complete");
}

/// Check that a stack deeper than the limit is cut there, marked and counted.
#[test]
fn deep_recursion() {
    let process = record(&hazards(&[]), &["recursion"], &[]);
    let stacks = leaves(&process);
    let names = names(stacks[0]);
    assert_eq!(names.len(), 127);
    assert!(
        names[1..].iter().all(|name| *name == "recurse"),
        "{names:?}"
    );
    assert_eq!(stacks[0].end, "truncated");
    assert!(stacks[0].truncated);
    assert_eq!(process.loss("truncated_stacks"), 1);
}

/// Check frames that are larger than a rule of 32 bits can tell.
#[test]
fn large_frames() {
    let process = record(&hazards(&[]), &["large"], &[]);
    expect_whole(&process, &["large"; 5]);
}

/// Check code that the program makes at run time: passed through by its frame pointer,
/// unless that is forbidden; by the kernel, nothing is known of the end.
#[test]
fn generated_code() {
    let target = hazards(&[]);
    let process = record(&target, &["generated"], &[]);
    // By the name that the program gives it, which is found though file and process are gone.
    expect_whole(&process, &["made_at_run_time", "generated"]);
    assert!(leaves(&process)[0].by_frame_pointer);

    let process = record(&target, &["generated"], &["--unwind", "dwarf"]);
    let stacks = leaves(&process);
    assert_eq!(names(stacks[0]), ["leaf", "made_at_run_time"]);
    assert_eq!(stacks[0].end, "no_unwind_info");
    assert_eq!(process.loss("cut_no_unwind_info"), 1);

    let process = record(&target, &["generated"], &["--unwind", "fp"]);
    let end = leaves(&process)[0].end.clone();
    assert!(end == "unverified" || end == "broken_chain", "{end}");
}

/// Check assembly that nothing describes: the stack is cut there, marked and counted.
#[test]
fn undescribed_code() {
    let process = record(&hazards(&[]), &["undescribed"], &[]);
    let stacks = leaves(&process);
    assert_eq!(names(stacks[0]), ["leaf", "undescribed"]);
    assert_eq!(stacks[0].end, "no_unwind_info");
    assert!(stacks[0].truncated);
    assert_eq!(process.loss("cut_no_unwind_info"), 1);
}

/// Check a function whose last instruction is a call.
#[test]
fn calls_without_return() {
    let process = record(&hazards(&[]), &["noreturn"], &[]);
    expect_whole(&process, &["leave", "ends_in_call"]);
}

/// Check libraries that are loaded while the program is traced, each where the one before
/// may have been, and one of which only `.debug_frame` tells.
#[test]
fn plugins() {
    let library = |flags: &[&str]| {
        let all = [&["-shared", "-fPIC"], FLAGS, flags].concat();
        target_with("plugin.c", &all)
    };
    let described = library(&[]);
    let larger = library(&["-DROOM=50"]);
    let debug_only = library(&["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]);
    for plugins in [[&described, &larger], [&larger, &debug_only]] {
        let arguments = ["plugin", plugins[0].text(), plugins[1].text()];
        let process = record(&hazards(&[]), &arguments, &[]);
        let stacks = leaves(&process);
        assert_eq!(stacks.len(), 2);
        for stack in stacks {
            let expected = [&["leaf", "plugin_call", "plugin", "main"][..], &START].concat();
            assert_eq!(names(stack), expected);
            assert_eq!(stack.end, "complete");
        }
    }
}

/// Check musl's C library, which describes little of itself: the program's own functions
/// are all there, and a stack that does not end well is cut behind main, and marked.
#[test]
fn musl() {
    let specs = "-specs=/usr/lib/x86_64-linux-musl/musl-gcc.specs";
    for flags in [&[specs][..], &[specs, "-static"]] {
        let process = record(&hazards(flags), &["plain"], &[]);
        let stacks = leaves(&process);
        assert_eq!(
            names(stacks[0])[..3],
            ["leaf", "plain", "main"],
            "{flags:?}"
        );
        let end = stacks[0].end.as_str();
        assert!(
            ["complete", "no_unwind_info"].contains(&end),
            "{flags:?}: {end}"
        );
    }
}
