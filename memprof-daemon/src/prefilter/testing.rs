//! For tests: processes that are hard to stop, and dying at a step.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{sys::signal, unistd::Pid};

use super::{remote, step::Step, tracer::Tracer};
use crate::process::info::Stat;

/// How many steps are left until this process kills itself; never at 0.
static STEPS_LEFT: AtomicU32 = AtomicU32::new(0);

/// Has this process kill itself when `steps` steps are done.
pub(super) fn die_after(steps: u32) {
    STEPS_LEFT.store(steps, Ordering::Relaxed);
}

pub(super) fn done(step: Step) {
    let left = STEPS_LEFT.load(Ordering::Relaxed);
    if left == 0 {
        return;
    }
    STEPS_LEFT.store(left - 1, Ordering::Relaxed);
    if left == 1 {
        eprintln!("dies at {step:?}");
        // Nothing can be cleaned up then.
        signal::kill(Pid::this(), signal::SIGKILL).unwrap();
    }
}

/// Runs `work` where it may trace.
pub(super) fn trace<T: Send>(work: impl FnOnce(&Tracer) -> T + Send) -> T {
    super::tracer::with_tracer(work).unwrap()
}

pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

/// A program of targets/, while it runs.
pub(super) struct Target {
    child: Child,
    input: Option<ChildStdin>,
    pub(super) counter_at: u64,
}

impl Target {
    pub(super) fn hazard(arguments: &[&str]) -> Self {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| build("hazard", include_str!("targets/hazard.c")));
        Self::start(program, arguments)
    }

    /// In the call `kind`, waiting.
    pub(super) fn interrupted(kind: &str) -> Self {
        static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
        let source = include_str!("targets/interrupted.c");
        let program = PROGRAM.get_or_init(|| build("interrupted", source));
        let target = Self::start(program, &[kind]);
        target.until("waits", |target| target.state() == 'S');
        thread::sleep(Duration::from_millis(5));
        target
    }

    fn start(program: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let ready = line.strip_prefix("ready");
        let ready = ready
            .unwrap_or_else(|| panic!("{arguments:?}: {line}"))
            .trim();
        Self {
            input: child.stdin.take(),
            child,
            counter_at: u64::from_str_radix(ready, 16).unwrap_or(0),
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn state(&self) -> char {
        Stat::read(self.pid()).unwrap().state
    }

    pub(super) fn counter(&self) -> u64 {
        remote::read_word(self.pid(), self.counter_at).unwrap()
    }

    pub(super) fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < Duration::from_secs(20), "never {what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until it has done something more.
    pub(super) fn until_it_works(&self) {
        let before = self.counter();
        self.until("works on", |target| target.counter() != before);
    }

    pub(super) fn kill(&self, signal: signal::Signal) {
        signal::kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    /// Lets it go to its end; what it says of itself.
    pub(super) fn finish(mut self) -> (ExitStatus, String) {
        if let Some(mut input) = self.input.take() {
            // Gone if it was killed.
            let _ = input.write_all(b"!");
        }
        self.until("ends", |target| matches!(target.state(), 'Z'));
        let status = self.child.wait().unwrap();
        let mut said = String::new();
        let errors = self.child.stderr.take().unwrap();
        for line in BufReader::new(errors).lines() {
            said += &line.unwrap();
        }
        (status, said)
    }

    pub(super) fn finish_well(self) {
        let (status, said) = self.finish();
        assert!(status.success(), "{status}: {said}");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Reaped already if it was finished.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn build(name: &str, source: &str) -> PathBuf {
    let directory = std::env::temp_dir();
    let program = directory.join(format!("memprof-{name}-{}", std::process::id()));
    let file = program.with_extension("c");
    fs::write(&file, source).unwrap();
    let compiler = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-pthread", "-o"])
        .args([&program, &file])
        .status()
        .unwrap();
    assert!(compiler.success());
    fs::remove_file(file).unwrap();
    program
}
