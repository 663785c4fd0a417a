//! Shapes of frames, one a test: the functions behind each have to be the right ones.

use memprof_tests::{Process, Record, Stack, TempDir, targets::target_with};

const FLAGS: &[&str] = &["-O2", "-fomit-frame-pointer"];

/// What the C library calls main from.
const START: [&str; 3] = ["__libc_start_call_main", "__libc_start_main_impl", "_start"];

fn record(what: &str, options: &[&str]) -> Process {
    let dir = TempDir::new("unwind-frames");
    let record = Record::every_allocation(&dir).options(options);
    record
        .command(&target_with("frames.c", FLAGS), &[what])
        .process()
        .clone()
}

/// The only stack that begins in `leaf`, and its functions.
fn leaf(process: &Process) -> (&Stack, Vec<&str>) {
    let mut found = process.stacks.iter().filter_map(|stack| {
        let names: Vec<&str> = stack
            .frames
            .iter()
            .map(|frame| frame.function.as_deref().unwrap_or("?"))
            .collect();
        (names.first() == Some(&"leaf")).then_some((stack, names))
    });
    let only = found.next().expect("an allocation in leaf");
    assert!(found.next().is_none(), "one call, one stack");
    only
}

fn expect_whole(what: &str, functions: &[&str]) {
    // Frame pointers may not help out.
    let process = record(what, &["--unwind", "dwarf"]);
    let (stack, names) = leaf(&process);
    let expected = [&["leaf"], functions, &["main"], &START].concat();
    assert_eq!(names, expected, "{what}");
    assert_eq!((stack.end.as_str(), stack.truncated), ("complete", false));
}

/// Check a frame of three megabytes.
#[test]
fn large() {
    expect_whole("large", &["large"]);
}

/// Check a frame whose size only rbp tells (alloca).
#[test]
fn dynamic() {
    expect_whole("dynamic", &["dynamic"]);
}

/// Check frames that begin at a multiple of 128 or 64, without alloca and with it.
#[test]
fn realigned() {
    expect_whole("realigned", &["realigned"]);
    expect_whole("realigned_dynamic", &["realigned_dynamic"]);
}

/// Check that code which uses rbp for a number is walked through, and that rbp is right
/// again where the caller's frame counts from it.
#[test]
fn rbp_used_freely() {
    expect_whole("free_rbp", &["free_rbp", "outer"]);
}

/// Check assembly whose author has described it, with states that are remembered and
/// restored and with words pushed for a call.
#[test]
fn by_hand() {
    expect_whole("by_hand", &["by_hand", "by_hand_called", "outer"]);
}

/// Check that an expression beyond the common ones cuts the stack there: marked, counted,
/// and no frame made up.
#[test]
fn uncommon_expression() {
    let process = record("expression", &[]);
    let (stack, names) = leaf(&process);
    assert_eq!(names, ["leaf", "expression"]);
    assert_eq!(
        (stack.end.as_str(), stack.truncated),
        ("unsupported_rule", true)
    );
    let cut = process.losses.get("cut_unsupported_rule").copied();
    assert_eq!(cut, Some(1));
}
