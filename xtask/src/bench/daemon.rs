//! A `memprof daemon`, and what the kernel tells about it.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    context::Context,
    http,
    process::{LIMIT, Process},
    run_time::{self, Runs},
};

/// Clock ticks a second in `/proc/PID/stat`: USER_HZ, 100 on x86-64.
const TICKS: f64 = 100.0;

/// How long the books stay unchanged once all events are in.
const QUIET: Duration = Duration::from_millis(300);

/// The daemon.
pub(super) struct Daemon {
    process: Process,
    socket: PathBuf,
    /// From its start until it listened.
    pub(super) attach: Duration,
}

/// What the daemon has booked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Books {
    /// Allocations and frees.
    pub(super) events: u64,
    /// Lost ones by cause.
    pub(super) dropped: Vec<(String, u64)>,
}

impl Daemon {
    /// Starts one that records every allocation of process `pid`.
    ///
    /// # Errors
    ///
    /// It does not listen.
    pub(super) fn start(context: &Context, pid: u32) -> Result<Self> {
        Self::start_with(context, &["-i", "1"], &[pid])
    }

    /// Starts one on processes `pids`, with `options`.
    ///
    /// # Errors
    ///
    /// It does not listen.
    pub(super) fn start_with(context: &Context, options: &[&str], pids: &[u32]) -> Result<Self> {
        Self::spawn(Command::new(&context.memprof), context, options, pids)
    }

    /// Starts one on all processes that `options` let pass.
    ///
    /// # Errors
    ///
    /// It does not listen.
    pub(super) fn start_for_all(context: &Context, options: &[&str]) -> Result<Self> {
        let options: Vec<&str> = ["-a"].iter().chain(options).copied().collect();
        Self::start_with(context, &options, &[])
    }

    /// As [`Self::start_with`]; it tells on stderr what it does.
    ///
    /// # Errors
    ///
    /// As [`Self::start_with`].
    pub(super) fn start_that_tells(
        context: &Context,
        options: &[&str],
        pids: &[u32],
    ) -> Result<Self> {
        let mut command = Command::new(&context.memprof);
        command.env("MEMPROF_LOG", "debug");
        Self::spawn(command, context, options, pids)
    }

    fn spawn(
        mut command: Command,
        context: &Context,
        options: &[&str],
        pids: &[u32],
    ) -> Result<Self> {
        let socket = context.file("memprof.sock");
        let _ = fs::remove_file(&socket);
        command.arg("daemon").args(options);
        if !pids.is_empty() {
            command.arg("-p").args(pids.iter().map(u32::to_string));
        }
        let process = Process::spawn(command.arg("--socket").arg(&socket))?;
        let listening = |line: &str| line.starts_with("memprof: listening on ");
        let (ready, _) = process.wait_stderr(LIMIT, listening)?;
        Ok(Self {
            attach: ready - process.started(),
            process,
            socket,
        })
    }

    /// The body of `GET path`.
    ///
    /// # Errors
    ///
    /// As [`http::get`].
    pub(super) fn get(&self, path: &str) -> Result<Vec<u8>> {
        http::get(&self.socket, path)
    }

    /// The profile.
    ///
    /// # Errors
    ///
    /// As [`http::json`].
    pub(super) fn profile(&self) -> Result<Value> {
        http::json(&self.socket, "/v1/profile?format=json")
    }

    /// What it tells about itself.
    ///
    /// # Errors
    ///
    /// As [`http::json`].
    pub(super) fn stats(&self) -> Result<Value> {
        http::json(&self.socket, "/v1/stats")
    }

    /// Samples at another interval from now on.
    ///
    /// # Errors
    ///
    /// As [`http::put`].
    pub(super) fn set_interval(&self, bytes: u64) -> Result<()> {
        let config = json!({ "sample_interval_bytes": bytes }).to_string();
        http::put(&self.socket, "/v1/config", &config)
    }

