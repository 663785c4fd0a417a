//! Can this host do it? One requirement a line, each with its mend.

use std::fs;

use nix::unistd::geteuid;

use super::{
    loader::{self, LoadError, LoadOptions, Loaded},
    mode::ProbeMode,
    walker::Walker,
};

/// One thing that memprof needs of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// What.
    pub name: &'static str,
    /// How it stands.
    pub state: State,
}

/// Whether a requirement is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is; with what was found.
    Met(String),
    /// It is not.
    Unmet {
        /// What is wrong.
        problem: String,
        /// What to do about it.
        mend: String,
    },
}

impl State {
    fn unmet(problem: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::Unmet {
            problem: problem.into(),
            mend: mend.into(),
        }
    }
}

/// Oldest kernel, and what it brings.
const FLOOR: (u32, u32) = (5, 15);
const FLOOR_FEATURE: &str = "bpf_get_attach_cookie in uprobes";

/// Capabilities that root in a full host has, by bit (`linux/capability.h`), and
/// what they are needed for.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (39, "CAP_BPF", "loading BPF programs"),
    (38, "CAP_PERFMON", "probing, and reading memory from BPF"),
    (19, "CAP_SYS_PTRACE", "reading /proc/PID of other users"),
    (40, "CAP_CHECKPOINT_RESTORE", "opening /proc/PID/map_files"),
];

/// What stands for `CAP_CHECKPOINT_RESTORE`, and was the only one before 5.9.
const CAP_SYS_ADMIN: u32 = 21;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

/// Checks every requirement, also after one is not met.
#[must_use]
pub fn check_host() -> Vec<Requirement> {
    let mut requirements = check_before_start();
    // The real thing: every map, every program, through the verifier.
    let loaded = loader::load(&LoadOptions::default());
    requirements.extend([
        requirement("perf events", perf_events()),
        requirement("BPF", bpf(&loaded)),
        requirement("probe modes", probe_modes()),
        requirement("unwinding", unwinding(&loaded)),
    ]);
    requirements
}

/// Checks what explains best why nothing else will work. The rest is what a
/// tracer does when it starts, and not to be done twice.
#[must_use]
pub fn check_before_start() -> Vec<Requirement> {
    vec![
        requirement("architecture", architecture()),
        requirement("kernel version", kernel_version()),
        requirement("privileges", privileges()),
        requirement("pid namespace", pid_namespace()),
        requirement("/proc", proc_mounted()),
        requirement("uprobes", uprobes()),
    ]
}

const fn requirement(name: &'static str, state: State) -> Requirement {
    Requirement { name, state }
}

fn architecture() -> State {
    match std::env::consts::ARCH {
        "x86_64" => State::Met("x86_64".to_owned()),
        other => State::unmet(
            format!("{other} is not supported"),
            "run memprof on an x86-64 host",
        ),
    }
}

fn kernel_version() -> State {
    let release = match nix::sys::utsname::uname() {
        Ok(names) => names.release().to_string_lossy().into_owned(),
        Err(error) => return State::unmet(format!("uname failed: {error}"), "run on Linux"),
    };
    judge_release(&release)
}

fn judge_release(release: &str) -> State {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= FLOOR => {
            State::Met(release.to_owned())
        }
        (Some(Ok(_)), Some(Ok(_))) => State::unmet(
            format!(
                "Linux {release} is older than {}.{} and lacks {FLOOR_FEATURE}",
                FLOOR.0, FLOOR.1
            ),
            format!("boot Linux {}.{} or newer", FLOOR.0, FLOOR.1),
        ),
        _ => State::unmet(
            format!("cannot read a version from `{release}`"),
            format!("run on Linux {}.{} or newer", FLOOR.0, FLOOR.1),
        ),
    }
}

fn privileges() -> State {
    let effective = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        });
    let Some(effective) = effective else {
        return State::unmet("cannot read /proc/self/status", "mount /proc");
    };
    judge_capabilities(effective, geteuid().is_root())
}

fn judge_capabilities(effective: u64, root: bool) -> State {
    let missing: Vec<String> = CAPABILITIES
        .iter()
        .filter(|(bit, ..)| effective & 1 << bit == 0)
        .filter(|(bit, ..)| *bit != CAP_CHECKPOINT_RESTORE || effective & 1 << CAP_SYS_ADMIN == 0)
        .map(|(_, name, purpose)| format!("{name} ({purpose})"))
        .collect();
    if missing.is_empty() {
        return State::Met(if root { "root" } else { "capabilities" }.to_owned());
    }
    let who = if root {
        "root without"
    } else {
        "not root, and without"
    };
    State::unmet(
        format!("{who} {}", missing.join(", ")),
        if root {
            "grant the container these capabilities"
        } else {
            "run as root (sudo memprof ...)"
        },
    )
}

fn pid_namespace() -> State {
    match crate::process::info::pid_namespace_is_initial() {
        Ok(true) => State::Met("initial".to_owned()),
        Ok(false) => State::unmet(
            "memprof runs in a pid namespace of its own: its pids are not the kernel's",
            "run it in the host's pid namespace (docker run --pid=host)",
        ),
        Err(error) => State::unmet(
            format!("cannot read /proc/self/ns/pid: {error}"),
            "mount /proc",
        ),
    }
}

