//! What packages are made of: version, completions, manual pages, the unit.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use memprof_tests::{Running, TempDir, memprof};

fn run(args: &[&str]) -> String {
    let finished = Running::spawn(&mut memprof(args)).finish();
    finished.expect_code(0);
    finished.stdout
}

fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Check that the long version names the BPF object that the binary holds, and what it was
/// made of and with, as its provenance has it; the short one is a line.
#[test]
fn version() {
    let short = run(&["-V"]);
    assert_eq!(short.lines().count(), 1, "{short}");
    assert!(short.starts_with("memprof 0."), "{short}");
    let long = run(&["--version"]);
    assert!(long.starts_with(short.trim_end()), "{long}");
    let provenance = workspace("memprof-ebpf/prebuilt/PROVENANCE.toml");
    let provenance = fs::read_to_string(provenance).expect("the provenance");
    let values = provenance.lines().filter_map(|line| line.split_once(" = "));
    let mut count = 0;
    for (key, value) in values {
        assert!(long.contains(value.trim_matches('"')), "{key}: {long}");
        count += 1;
    }
    assert_eq!(count, 5, "{provenance}");
}

/// Check that completions are made for each shell, and that bash takes them and completes
/// subcommands and options by them.
#[test]
fn completions() {
    let dir = TempDir::new("packaging");
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = run(&["completions", shell]);
        assert!(script.contains("sample-interval"), "{shell}: {script}");
    }
    let file = dir.file("memprof.bash");
    fs::write(&file, run(&["completions", "bash"])).expect("a script");
    let complete = |words: &str, place: usize| {
        let script = format!(
            r#"source {file}; COMP_WORDS=(memprof {words}); COMP_CWORD={place}
               _memprof memprof "${{COMP_WORDS[{place}]}}" ""; printf '%s\n' "${{COMPREPLY[@]}}""#
        );
        let mut bash = Command::new("bash");
        let finished = Running::spawn(bash.args(["--norc", "-c", &script])).finish();
        finished.expect_code(0);
        finished.stdout
    };
    let commands = complete("''", 1);
    for command in ["record", "daemon", "dump", "config", "check", "cleanup"] {
        assert!(
            commands.lines().any(|line| line == command),
            "{command}: {commands}"
        );
    }
    assert_eq!(complete("daemon --sample-i", 2), "--sample-interval\n");
    // One for packages, not for people.
    assert!(!run(&["--help"]).contains("\n  man"));
}

/// Check that a manual page is written for each subcommand, with its environment variables and
/// without what only a build has.
#[test]
fn manual_pages() {
    let dir = TempDir::new("packaging");
    let man = dir.path().join("man");
    fs::create_dir(&man).expect("a directory");
    run(&["man", man.to_str().expect("UTF-8")]);
    for name in [
        "memprof",
        "memprof-record",
        "memprof-daemon",
        "memprof-config",
    ] {
        let page = fs::read_to_string(man.join(format!("{name}.1")));
        let page = page.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(
            page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"),
            "{page}"
        );
    }
    let daemon = fs::read_to_string(man.join("memprof-daemon.1")).expect("a page");
    assert!(daemon.contains("MEMPROF_SAMPLE_INTERVAL"), "{daemon}");
    let top = fs::read_to_string(man.join("memprof.1")).expect("a page");
    assert!(!top.contains("sha256"), "{top}");
    let missing = Running::spawn(&mut memprof(&["man", "/no/such/dir"])).finish();
    missing.expect_code(1).expect_stderr(&["/no/such/dir"]);
}

/// Check that systemd takes the unit, line by line, and lets it have what the daemon keeps.
#[test]
fn unit() {
    let dir = TempDir::new("packaging");
    let unit = fs::read_to_string(workspace("dist/memprof.service")).expect("the unit");
    let installed = "ExecStart=/usr/bin/memprof ";
    assert!(unit.contains(installed), "{unit}");
    // It looks for the program, too.
    let here = format!("ExecStart={} ", memprof_tests::memprof::binary().display());
    let file = dir.file("memprof.service");
    fs::write(&file, unit.replace(installed, &here)).expect("a unit");
    let mut command = Command::new("systemd-analyze");
    let verified = Running::spawn(command.args(["verify", "--man=no", &file])).finish();
    verified.expect_code(0);
    assert!(verified.stderr.is_empty(), "{verified}");

    let service = fs::read_to_string(workspace("docs/service.md")).expect("its description");
    let lines = unit.lines().filter_map(|line| line.split_once('='));
    for (key, value) in lines {
        let is_plain = ["Description", "Documentation", "ExecStart", "WantedBy"].contains(&key);
        assert!(
            is_plain || service.contains(key),
            "{key} is not in docs/service.md"
        );
        if key == "CapabilityBoundingSet" {
            assert!(
                value
                    .split(' ')
                    .all(|one| service.contains(&format!("| {one} |"))),
                "{value}"
            );
        }
    }
}
