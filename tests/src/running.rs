//! A child process whose output is collected and every wait for which has a
//! limit.

use std::{
    collections::BTreeMap,
    io::{Read, Write as _},
    os::unix::process::ExitStatusExt as _,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long to wait for what takes a moment.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long to wait for what takes minutes.
pub const LONG_LIMIT: Duration = Duration::from_secs(300);

/// How often to look whether a child has ended; the standard library has no wait
/// with a limit.
const POLL: Duration = Duration::from_millis(5);

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    closed: bool,
}

/// What one stream has carried so far.
#[derive(Clone, Default)]
struct Stream(Arc<(Mutex<Collected>, Condvar)>);

impl Stream {
    fn collect(mut from: impl Read + Send + 'static) -> Self {
        let stream = Self::default();
        let into = stream.clone();
        thread::spawn(move || {
            let mut chunk = [0; 65536];
            while let Ok(read @ 1..) = from.read(&mut chunk) {
                into.lock().bytes.extend_from_slice(&chunk[..read]);
                into.0.1.notify_all();
            }
            into.lock().closed = true;
            into.0.1.notify_all();
        });
        stream
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0
            .0
            .lock()
            .expect("a thread that collects output panicked")
    }

    fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// The first complete line that `wanted` accepts, if it comes in time.
    fn line(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let deadline = Instant::now() + limit;
        let mut collected = self.lock();
        loop {
            let text = String::from_utf8_lossy(&collected.bytes);
            let complete = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
            if let Some(line) = complete.lines().find(|line| wanted(line)) {
                return Some(line.to_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if collected.closed || left.is_zero() {
                return None;
            }
            collected = self
                .0
                .1
                .wait_timeout(collected, left)
                .expect("a thread that collects output panicked")
                .0;
        }
    }

    fn wait_closed(&self, limit: Duration) {
        let (_guard, _timeout) = self
            .0
            .1
            .wait_timeout_while(self.lock(), limit, |collected| !collected.closed)
            .expect("a thread that collects output panicked");
    }
}

/// A child process. Killed when dropped.
pub struct Running {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Stream,
    stderr: Stream,
}

impl Running {
    /// Starts `command` with pipes for its three streams.
    #[must_use]
    pub fn spawn(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        Self {
            stdin: child.stdin.take(),
            stdout: Stream::collect(child.stdout.take().expect("piped")),
            stderr: Stream::collect(child.stderr.take().expect("piped")),
            name,
            child,
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stdout so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it has written to stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Writes a line to its stdin.
    pub fn send(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        writeln!(stdin, "{line}").unwrap_or_else(|error| {
            panic!("cannot write to {}: {error}", self.name);
        });
    }

    /// Writes a line to its stdin and closes it, whether or not it still reads.
    pub fn send_last(&mut self, line: &str) {
        if let Some(mut stdin) = self.stdin.take() {
            let _ = writeln!(stdin, "{line}");
        }
    }

    /// Ends its input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for a line on stdout.
    pub fn wait_stdout(&self, wanted: impl Fn(&str) -> bool) -> String {
        self.wait_stdout_for(LIMIT, wanted)
    }

    /// Waits for a line on stdout for as long as `limit`.
    pub fn wait_stdout_for(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> String {
        self.stdout
            .line(limit, wanted)
            .unwrap_or_else(|| panic!("the awaited line on stdout did not come from {self}"))
    }

    /// Waits for a line on stderr.
    pub fn wait_stderr(&self, wanted: impl Fn(&str) -> bool) -> String {
        self.stderr
            .line(LIMIT, wanted)
            .unwrap_or_else(|| panic!("the awaited line on stderr did not come from {self}"))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).expect("a process id"));
        kill(pid, signal).unwrap_or_else(|error| panic!("cannot signal {}: {error}", self.name));
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("waiting for a child")
            .is_none()
    }

    /// Waits until it ends, and fails the test if it does not.
    #[must_use]
    pub fn finish(self) -> Finished {
        self.finish_within(LIMIT)
    }

    /// As [`Self::finish`], for as long as `limit`.
    #[must_use]
    pub fn finish_within(mut self, limit: Duration) -> Finished {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waiting for a child") {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "still running after {limit:?}: {self}"
            );
            thread::sleep(POLL);
        };
        // A process that outlives the child may hold its streams.
        self.stdout.wait_closed(Duration::from_secs(5));
        self.stderr.wait_closed(Duration::from_secs(5));
        Finished {
            name: self.name.clone(),
            status,
            stdout_bytes: self.stdout.bytes(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }
}

impl std::fmt::Display for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}\n-- stdout:\n{}\n-- stderr:\n{}",
            self.name,
            head(&self.stdout()),
            head(&self.stderr())
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A child process that has ended, and what it wrote.
#[derive(Clone, Debug)]
pub struct Finished {
    name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// The same, byte for byte.
    pub stdout_bytes: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Finished {
    /// Its exit status; fails the test if a signal killed it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("killed by signal {:?}: {self}", self.status.signal()))
    }

    /// Fails the test unless it exited with `code`, and did not panic.
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.code(), code, "unexpected exit status: {self}");
        self.expect_no_panic()
    }

    /// Fails the test if it says that it panicked.
    pub fn expect_no_panic(&self) -> &Self {
        assert!(!self.stderr.contains("panicked"), "panicked: {self}");
        self
    }

    /// Fails the test unless stderr has one of `words`, in any case.
    pub fn expect_stderr(&self, words: &[&str]) -> &Self {
        let stderr = self.stderr.to_lowercase();
        assert!(
            words
                .iter()
                .any(|word| stderr.contains(&word.to_lowercase())),
            "none of {words:?} is on stderr: {self}"
        );
        self
    }

    /// The value of a line `name=value` on stdout.
    #[must_use]
    pub fn value(&self, name: &str) -> u64 {
        *values(&self.stdout)
            .get(name)
            .unwrap_or_else(|| panic!("no {name}= on stdout: {self}"))
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {}\n-- stdout:\n{}\n-- stderr:\n{}",
            self.name,
            self.status,
            head(&self.stdout),
            head(&self.stderr)
        )
    }
}

/// The lines `name=value` of a text.
fn values(text: &str) -> BTreeMap<&str, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once('=')?;
            Some((name, value.parse().ok()?))
        })
        .collect()
}

/// As much of a text as fits a test's failure.
fn head(text: &str) -> String {
    text.chars().take(4000).collect()
}
