//! Stacks walked by tail calls, as on kernels without `bpf_loop`. `cargo xtask test` runs
//! the tests of the unwinder in this way, too.

use std::{collections::BTreeSet, fs};

use aya::maps::{Map, MapData, MapInfo, ProgramArray};
use memprof_tests::{
    LIMIT, Process, Profile, Record, Running, TempDir, memprof,
    targets::{target, target_with},
};
use nix::sys::signal::Signal;

const BY_TAIL_CALLS: [&str; 4] = ["--probe", "perf", "--walk", "tail-calls"];

/// The most frames that a stack can have.
const MOST: usize = 127;
/// Frames of every stack: `at_the_bottom`, `go_down` of no call, main, and what the C
/// library calls that from.
const LEAST: usize = 6;

/// Check a stack of each depth, however the programs share it among them: whole up to the
/// last frame that there is room for, cut and marked beyond.
#[test]
fn every_depth() {
    let dir = TempDir::new("tail-calls");
    let target = target_with("depths.c", &["-O2", "-fomit-frame-pointer"]);
    let recorded = Record::every_allocation(&dir)
        .options(&BY_TAIL_CALLS)
        .command(&target, &["200"]);
    let process = recorded.process();
    let mut whole = BTreeSet::new();
    let mut cut = 0;
    for stack in process.with_leaf("at_the_bottom") {
        let calls = stack.names().iter().filter(|&&n| n == "go_down").count();
        if stack.end == "complete" {
            assert_eq!(stack.frames.len(), LEAST + calls - 1, "{}", stack.path());
            assert_eq!(stack.totals().alloc_objects, 1, "{}", stack.path());
            whole.insert(calls);
        } else {
            assert_eq!(stack.end, "truncated", "{}", stack.path());
            assert_eq!(stack.frames.len(), MOST, "{}", stack.path());
            cut += stack.totals().alloc_objects;
        }
    }
    let fit = MOST + 1 - LEAST;
    assert_eq!(whole, (1..=fit).collect());
    assert_eq!(cut, 200 - fit as u64);
    assert_eq!(process.loss("truncated_stacks"), cut);
    expect_no_other_loss(process);
}

fn expect_no_other_loss(process: &Process) {
    for (cause, count) in &process.losses {
        assert!(
            cause == "truncated_stacks" || *count == 0,
            "{cause}: {count}"
        );
    }
}

/// Check that a walk which cannot go on is marked, and that its buffer is given back: of
/// a thousand blocks each is there, and none has found all buffers taken.
#[test]
fn broken_off() {
    let dir = TempDir::new("tail-calls");
    let mut target = Running::spawn(&mut target("hold.c").command(&["1000", "48"]));
    target.wait_stdout(|line| line == "ready");
    let file = dir.file("profile.json");
    let mut command = memprof(&["record", "-i", "1", "-f", "json", "-o", &file]);
    command
        .args(BY_TAIL_CALLS)
        .args(["-p", &target.pid().to_string()]);
    let recording = Running::spawn(&mut command);
    recording.wait_stderr(|line| line.starts_with("memprof: recording"));

    program_array(recording.pid())
        .clear_index(&0)
        .expect("an array of one program");
    target.send("go");
    target.wait_stdout(|line| line == "done");
    recording.signal(Signal::SIGINT);
    recording.finish_within(LIMIT).expect_code(0);
    target.close_stdin();
    target.finish().expect_code(0);

    let profile = Profile::read(&file);
    let process = profile.process();
    let totals = process.totals();
    assert_eq!((totals.inuse_objects, totals.inuse_bytes), (1000, 48_000));
    assert!(process.stacks.iter().all(|stack| stack.end == "truncated"));
    assert_eq!(process.loss("truncated_stacks"), 1000);
    expect_no_other_loss(process);
}

/// Where the programs of this memprof find the next one.
fn program_array(pid: u32) -> ProgramArray<MapData> {
    let maps = fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .expect("memprof runs")
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok())
        .filter_map(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("map_id:"))?;
            line.trim().parse().ok()
        });
    let id = maps
        .into_iter()
        .find(|&id| MapInfo::from_id(id).is_ok_and(|info| info.name() == b"WALK_ON"))
        .expect("memprof has the array");
    let data = MapData::from_id(id).expect("the array");
    let map = Map::from_map_data(data).expect("a known type");
    map.try_into().expect("an array of programs")
}
