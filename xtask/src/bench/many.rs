//! Many processes under one daemon.

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    context::Context,
    daemon::Daemon,
    process::{LIMIT, Process},
    report::{Many, Traced},
    tables::compile,
};

/// Processes of each program.
const COPIES: usize = 100;

/// What the processes run. Each says `ready`, and ends with its input, which is that of
/// the shell.
const SCRIPT: &str = r#"
exec 3<&0
copies=$1 deep=$2
while [ $copies -gt 0 ]; do
    python3 -c 'import json, os, re, sqlite3, sys
os.write(1, b"ready\n"); sys.stdin.read()' <&3 &
    echo pid=$!
    perl -e 'use POSIX; syswrite STDOUT, "ready\n"; <STDIN>' <&3 &
    echo pid=$!
    "$deep" <&3 &
    echo pid=$!
    copies=$((copies - 1))
done
wait
"#;

const PROGRAMS: [&str; 3] = [
    "python3 with json, re and sqlite3",
    "perl with POSIX",
    "a C program",
];

/// How long the daemon is watched doing nothing.
const IDLE: Duration = Duration::from_secs(5);

/// Measures all of it.
///
/// # Errors
///
/// A process or memprof fails.
pub(super) fn measure(context: &Context) -> Result<Many> {
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "sh", &COPIES.to_string()]);
    let shell = Process::spawn(command.arg(context.file("deep")))?;
    let mut pids = Vec::new();
    let mut ready = 0;
    while pids.len() < COPIES * PROGRAMS.len() || ready < COPIES * PROGRAMS.len() {
        let (_, line) = shell.wait_stdout(LIMIT, |_| true)?;
        match line.strip_prefix("pid=") {
            Some(pid) => pids.push(pid.parse()?),
            None if line == "ready" => ready += 1,
            None => bail!("`{line}` from a program that should be ready"),
        }
    }
    let programs = PROGRAMS.map(|program| format!("{COPIES} times {program}"));
    Ok(Many {
        programs: programs.join(", "),
        one: trace(context, &pids[..1])?,
        all: trace(context, &pids)?,
    })
}

fn trace(context: &Context, pids: &[u32]) -> Result<Traced> {
    let (files, mapped) = tables(context, pids)?;
    let daemon = Daemon::start_with(context, &[], pids)?;
    let attach_cpu_s = daemon.cpu_s()?;
    let stats = daemon.stats()?;
    let processes = stats["processes"].as_array().context("no processes")?;
    let traced = processes.iter().filter(|one| one["state"] == "tracing");
    let traced = traced.count();
    if traced != pids.len() {
        bail!("{traced} of {} processes are traced", pids.len());
    }
    let (before, since) = (daemon.cpu_s()?, Instant::now());
    thread::sleep(IDLE);
    let idle_cores = (daemon.cpu_s()? - before) / since.elapsed().as_secs_f64();
    let stats = daemon.stats()?;
    Ok(Traced {
        processes: traced,
        attach_ms: daemon.attach.as_secs_f64() * 1e3,
        attach_cpu_s,
        files,
        mapped,
        unwind_table_bytes: stats["unwind_table_bytes"]
            .as_u64()
            .context("no unwind_table_bytes")?,
        bpf_maps_bytes: daemon.bpf_maps()?,
        rss_bytes: daemon.memory("VmRSS")?,
        rss_peak_bytes: daemon.memory("VmHWM")?,
        idle_cores,
        detach_ms: daemon.stop()?.as_secs_f64() * 1e3,
    })
}

/// A number of files, and their tables' bytes.
type Tables = (usize, u64);

/// Files with code that the processes map: each counted once, and once a process.
fn tables(context: &Context, pids: &[u32]) -> Result<(Tables, Tables)> {
    let mut files = BTreeMap::<String, usize>::new();
    for pid in pids {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let mut own: Vec<&str> = maps.lines().filter_map(code_file).collect();
        own.sort_unstable();
        own.dedup();
        for file in own {
            *files.entry(file.to_owned()).or_default() += 1;
        }
    }
    let paths: Vec<&str> = files.keys().map(String::as_str).collect();
    let tables = compile(context, &paths)?;
    let once = tables.iter().map(|table| table.table_bytes).sum();
    let each = tables.iter().zip(files.values());
    let each = each.map(|(table, &times)| table.table_bytes * times as u64);
    Ok(((files.len(), once), (files.values().sum(), each.sum())))
}

/// The file of a line of `/proc/PID/maps`, if it maps code.
fn code_file(line: &str) -> Option<&str> {
    let is_code = line.split(' ').nth(1)?.as_bytes().get(2) == Some(&b'x');
    line.find('/').filter(|_| is_code).map(|at| &line[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that only files that hold code are taken.
    #[test]
    fn files_of_code() {
        let line = "7f00-7f10 r-xp 00001000 fe:00 12                         /lib/a b.so";
        assert_eq!(code_file(line), Some("/lib/a b.so"));
        assert_eq!(code_file(&line.replace("r-xp", "r--p")), None);
        assert_eq!(code_file("7f00-7f10 r-xp 00000000 00:00 0    [vdso]"), None);
    }
}
