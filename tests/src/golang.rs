//! Go programs, and their own heap profiles beside memprof's.

use std::process::Command;

use crate::{
    daemon::eventually,
    dir::TempDir,
    pprof::{TopLine, top_by_default},
    running::Running,
    targets::go,
};

/// What a profile has of each line.
const VALUES: [&str; 4] = [
    "alloc_objects",
    "alloc_space",
    "inuse_objects",
    "inuse_space",
];

/// Starts a program, and waits until it is ready.
#[must_use]
pub fn start(command: &mut Command) -> Running {
    let running = Running::spawn(command);
    running.wait_stdout(|line| line == "ready");
    running
}

/// Has it allocate once more.
pub fn step(running: &mut Running) {
    let done = || running.stdout().matches("done\n").count();
    let before = done();
    running.send("go");
    eventually(|| (running.stdout().matches("done\n").count() > before).then_some(()));
}

/// The version of Go that builds the programs.
#[must_use]
pub fn go_version() -> String {
    let mut command = Command::new(go());
    let finished = Running::spawn(command.args(["env", "GOVERSION"])).finish();
    finished.expect_code(0);
    finished.stdout.trim().to_owned()
}

/// The values of all lines of a profile.
fn top(dir: &TempDir, file: &str, value: &str) -> Vec<TopLine> {
    let index = format!("-sample_index={value}");
    let (_, mut lines) = top_by_default(dir, file, &[&index, "-lines"]);
    lines.sort_by(|a, b| a.function.cmp(&b.function));
    lines
}

/// Fails unless memprof's profile of a process and its own have the same lines, and at each the
/// same values but for `tolerance`: Go rounds each bucket, memprof each stack.
#[track_caller]
pub fn expect_same(dir: &TempDir, memprofs: &str, own: &str, tolerance: u64) {
    for value in VALUES {
        let (memprofs, own) = (top(dir, memprofs, value), top(dir, own, value));
        assert!(own.len() > 5, "{own:#?}");
        let is_same = |a: &TopLine, b: &TopLine| {
            a.function == b.function
                && a.flat.abs_diff(b.flat) <= tolerance
                && a.cumulative.abs_diff(b.cumulative) <= tolerance
        };
        let without = |lines: &[TopLine], others: &[TopLine]| -> Vec<TopLine> {
            let missing = |line: &&TopLine| !others.iter().any(|other| is_same(line, other));
            lines.iter().filter(missing).cloned().collect()
        };
        let (more, less) = (without(&memprofs, &own), without(&own, &memprofs));
        assert!(
            more.is_empty() && less.is_empty(),
            "{value}: memprof has {more:#?}, and the program itself {less:#?}"
        );
    }
}
