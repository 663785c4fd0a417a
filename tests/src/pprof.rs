//! `go tool pprof`, the reader that a pprof file is written for.

use std::{path::Path, process::Command};

use crate::{
    dir::TempDir,
    running::{Finished, LONG_LIMIT, Running},
};

/// A line of `-top`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopLine {
    /// Value of the function itself.
    pub flat: i64,
    /// Value of the function and what it called.
    pub cumulative: i64,
    /// Its name.
    pub function: String,
}

/// What `go tool pprof -top` says of `file`, or what a URL answers, without a cut.
#[must_use]
pub fn top(dir: &TempDir, file: impl AsRef<Path>, sample_index: &str) -> Vec<TopLine> {
    let finished = run(
        dir,
        file.as_ref(),
        &[&format!("-sample_index={sample_index}")],
    );
    finished.expect_code(0);
    assert!(
        finished.stdout.contains(&format!("Type: {sample_index}")),
        "{finished}"
    );
    parse_top(&finished.stdout)
}

/// The same of the values that the profile itself has shown first, and which those are;
/// with more options.
#[must_use]
pub fn top_by_default(dir: &TempDir, url: &str, options: &[&str]) -> (String, Vec<TopLine>) {
    let finished = run(dir, Path::new(url), options);
    finished.expect_code(0);
    let mut lines = finished.stdout.lines();
    let shown = lines.find_map(|line| line.strip_prefix("Type: "));
    let shown = shown.unwrap_or_else(|| panic!("no type: {finished}"));
    (shown.to_owned(), parse_top(&finished.stdout))
}

/// What `go tool pprof -tags` says of `file`, or what a URL answers.
#[must_use]
pub fn tags(dir: &TempDir, file: impl AsRef<Path>) -> String {
    let mut command = go_pprof(dir);
    command.args(["-tags", "-unit=B"]).arg(file.as_ref());
    let finished = Running::spawn(&mut command).finish_within(LONG_LIMIT);
    finished.expect_code(0);
    finished.stdout
}

fn run(dir: &TempDir, file: &Path, options: &[&str]) -> Finished {
    let mut command = go_pprof(dir);
    command
        .args(["-top", "-unit=B", "-nodefraction=0", "-nodecount=100000"])
        .args(options)
        .arg(file);
    Running::spawn(&mut command).finish_within(LONG_LIMIT)
}

fn go_pprof(dir: &TempDir) -> Command {
    let mut command = Command::new("go");
    command
        .args(["tool", "pprof"])
        .env("HOME", dir.path())
        .env("PPROF_TMPDIR", dir.path())
        .env("NO_PROXY", "127.0.0.1")
        .env("GOTOOLCHAIN", "local");
    command
}

/// ```text
///       flat  flat%   sum%        cum   cum%
///     23000B 90.20% 90.20%     25500B   100%  leak_here
/// ```
fn parse_top(text: &str) -> Vec<TopLine> {
    let number = |field: &str| field.trim_end_matches('B').parse().ok();
    text.lines()
        .skip_while(|line| !line.trim_start().starts_with("flat "))
        .skip(1)
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let parsed = || {
                Some(TopLine {
                    flat: number(fields.first()?)?,
                    cumulative: number(fields.get(3)?)?,
                    function: fields.get(5..)?.join(" "),
                })
            };
            parsed().unwrap_or_else(|| panic!("not a line of -top: {line:?}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that the lines of `-top` are read, names with spaces among them.
    #[test]
    fn lines() {
        let text = "File: x\nType: inuse_space\nShowing nodes accounting for 25500B\n      \
            flat  flat%   sum%        cum   cum%\n    \
            23000B 90.20% 90.20%     25500B   100%  a::b(int, char) (inline)\n         \
            0     0% 90.20%     25500B   100%  main\n";
        let lines = parse_top(text);
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].flat, lines[0].cumulative), (23000, 25500));
        assert_eq!(lines[0].function, "a::b(int, char) (inline)");
        assert_eq!((lines[1].flat, lines[1].cumulative), (0, 25500));
    }
}
