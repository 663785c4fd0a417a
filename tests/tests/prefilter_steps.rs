//! What becomes of a process whose memprof dies: a test for each row of the table of steps in
//! docs/prefilter.md, named by it. The memprof of the tests kills itself at the step that
//! `MEMPROF_DIE_AT` names (memprof-daemon/src/prefilter/step.rs), which one that is delivered
//! cannot.

#![cfg(debug_assertions)]

use std::{fs, fs::File, os::unix::fs::FileExt as _, os::unix::process::ExitStatusExt as _};

use memprof_tests::{
    Running, TempDir,
    code::AllocatorCode,
    daemon::eventually,
    engine::cleanup,
    hold::{self, Hold},
    memprof, target,
};
use nix::sys::signal::Signal;

const NAME: &str = "/memfd:memprof-prefilter";
/// `free` and its kin are the first.
const HOOKED: usize = 9;

/// Starts a recording that kills itself at the step `name`, the `count`-th of that name.
/// False if it came to its end, since it has fewer.
fn dies_at(dir: &TempDir, pid: u32, name: &str, count: u32) -> bool {
    let file = dir.file("dies.json");
    let mut command = memprof::memprof(&["record", "--probe", "prefilter", "-f", "json"]);
    command.args(["-d", "0.05", "-o", &file, "-p", &pid.to_string()]);
    // The machine may have other things to do.
    command.args(["--attach-timeout", "20"]);
    command.env("MEMPROF_DIE_AT", format!("{name}:{count}"));
    let finished = Running::spawn(&mut command).finish();
    if finished.status.signal() == Some(Signal::SIGKILL as i32) {
        return true;
    }
    finished.expect_code(0);
    false
}

/// All that is mapped, but the heap, which the program itself changes.
fn maps(pid: u32) -> Vec<String> {
    hold::maps(pid)
        .lines()
        .filter(|line| !line.contains("[heap]"))
        .map(str::to_owned)
        .collect()
}

/// The mappings of the memory file: from where, and whether they are code.
fn ours(pid: u32) -> Vec<(u64, bool)> {
    let ours = maps(pid).into_iter().filter(|line| line.contains(NAME));
    ours.map(|line| {
        let start = line.split('-').next().unwrap_or_default();
        let start = u64::from_str_radix(start, 16).expect("an address");
        (start, line.contains("r-xp"))
    })
    .collect()
}

/// Descriptors of it.
fn files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("descriptors")
        .flatten()
        .filter(|entry| {
            let file = fs::read_link(entry.path()).unwrap_or_default();
            file.to_string_lossy().contains(NAME)
        })
        .count()
}

/// The functions that begin otherwise than in their file.
fn changed(pid: u32) -> Vec<String> {
    AllocatorCode::in_memory(pid).changed_from(&AllocatorCode::in_file(pid))
}

/// The process whose memprof dies.
fn victim() -> Hold {
    let mut hold = Hold::start();
    // Its heap is made now.
    hold.go();
    hold
}

/// Kills memprof at the steps of a name, from `first` to `last` if there are as many, each
/// time with `check` of the process in that state; then it goes on to allocate, and what is
/// left is taken out, by hand and by the next recording in turns. Maps, text and descriptors
/// are then as before. How many steps there were.
#[track_caller]
fn at_each(name: &str, first: u32, last: u32, check: impl Fn(u32, u32)) -> u32 {
    let dir = TempDir::new("steps");
    let mut hold = victim();
    let pid = hold.pid();
    let before = maps(pid);
    let mut count = first;
    while count <= last && dies_at(&dir, pid, name, count) {
        check(pid, count);
        hold.go();
        if count.is_multiple_of(4) {
            // The next one dies at nothing.
            assert!(!dies_at(&dir, pid, "Nothing", 1));
        } else {
            let said = cleanup(pid);
            assert!(said.contains("pid"), "{said}");
        }
        assert_eq!(maps(pid), before, "{name}:{count}");
        assert_eq!(changed(pid), [""; 0], "{name}:{count}");
        assert_eq!(files(pid), 0, "{name}:{count}");
        assert!(cleanup(pid).contains("no prefilter is in it"));
        hold.go();
        count += 1;
    }
    hold.finish();
    count - first
}