fn proc_mounted() -> State {
    match fs::read_to_string("/proc/self/maps") {
        Ok(maps) if !maps.is_empty() => State::Met("mounted".to_owned()),
        _ => State::unmet("/proc/self/maps cannot be read", "mount -t proc proc /proc"),
    }
}

fn uprobes() -> State {
    let path = "/sys/bus/event_source/devices/uprobe/type";
    match fs::read_to_string(path) {
        Ok(kind) => State::Met(format!("perf event type {}", kind.trim())),
        Err(error) => State::unmet(
            format!("{path}: {error}"),
            "mount sysfs on /sys, or use a kernel with CONFIG_UPROBE_EVENTS",
        ),
    }
}

fn perf_events() -> State {
    match crate::ring::mmap_events::MmapEvents::open(crate::ring::mmap_events::Scope::Mappings) {
        Ok(_) => State::Met("allowed".to_owned()),
        Err(error) => State::unmet(
            describe(&error),
            "run as root; check that a seccomp filter or container does not forbid perf_event_open",
        ),
    }
}

fn bpf(loaded: &Result<Loaded, LoadError>) -> State {
    match loaded {
        Ok(_) => State::Met("memprof's programs load".to_owned()),
        Err(error) => State::unmet(
            describe(error),
            "run as root; check kernel.unprivileged_bpf_disabled, lockdown and seccomp filters",
        ),
    }
}

/// Never unmet: the last of the ways needs nothing beyond the rest.
fn probe_modes() -> State {
    let mut there = Vec::new();
    let mut missing = Vec::new();
    for mode in ProbeMode::ALL {
        match mode.try_out() {
            Ok(()) => there.push(mode.name()),
            Err(error) => missing.push(format!("; {error}")),
        }
    }
    let best = ProbeMode::best();
    State::Met(format!(
        "{}: {best} is used{}",
        there.join(", "),
        missing.concat()
    ))
}

/// Never unmet if programs load: the kernel can walk stacks itself, by frame pointers.
fn unwinding(loaded: &Result<Loaded, LoadError>) -> State {
    match loaded.as_ref().map(|loaded| loaded.walker) {
        Ok(Walker::Loop) => State::Met("by unwind information, in a loop".to_owned()),
        Ok(Walker::TailCalls) => State::Met(
            "by unwind information, by tail calls: bpf_loop is missing (Linux 5.17)".to_owned(),
        ),
        Ok(Walker::FramePointers) => State::Met(
            "by frame pointers alone: bpf_loop is missing (Linux 5.17), and the kernel refuses \
             the programs that do without"
                .to_owned(),
        ),
        Err(_) => State::unmet("no program is loaded that could", "see what is said of BPF"),
    }
}

/// An error with its causes, in one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    // A verifier's log has many lines; its first says enough here.
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that the floor is inclusive and that the feature is named.
    #[test]
    fn kernel_floor() {
        for release in ["5.15.0", "5.15-rc1", "6.1.0-32-amd64", "10.0"] {
            assert!(matches!(judge_release(release), State::Met(_)), "{release}");
        }
        for release in ["5.14.99", "4.19.0-27-amd64", "3.10"] {
            let State::Unmet { problem, mend } = judge_release(release) else {
                panic!("{release}")
            };
            assert!(problem.contains(FLOOR_FEATURE) && mend.contains("5.15"));
        }
        assert!(matches!(judge_release("Linux"), State::Unmet { .. }));
    }

    /// Check that each missing capability is named, and root is told from others.
    #[test]
    fn missing_capabilities_are_named() {
        assert!(matches!(judge_capabilities(u64::MAX, true), State::Met(_)));
        let State::Unmet { problem, mend } = judge_capabilities(0, false) else {
            panic!()
        };
        for (_, name, _) in CAPABILITIES {
            assert!(problem.contains(name));
        }
        assert!(problem.contains("not root") && mend.contains("root"));
        let State::Unmet { problem, .. } = judge_capabilities(!(1 << 39), true) else {
            panic!()
        };
        assert!(problem.contains("CAP_BPF") && !problem.contains("CAP_PERFMON"));
        for (given, met) in [
            (u64::MAX, true),
            (!(1 << CAP_SYS_ADMIN), true),
            (!(1 << CAP_CHECKPOINT_RESTORE), true),
            (!(1 << CAP_CHECKPOINT_RESTORE | 1 << CAP_SYS_ADMIN), false),
        ] {
            let state = judge_capabilities(given, true);
            assert_eq!(matches!(state, State::Met(_)), met, "{given:x}");
        }
    }

    /// Check that this host passes, as it must for every other test.
    #[test]
    fn this_host_can_do_it() {
        for requirement in check_host() {
            assert!(
                matches!(requirement.state, State::Met(_)),
                "{requirement:?}: run the tests as root"
            );
        }
    }
}
