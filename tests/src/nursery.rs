//! `nursery.c` as a target: a process that has children when it is told to.

use std::{cell::RefCell, fs, process::Command};

use crate::{daemon::eventually, running::Running, targets::target};

/// What `nursery.c` is told to do, by signals that `kill` knows.
pub mod order {
    /// Allocate ten blocks of 100 bytes, and keep them.
    pub const WORK: &str = "USR1";
    /// Make a child.
    pub const FORK: &str = "USR2";
    /// Replace the program by itself.
    pub const BECOME_ANEW: &str = "HUP";
    /// Make a child that replaces its program at once.
    pub const FORK_TO_EXEC: &str = "34";
    /// The same by `posix_spawn`.
    pub const SPAWN: &str = "35";
    /// Make a child that makes one and ends.
    pub const FORK_TWICE: &str = "36";
    /// Make a hundred children, one after the other, that allocate and end.
    pub const SHORT_ONES: &str = "37";
    /// Have a child for a while that shares the memory.
    pub const SHARE_MEMORY: &str = "38";
    /// Make a child with addresses of the prefilter on its stack.
    pub const FORK_WITH_WORDS: &str = "39";
    /// End.
    pub const END: &str = "TERM";
}

/// A process with children, all of which do as they are told.
pub struct Nursery {
    /// The first of them.
    pub running: Running,
    children: RefCell<Vec<u32>>,
}

impl Nursery {
    /// Starts it.
    #[must_use]
    pub fn start() -> Self {
        let running = Running::spawn(&mut target("nursery.c").command(&[]));
        running.wait_stdout(|line| line.starts_with("ready "));
        let children = RefCell::default();
        Self { running, children }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    fn said(&self, what: &str) -> usize {
        let stdout = self.running.stdout();
        stdout.lines().filter(|line| *line == what).count()
    }

    /// Has one of them do something, and waits until it has said so.
    pub fn tell(&self, pid: u32, order: &str, answer: &str) {
        let before = self.said(answer);
        signal(pid, order);
        eventually(|| (self.said(answer) > before).then_some(()));
    }

    /// Has one of them allocate.
    pub fn work(&self, pid: u32) {
        self.tell(pid, order::WORK, &format!("done {pid}"));
    }

    /// Has one of them make a child.
    #[must_use]
    pub fn child(&self, parent: u32, order: &str) -> u32 {
        let known = self.children.borrow().clone();
        signal(parent, order);
        let child = eventually(|| {
            let stdout = self.running.stdout();
            let pids = stdout
                .lines()
                .filter_map(|line| line.strip_prefix("child ")?.parse().ok());
            pids.into_iter().find(|pid| !known.contains(pid))
        });
        self.children.borrow_mut().push(child);
        child
    }

    /// The same, of a child that becomes the program anew.
    #[must_use]
    pub fn program(&self, parent: u32, order: &str) -> u32 {
        let child = self.child(parent, order);
        eventually(|| (self.said(&format!("ready {child}")) > 0).then_some(()));
        child
    }

    /// Has one of them end, and waits until a child has.
    pub fn end(&self, pid: u32) {
        signal(pid, order::END);
        if pid != self.pid() {
            eventually(|| (!is_alive(pid)).then_some(()));
        }
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        for pid in self.children.borrow().iter() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).output();
        }
    }
}

fn signal(pid: u32, order: &str) {
    let sent = Command::new("kill")
        .args(["-s", order, &pid.to_string()])
        .status();
    assert!(sent.expect("kill").success(), "cannot signal {pid}");
}

/// Whether a process is there, and has not ended.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}
