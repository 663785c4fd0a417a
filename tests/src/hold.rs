//! `hold.c` as a target: it sleeps but when it is told to go.

use std::{fs, process::Command};

use crate::{daemon::eventually, running::Running, targets::target};

/// A process that allocates 10 blocks of 100 bytes, which it keeps, each time that it is told to.
pub struct Hold {
    /// The process.
    pub running: Running,
    rounds: usize,
}

impl Hold {
    /// Starts it.
    #[must_use]
    pub fn start() -> Self {
        Self::started_by(&mut target("hold.c").command(&["10", "100"]))
    }

    /// Starts it by another command.
    #[must_use]
    pub fn started_by(command: &mut Command) -> Self {
        let running = Running::spawn(command);
        running.wait_stdout(|line| line == "ready");
        Self { running, rounds: 0 }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Has it allocate.
    pub fn go(&mut self) {
        self.rounds += 1;
        self.running.send("go");
        let running = &self.running;
        eventually(|| (running.stdout().matches("done\n").count() == self.rounds).then_some(()));
    }

    /// Has it end; it must do so by itself.
    pub fn finish(mut self) {
        self.running.close_stdin();
        self.running.finish().expect_code(0);
    }
}

/// All mappings of a process, as the kernel shows them.
#[must_use]
pub fn maps(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps")
}
