//! Child processes: each in a group of its own, its output read line by line,
//! every wait with a limit, and the group killed on every way out.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio, exit},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{SigSet, Signal, killpg},
    unistd::Pid,
};

/// How long to wait for what takes a moment.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// How often to look whether a child has ended.
const POLL: Duration = Duration::from_millis(1);

/// Groups to be killed if this process is told to end.
static GROUPS: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes SIGINT and SIGTERM kill all children before they end this process. Must
/// be called before any thread is started.
///
/// # Errors
///
/// The signals cannot be blocked.
pub(super) fn kill_children_on_signals() -> Result<()> {
    let signals = ending_signals();
    signals.thread_block().context("cannot block signals")?;
    thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            for &group in lock(&GROUPS).iter() {
                kill_group(group, Signal::SIGKILL);
            }
            exit(128 + signal as i32);
        }
    });
    Ok(())
}

fn ending_signals() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM].into_iter().collect()
}

fn kill_group(group: u32, signal: Signal) {
    // Gone already is as good.
    let _ = killpg(Pid::from_raw(group.cast_signed()), signal);
}

/// One of a child's streams.
struct Stream {
    lines: Receiver<(Instant, String)>,
    text: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Stream {
    fn read(from: impl Read + Send + 'static) -> Self {
        let (sender, lines) = channel();
        let text = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&text);
        let reader = thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while let Ok(1..) = from.read_until(b'\n', &mut line) {
                let now = Instant::now();
                let read = String::from_utf8_lossy(&line).into_owned();
                lock(&into).push_str(&read);
                // Nobody may be waiting for lines any more; the text is still read.
                let _ = sender.send((now, read.trim_end().to_owned()));
                line.clear();
            }
        });
        Self {
            lines,
            text,
            reader: Some(reader),
        }
    }

    /// The next line that `wanted` accepts, and when it came.
    fn line(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> Option<(Instant, String)> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (at, line) = self.lines.recv_timeout(left).ok()?;
            if wanted(&line) {
                return Some((at, line));
            }
        }
    }

    fn text(&self) -> String {
        lock(&self.text).clone()
    }
}

/// A running child.
pub(super) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Stream,
    stderr: Stream,
    started: Instant,
}

/// A child that has ended.
pub(super) struct Finished {
    /// How it ended.
    pub(super) status: ExitStatus,
    /// What it wrote to stdout.
    pub(super) stdout: String,
    /// What it wrote to stderr.
    pub(super) stderr: String,
    /// When it ended, to a millisecond.
    pub(super) ended: Instant,
}

impl Process {
    /// Starts `command` with pipes for its three streams.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(super) fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().display().to_string();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let started = Instant::now();
        let mut child = {
            // Held until the child is on the list: a signal must not miss it.
            let mut groups = lock(&GROUPS);
            // Children inherit the mask, and must end on these signals. One that
            // comes in this moment ends this process at once.
            let signals = ending_signals();
            signals.thread_unblock().context("cannot unblock signals")?;
            let spawned = command.spawn();
            signals.thread_block().context("cannot block signals")?;
            let child = spawned.with_context(|| format!("cannot start {name}"))?;
            groups.insert(child.id());
            child
        };
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("no pipe")?;
        let stderr = child.stderr.take().context("no pipe")?;
        Ok(Self {
            name,
            child,
            stdin,
            stdout: Stream::read(stdout),
            stderr: Stream::read(stderr),
            started,
        })
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When it was started.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Writes a line to its stdin.
    ///
    /// # Errors
    ///
    /// It does not read any more.
    pub(super) fn send(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin is closed")?;
        writeln!(stdin, "{line}").with_context(|| format!("cannot write to {}", self.name))
    }

    /// Ends its input.
    pub(super) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for a line on stdout, and tells when it came.
    ///
    /// # Errors
    ///
    /// It does not come in time.
    pub(super) fn wait_stdout(
        &self,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(Instant, String)> {
        let line = self.stdout.line(limit, wanted);
        line.with_context(|| self.complaint("did not say on stdout what was awaited"))
    }

    /// Waits for a line on stderr, and tells when it came.
    ///
    /// # Errors
    ///
    /// It does not come in time.
    pub(super) fn wait_stderr(
        &self,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(Instant, String)> {
        let line = self.stderr.line(limit, wanted);
        line.with_context(|| self.complaint("did not say on stderr what was awaited"))
    }

    /// Sends a signal to it and its own children.
    pub(super) fn signal(&self, signal: Signal) {
        kill_group(self.pid(), signal);
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    ///
    /// It does not within `limit`.
    pub(super) fn finish(mut self, limit: Duration) -> Result<Finished> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                let ended = Instant::now();
                // What it left behind could hold the streams open.
                kill_group(self.pid(), Signal::SIGKILL);
                for stream in [&mut self.stdout, &mut self.stderr] {
                    if let Some(reader) = stream.reader.take() {
                        let _ = reader.join();
                    }
                }
                return Ok(Finished {
                    status,
                    stdout: self.stdout.text(),
                    stderr: self.stderr.text(),
                    ended,
                });
            }
            if Instant::now() >= deadline {
                bail!("{}", self.complaint("does not end"));
            }
            thread::sleep(POLL);
        }
    }

    /// One line on what went wrong, with the end of what it said itself.
    fn complaint(&self, what: &str) -> String {
        // A child that has just ended may have said why.
        thread::sleep(Duration::from_millis(20));
        let text = self.stderr.text() + &self.stdout.text();
        format!("{} {what}: {}", self.name, first_words(&text))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let mut groups = lock(&GROUPS);
        kill_group(self.child.id(), Signal::SIGKILL);
        let _ = self.child.wait();
        groups.remove(&self.child.id());
    }
}

impl Finished {
    /// Itself if it exited with 0.
    ///
    /// # Errors
    ///
    /// It failed; with what it said.
    pub(super) fn success(self, name: &str) -> Result<Self> {
        if !self.status.success() {
            let said = first_words(&(self.stderr + &self.stdout));
            bail!("{name} failed ({}): {said}", self.status);
        }
        Ok(self)
    }
}

/// Runs `command` to its end.
///
/// # Errors
///
/// It cannot be started, takes longer than `limit`, or fails.
pub(super) fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    let name = command.get_program().display().to_string();
    let mut process = Process::spawn(command)?;
    process.close_stdin();
    process.finish(limit)?.success(&name)
}

/// The number of a `name=N` word in a line.
///
/// # Errors
///
/// There is none.
pub(super) fn number(line: &str, name: &str) -> Result<u64> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
        .with_context(|| format!("no {name}= in `{line}`"))
}

/// As much of an output as fits a table.
fn first_words(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut short: String = words.join(" ").chars().take(160).collect();
    if short.is_empty() {
        short.push_str("it said nothing");
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that numbers are found by their whole names.
    #[test]
    fn numbers() {
        assert_eq!(number("ns=12 live=3", "live").expect("there"), 3);
        assert!(number("ns=12 live_bytes=3", "live").is_err());
    }

    /// Check that a dropped child, and what it has started, is gone.
    #[test]
    fn dropped() {
        let process = Process::spawn(Command::new("sh").args(["-c", "sleep 100 & echo $!; wait"]));
        let process = process.expect("sh");
        let (_, pid) = process.wait_stdout(LIMIT, |_| true).expect("a line");
        drop(process);
        let deadline = Instant::now() + LIMIT;
        let alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        while alive() {
            assert!(Instant::now() < deadline, "{pid} still runs");
            thread::sleep(POLL);
        }
    }
}
