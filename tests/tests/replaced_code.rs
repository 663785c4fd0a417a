//! Libraries that are mapped where others have been: stacks with the same addresses are of
//! the code that was there when they were captured.

use std::collections::BTreeMap;

use memprof_tests::{
    Process, Record, Stack, TempDir,
    targets::{Target, target_with},
};

/// Blocks that are allocated through a library each time it is loaded.
const CALLS: u64 = 10;

fn library(inner: &str) -> Target {
    let inner = format!("-DINNER={inner}");
    let flags = ["-shared", "-fPIC", "-O2", "-fomit-frame-pointer", &inner];
    target_with("replaced_plugin.c", &flags)
}

fn program() -> Target {
    target_with("replaced.c", &["-O2", "-fomit-frame-pointer"])
}

fn record(arguments: &[&str]) -> Process {
    let dir = TempDir::new("replaced");
    let record = Record::every_allocation(&dir);
    let recorded = record.command(&program(), arguments);
    recorded.process().clone()
}

/// The stacks from `leaf`, by what called it.
fn by_library(process: &Process) -> BTreeMap<&str, Vec<&Stack>> {
    let mut stacks: BTreeMap<&str, Vec<&Stack>> = BTreeMap::new();
    for stack in process.with_leaf("leaf") {
        stacks.entry(stack.names()[1]).or_default().push(stack);
    }
    stacks
}

fn bytes(stacks: &[&Stack]) -> u64 {
    stacks.iter().map(|stack| stack.totals().alloc_bytes).sum()
}

/// Check that two libraries which were at one place in turn, again and again, have a
/// complete stack each, with the right names and the right bytes.
#[test]
fn one_place_two_libraries() {
    let (first, second) = (library("first_inner"), library("other_inner"));
    let paths = [&first, &second, &first, &second, &second].map(|library| library.text());
    let process = record(&[&["300", "same"][..], &paths].concat());
    let found = by_library(&process);
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        [&"first_inner", &"other_inner"]
    );
    for (inner, sum) in [("first_inner", 2 * 1000), ("other_inner", 3 * 2000)] {
        let stacks = &found[inner];
        let paths: Vec<String> = stacks.iter().map(|stack| stack.path()).collect();
        assert_eq!(stacks.len(), 1, "{paths:?}");
        assert_eq!(stacks[0].end, "complete");
        assert_eq!(
            stacks[0].names()[..5],
            ["leaf", inner, "plugin_call", "run", "main"]
        );
        let module = stacks[0].frames[1].module.as_deref();
        let library = if inner == "first_inner" {
            &first
        } else {
            &second
        };
        assert_eq!(module, Some(library.text()));
        assert_eq!(bytes(stacks), sum * CALLS);
    }
}

/// Check libraries that allocate as soon as they are loaded: no block is booked for the
/// other one, and a stack that goes on behind a library goes on rightly, or is marked.
#[test]
fn as_soon_as_it_is_there() {
    let (first, second) = (library("first_inner"), library("other_inner"));
    let paths = [&first, &second].map(|library| library.text()).repeat(20);
    let process = record(&[&["0", "same"][..], &paths].concat());
    let found = by_library(&process);
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        [&"first_inner", &"other_inner"]
    );
    assert_eq!(bytes(&found["first_inner"]), 20 * 1000 * CALLS);
    assert_eq!(bytes(&found["other_inner"]), 20 * 2000 * CALLS);
    for stack in found.values().flatten() {
        let names = stack.names();
        if stack.truncated {
            assert_eq!(names.len(), 2, "{}: {}", stack.end, stack.path());
        } else {
            assert_eq!(
                names[2..5],
                ["plugin_call", "run", "main"],
                "{}",
                stack.path()
            );
        }
    }
}

/// Check that a library which is loaded at another place each time has one stack.
#[test]
fn one_library_many_places() {
    let first = library("first_inner");
    let process = record(&[&["300", "other"][..], &[first.text(); 3]].concat());
    let found = by_library(&process);
    let stacks = &found["first_inner"];
    assert_eq!((found.len(), stacks.len()), (1, 1));
    assert_eq!(stacks[0].end, "complete");
    assert_eq!(bytes(stacks), 3 * 1000 * CALLS);
}
