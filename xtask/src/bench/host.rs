//! Where, when and with what was measured.

use std::{fs, path::Path, process::Command};

use super::{
    context::Context,
    process::{LIMIT, run},
    report::{Host, Version},
};
use crate::machine::Found;

/// All about this machine and what takes part.
pub(super) fn describe(workspace: &Path, context: &Context) -> Host {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let machine = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, name)| name);
    let found = |found: &Found, arguments: &[&str]| match found {
        Ok(path) => first_line(Command::new(path).args(arguments)),
        Err(why) => why.clone(),
    };
    let program = |name: &str, arguments: &[&str]| first_line(Command::new(name).args(arguments));
    let package =
        |name: &str| first_line(Command::new("dpkg-query").args(["-W", "-f", "${Version}", name]));
    let versions = [
        (
            "memprof",
            first_line(Command::new(&context.memprof).arg("--version")),
        ),
        ("floor", found(&context.floor, &["--version"])),
        ("bpftrace", found(&context.bpftrace, &["--version"])),
        (
            "bcc memleak",
            match &context.memleak {
                Ok(path) => format!("{}, bpfcc-tools {}", path.display(), package("bpfcc-tools")),
                Err(why) => why.clone(),
            },
        ),
        ("heaptrack", found(&context.heaptrack, &["--version"])),
        (
            "jemalloc",
            context
                .jemalloc
                .as_ref()
                .map_or_else(Clone::clone, |_| package("libjemalloc2")),
        ),
        ("redis-server", program("redis-server", &["--version"])),
        ("sqlite3", program("sqlite3", &["--version"])),
        ("python3", program("python3", &["--version"])),
        ("gcc", program("gcc", &["--version"])),
    ];
    Host {
        date: program("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
        machine: machine.to_owned(),
        cpus: context.cpus,
        kernel: program("uname", &["-r"]),
        libc: program("getconf", &["GNU_LIBC_VERSION"]),
        commit: first_line(Command::new("git").current_dir(workspace).args([
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
        ])),
        versions: versions
            .into_iter()
            .map(|(name, version)| Version {
                name: name.to_owned(),
                version,
            })
            .collect(),
    }
}

/// The first line that a command writes to stdout, or that it cannot be run.
fn first_line(command: &mut Command) -> String {
    match run(command, LIMIT) {
        Ok(finished) => finished
            .stdout
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned(),
        Err(_) => "unknown".to_owned(),
    }
}