    /// All runs of its BPF programs, while they are timed.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub(super) fn runs(&self) -> Result<Runs> {
        run_time::of_process(self.process.pid())
    }

    /// Waits until it has booked all there is, and gives its last books.
    ///
    /// # Errors
    ///
    /// It goes on and on.
    pub(super) fn settle(&self) -> Result<Books> {
        let deadline = Instant::now() + LIMIT;
        let mut before = books(&self.stats()?);
        while Instant::now() < deadline {
            thread::sleep(QUIET);
            let now = books(&self.stats()?);
            if now == before {
                return Ok(now);
            }
            before = now;
        }
        bail!("the daemon still books after {} s", LIMIT.as_secs())
    }

    /// Processor seconds it has used.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub(super) fn cpu_s(&self) -> Result<f64> {
        let stat = self.proc("stat")?;
        cpu_ticks(&stat)
            .map(|ticks| ticks as f64 / TICKS)
            .context("/proc/PID/stat reads oddly")
    }

    /// Bytes of a line of `/proc/PID/status`, such as `VmRSS`.
    ///
    /// # Errors
    ///
    /// There is no such line.
    pub(super) fn memory(&self, name: &str) -> Result<u64> {
        let status = self.proc("status")?;
        kib(&status, name).with_context(|| format!("no {name} in /proc/PID/status"))
    }

    /// Kernel memory of its BPF maps.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub(super) fn bpf_maps(&self) -> Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", self.process.pid()))? {
            let info = fs::read_to_string(entry?.path()).unwrap_or_default();
            let value = |name: &str| info.lines().find_map(|line| line.strip_prefix(name));
            if value("map_type:").is_some() {
                sum += value("memlock:")
                    .and_then(|text| text.trim().parse::<u64>().ok())
                    .unwrap_or(0);
            }
        }
        Ok(sum)
    }

    /// Ends it, and tells how long that took.
    ///
    /// # Errors
    ///
    /// It fails.
    pub(super) fn stop(self) -> Result<Duration> {
        self.stop_and_tell().map(|(time, _)| time)
    }

    /// As [`Self::stop`], and what it has told.
    ///
    /// # Errors
    ///
    /// As [`Self::stop`].
    pub(super) fn stop_and_tell(self) -> Result<(Duration, String)> {
        let asked = Instant::now();
        self.process.signal(Signal::SIGTERM);
        let finished = self.process.finish(LIMIT)?.success("memprof daemon")?;
        Ok((finished.ended - asked, finished.stderr))
    }

    fn proc(&self, name: &str) -> Result<String> {
        let path = format!("/proc/{}/{name}", self.process.pid());
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    }
}

fn books(stats: &Value) -> Books {
    let mut books = Books::default();
    let images = stats.pointer("/processes/0/images");
    for image in images.and_then(Value::as_array).into_iter().flatten() {
        for name in ["alloc_events", "free_events"] {
            books.events += image[name].as_u64().unwrap_or(0);
        }
        let causes = image["dropped_events"].as_object();
        for (cause, count) in causes.into_iter().flatten() {
            match count.as_u64() {
                // A stack that is cut is an event all the same.
                Some(count @ 1..) if cause != "truncated_stacks" => {
                    books.dropped.push((cause.clone(), count));
                }
                _ => {}
            }
        }
    }
    books
}

/// utime + stime: fields 14 and 15, counted behind the name, which may hold
/// anything (proc_pid_stat(5)).
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let utime: u64 = fields.next()?.parse().ok()?;
    Some(utime + fields.next()?.parse::<u64>().ok()?)
}

fn kib(status: &str, name: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that processor time is found behind a name with spaces and brackets.
    #[test]
    fn processor_time() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 5";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("7"), None);
    }

    /// Check that sizes become bytes.
    #[test]
    fn sizes() {
        assert_eq!(
            kib("VmHWM:\t    12 kB\nVmRSS:\t     8 kB\n", "VmRSS"),
            Some(8192)
        );
        assert_eq!(kib("Vm:\n", "VmRSS"), None);
    }

    /// Check that events are summed over images and only real losses listed.
    #[test]
    fn events() {
        let stats = json!({"processes": [{"images": [
            {"alloc_events": 3, "free_events": 1, "dropped_events": {"a": 0, "truncated_stacks": 9}},
            {"alloc_events": 2, "free_events": 0, "dropped_events": {"b": 5}}]}]});
        let books = books(&stats);
        assert_eq!(books.events, 6);
        assert_eq!(books.dropped, [("b".to_owned(), 5)]);
    }
}
