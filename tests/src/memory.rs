//! What a daemon takes of the host's memory.

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::daemon::Daemon;

/// What a daemon takes that cannot be had back: its anonymous memory, and what the kernel says
/// of its maps.
fn taken(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let anonymous = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024);
    let mut seen = BTreeSet::new();
    let mut maps = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse::<u64>().ok()
        };
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:"))
            && seen.insert(id)
        {
            maps += bytes;
        }
    }
    anonymous + maps
}

/// Looks all the time at what a daemon takes.
pub struct Watch {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Watch {
    /// Begins to look.
    #[must_use]
    pub fn start(daemon: &Daemon) -> Self {
        let pid = daemon.running.pid();
        let ends = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ends);
        let thread = thread::spawn(move || {
            let mut most = 0;
            while !over.load(Ordering::Relaxed) {
                most = most.max(taken(pid));
                thread::sleep(Duration::from_millis(10));
            }
            most
        });
        Self { ends, thread }
    }

    /// The most that it ever was.
    #[must_use]
    pub fn most(self) -> u64 {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread that looks")
    }
}