/// Kills memprof at one step under threads that allocate, fork and get signals, and that fail
/// if a block is not as it was; `cleanup` takes out what is left.
#[track_caller]
fn under_a_storm(name: &str, count: u32) {
    let dir = TempDir::new("steps");
    let mut storm = Running::spawn(&mut target("storm.c").command(&["8"]));
    storm.wait_stdout(|line| line == "ready");
    let pid = storm.pid();
    assert!(dies_at(&dir, pid, name, count), "{name}:{count}");
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(storm.is_running(), "{name}:{count}");
    let _ = cleanup(pid);
    assert_eq!(changed(pid), [""; 0], "{name}:{count}");
    assert_eq!((ours(pid).len(), files(pid)), (0, 0), "{name}:{count}");
    storm.send_last("over");
    storm.finish().expect_code(0);
}

/// Check row 1: after the checks nothing is in the process.
#[test]
fn step_1_checks() {
    let died = at_each("Checked", 1, 1, |pid, _| {
        assert_eq!((ours(pid).len(), files(pid)), (0, 0));
        assert_eq!(changed(pid), [""; 0]);
    });
    assert_eq!(died, 1);
}

/// Check row 2: after each call in the process, and between its choice and its being made,
/// what is mapped leads nowhere and is known by its name, and so is the open file.
#[test]
fn step_2_calls() {
    // memfd_create, two for the data, one for the code, two for its private part, close.
    const CALLS: u32 = 7;
    for name in ["CallChosen", "AtExit"] {
        let died = at_each(name, 1, CALLS, |pid, count| {
            assert_eq!(changed(pid), [""; 0]);
            // A call that was chosen is still made.
            eventually(|| {
                let is_open = files(pid) == usize::from(count < CALLS);
                (is_open && ours(pid).is_empty() == (count == 1)).then_some(())
            });
        });
        assert_eq!(died, CALLS, "{name}");
    }
    under_a_storm("FrameWritten", 1);
    under_a_storm("Parked", 2);
    under_a_storm("AtExit", 1);
    under_a_storm("AtExit", 4);
    under_a_storm("AtExit", 6);
}

/// Check row 3: data and stubs stay, and nothing leads to them.
#[test]
fn step_3_mapped() {
    let died = at_each("Mapped", 1, 1, |pid, _| {
        assert_eq!(ours(pid).iter().filter(|(_, is_code)| *is_code).count(), 1);
        assert_eq!(files(pid), 0);
        assert_eq!(changed(pid), [""; 0]);
    });
    assert_eq!(died, 1);
    under_a_storm("Mapped", 1);
}

/// Check row 4: the kernel takes its breakpoints out of the stubs.
#[test]
fn step_4_probed() {
    let died = at_each("Probed", 1, 1, |pid, _| {
        assert_eq!(changed(pid), [""; 0]);
        assert_stubs_as_in_file(pid);
    });
    assert_eq!(died, 1);
    under_a_storm("Probed", 1);
}

/// What is mapped is what the file has: no breakpoints.
fn assert_stubs_as_in_file(pid: u32) {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let code = text
        .lines()
        .find(|line| line.contains(NAME) && line.contains("r-xp"))
        .expect("code");
    let fields: Vec<&str> = code.split_whitespace().collect();
    let number = |text: &str| u64::from_str_radix(text, 16).expect("a number");
    let (start, end) = fields[0].split_once('-').expect("a range");
    let length = usize::try_from(number(end) - number(start)).expect("a length");
    let (mut file, mut memory) = (vec![0; length], vec![0; length]);
    File::open(format!("/proc/{pid}/map_files/{}", fields[0]))
        .expect("the file")
        .read_exact_at(&mut file, number(fields[2]))
        .expect("what the file has");
    // The kernel does so when the last of memprof is gone.
    eventually(|| {
        File::open(format!("/proc/{pid}/mem"))
            .expect("memory")
            .read_exact_at(&mut memory, number(start))
            .expect("what is mapped");
        (memory == file).then_some(())
    });
}

/// Check row 5: all threads stand, and go on.
#[test]
fn step_5_all_stopped() {
    // The first stop is for the calls.
    let died = at_each("Stopped", 2, 2, |pid, _| assert_eq!(changed(pid), [""; 0]));
    assert_eq!(died, 1);
    under_a_storm("Stopped", 2);
}

