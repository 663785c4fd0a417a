//! Stacks beside gdb's backtrace at the same call.

use std::{path::Path, process::Command};

use memprof_tests::{
    Profile, Running, Stack, TempDir, memprof, running::LONG_LIMIT, targets::target_with,
};

/// A frame as module and place of its call in the file.
type Place = (String, u64);

/// What memprof says: the stack of the largest block that was allocated once.
fn by_memprof(words: &[&str]) -> (u64, Vec<Place>) {
    let dir = TempDir::new("gdb");
    let file = dir.file("profile.json");
    let mut command = memprof(&["record", "-i", "1", "-f", "json", "-o", &file, "--"]);
    command.args(words);
    Running::spawn(&mut command)
        .finish_within(LONG_LIMIT)
        .expect_code(0);
    let profile = Profile::read(&file);
    let stack: &Stack = profile
        .process()
        .stacks
        .iter()
        .filter(|stack| stack.alloc_objects == 1)
        .max_by_key(|stack| stack.alloc_bytes)
        .expect("a block that was allocated once");
    assert_eq!(stack.end, "complete");
    let mut places: Vec<Place> = Vec::new();
    for frame in &stack.frames {
        let place = (
            frame.module.clone().expect("a module"),
            frame.file_offset.expect("a place in it"),
        );
        // Functions that the compiler has put into one another share a place.
        if places.last() != Some(&place) {
            places.push(place);
        }
    }
    (stack.alloc_bytes, places)
}

/// What gdb says at the first call of malloc for as many bytes.
fn by_gdb(bytes: u64, words: &[&str]) -> Vec<Place> {
    let stop = format!("break malloc if $rdi == {bytes}");
    let mut command = Command::new("gdb");
    command.args(["-nx", "-batch", "-ex", "set breakpoint pending on"]);
    command.args(["-ex", "set debuginfod enabled off"]);
    command.args(["-ex", "set backtrace past-main on"]);
    for step in [
        "break __libc_start_main",
        "run",
        &stop,
        "continue",
        "info proc mappings",
        "bt",
    ] {
        command.args(["-ex", step]);
    }
    command.arg("--args").args(words);
    let gdb = Running::spawn(&mut command).finish_within(LONG_LIMIT);
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let mappings: Vec<(u64, u64, u64, &str)> = gdb
        .stdout
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [start, end, _size, offset, .., path] = fields[..] else {
                return None;
            };
            path.starts_with('/')
                .then_some((number(start)?, number(end)?, number(offset)?, path))
        })
        .collect();
    let frames: Vec<Place> = gdb
        .stdout
        .lines()
        .filter(|line| line.starts_with('#'))
        // The first is malloc itself.
        .skip(1)
        .map(|line| {
            let address = line
                .split_whitespace()
                .nth(1)
                .and_then(number)
                .unwrap_or_else(|| panic!("no address in `{line}`: {gdb}"));
            let call = address - 1;
            let (start, _, offset, path) = mappings
                .iter()
                .find(|(start, end, ..)| (*start..*end).contains(&call))
                .unwrap_or_else(|| panic!("no mapping of {address:#x}: {gdb}"));
            ((*path).to_owned(), call - start + offset)
        })
        .collect();
    assert!(!frames.is_empty(), "{gdb}");
    frames
}

/// Frames that gdb shows for functions that the compiler has put into one another have
/// one place too.
fn expect_alike(words: &[&str]) {
    assert!(Path::new(words[0]).exists(), "the tests need {}", words[0]);
    let (bytes, ours) = by_memprof(words);
    let mut theirs = by_gdb(bytes, words);
    theirs.dedup();
    assert_eq!(ours, theirs, "a block of {bytes} bytes");
    assert!(ours.len() > 4);
}

/// Check a C program without frame pointers.
#[test]
fn c() {
    let target = target_with("hazards.c", &["-O2", "-fomit-frame-pointer"]);
    expect_alike(&[target.text(), "plain"]);
}

/// Check Debian's python3.
#[test]
fn python() {
    expect_alike(&[
        "/usr/bin/python3",
        "-S",
        "-c",
        "[bytearray(7654321) for _ in [0]]",
    ]);
}

/// Check Debian's sqlite3.
#[test]
fn sqlite() {
    let query = "select length(randomblob(7654321));";
    expect_alike(&["/usr/bin/sqlite3", ":memory:", query]);
}
