//! How long BPF programs run, by the kernel's own clock.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Switches the clock on, and back to what it was when its input ends: however this
/// process does.
const SWITCH: &str = r#"
trap '' INT TERM
file=/proc/sys/kernel/bpf_stats_enabled
before=$(cat $file) && echo 1 >$file && echo on
read -r end
echo $before >$file
"#;

/// The clock, while it is on: each run of a BPF program on this machine is timed, which
/// takes the time of reading a clock twice.
pub(super) struct RunTime {
    switch: Child,
}

impl RunTime {
    /// Switches it on.
    ///
    /// # Errors
    ///
    /// The kernel does not let us.
    pub(super) fn start() -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", SWITCH]).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let switch = command.spawn().context("cannot start sh")?;
        let mut clock = Self { switch };
        let mut line = String::new();
        let stdout = clock.switch.stdout.take().context("no pipe")?;
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != "on" {
            bail!("kernel.bpf_stats_enabled cannot be set");
        }
        Ok(clock)
    }
}

impl Drop for RunTime {
    fn drop(&mut self) {
        drop(self.switch.stdin.take());
        let _ = self.switch.wait();
    }
}

/// Runs of programs, and their time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Runs {
    /// Nanoseconds of all.
    pub(super) ns: u64,
    /// How many.
    pub(super) count: u64,
}

/// All runs so far of the programs that process `pid` holds.
///
/// # Errors
///
/// It is gone.
pub(super) fn of_process(pid: u32) -> Result<Runs> {
    let mut programs = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        programs.extend(program(&info));
    }
    // A program may be held twice.
    programs.sort_unstable_by_key(|&(id, _)| id);
    programs.dedup_by_key(|&mut (id, _)| id);
    Ok(programs
        .into_iter()
        .fold(Runs::default(), |sum, (_, runs)| Runs {
            ns: sum.ns + runs.ns,
            count: sum.count + runs.count,
        }))
}

/// The program that a descriptor is for, and its runs: `bpf_prog_show_fdinfo` in
/// kernel/bpf/syscall.c. A link has the first line, too, and not the others.
fn program(info: &str) -> Option<(u64, Runs)> {
    let value = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    let runs = Runs {
        ns: value("run_time_ns:")?,
        count: value("run_cnt:")?,
    };
    Some((value("prog_id:")?, runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a program's runs are read, and a link's lack of them.
    #[test]
    fn programs() {
        let info = "pos:\t0\nprog_type:\t2\nprog_id:\t7\nrun_time_ns:\t900\nrun_cnt:\t3\n";
        assert_eq!(program(info), Some((7, Runs { ns: 900, count: 3 })));
        assert_eq!(program("link_type:\t12\nprog_id:\t7\n"), None);
    }
}