/// Check row 6: after each jump, `free` first, and after the flag; those that are written
/// work, switched off or on.
#[test]
fn step_6_jumps() {
    let died = at_each("CodeWritten", 1, HOOKED as u32, |pid, count| {
        let changed = changed(pid);
        assert!(changed.contains(&"free".to_owned()), "{changed:?}");
        // Two names can be one function's.
        assert!(changed.len() >= count as usize, "{count}: {changed:?}");
        assert_eq!(
            changed.len() > HOOKED,
            count == HOOKED as u32,
            "{changed:?}"
        );
    });
    assert_eq!(died, HOOKED as u32);
    for count in [1, 2, 5, HOOKED as u32] {
        under_a_storm("CodeWritten", count);
    }
    let died = at_each("Enabled", 1, 1, |pid, _| {
        assert!(changed(pid).len() >= HOOKED);
        assert_stubs_as_in_file(pid);
    });
    assert_eq!(died, 1);
}

/// Check row 7: the first of the threads goes on, others stand; and all do, hooked.
#[test]
fn step_7_let_go() {
    under_a_storm("Enabled", 1);
    // Nine threads at least, twice: the first are those of step 3.
    for count in [4, 12, 15, 18] {
        under_a_storm("LetGo", count);
    }
    let died = at_each("LetGo", 2, 2, |pid, _| {
        assert!(changed(pid).len() >= HOOKED)
    });
    assert_eq!(died, 1);
    shards_given_back();
}

/// Kills memprof when it has given back the shards of ended threads, which new threads then take.
fn shards_given_back() {
    let dir = TempDir::new("steps");
    let mut target = Running::spawn(&mut target("successors.c").command(&[]));
    target.wait_stdout(|line| line == "ready");
    let pid = target.pid();
    let file = dir.file("dies.json");
    let mut command = memprof::memprof(&["record", "--probe", "prefilter", "-f", "json"]);
    command.args(["-d", "60", "-o", &file, "-p", &pid.to_string()]);
    command.env("MEMPROF_DIE_AT", "ShardsGivenBack:1");
    let memprof = Running::spawn(&mut command);
    eventually(|| (changed(pid).len() >= HOOKED).then_some(()));
    let threads = |target: &mut Running, count: u32, done: usize| {
        target.send(&count.to_string());
        eventually(|| (target.stdout().matches("done\n").count() == done).then_some(()));
    };
    threads(&mut target, 3000, 1);
    let status = memprof.finish().status;
    assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
    assert!(changed(pid).len() >= HOOKED);
    threads(&mut target, 1000, 2);
    assert!(cleanup(pid).contains("taken out"));
    assert_eq!(changed(pid), [""; 0]);
    assert_eq!((ours(pid).len(), files(pid)), (0, 0));
    threads(&mut target, 10, 3);
    target.close_stdin();
    target.finish().expect_code(0);
}

/// Check row 8: while the bytes go back, and after all have; what leads to the stubs still
/// works.
#[test]
fn step_8_restored() {
    let first = HOOKED as u32 + 1;
    let died = at_each("CodeWritten", first, u32::MAX, |pid, count| {
        let changed = changed(pid);
        let is_last = count == 2 * HOOKED as u32;
        // What gives blocks up goes last.
        assert_eq!(
            changed.contains(&"free".to_owned()),
            !is_last,
            "{changed:?}"
        );
        assert_eq!(changed.is_empty(), is_last, "{changed:?}");
    });
    assert_eq!(died, HOOKED as u32);
    for count in [first, first + 4] {
        under_a_storm("CodeWritten", count);
    }
    let died = at_each("Restored", 1, 1, |pid, _| {
        assert_eq!(changed(pid), [""; 0]);
        assert!(!ours(pid).is_empty());
    });
    assert_eq!(died, 1);
    under_a_storm("Restored", 1);
}

/// Check row 9: the data is gone and the stubs are not; and all is gone.
#[test]
fn step_9_unmapped() {
    let died = at_each("Unmapped", 1, 9, |pid, count| {
        assert_eq!(changed(pid), [""; 0]);
        assert_eq!(ours(pid).len(), if count == 1 { 1 } else { 0 });
        assert!(ours(pid).iter().all(|(_, is_code)| *is_code));
    });
    assert_eq!(died, 2);
    under_a_storm("Unmapped", 1);
    under_a_storm("Unmapped", 2);
}
