//! A running `memprof daemon`.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    dir::TempDir,
    http::{self, Response},
    memprof::memprof,
    profile::Profile,
    running::{Finished, LIMIT, Running},
};

/// A daemon that listens.
pub struct Daemon {
    /// The process.
    pub running: Running,
    /// The path of its socket.
    pub socket: String,
}

impl Daemon {
    /// Starts one on `pids`, with its socket in `dir`, that takes every
    /// allocation unless `options` say otherwise.
    #[must_use]
    pub fn start(dir: &TempDir, pids: &[u32], options: &[&str]) -> Self {
        let socket = dir.file("memprof.sock");
        Self::start_on(&socket, pids, options)
    }

    /// As [`Self::start`], with a socket of any path.
    #[must_use]
    pub fn start_on(socket: &str, pids: &[u32], options: &[&str]) -> Self {
        Self::start_with(socket, pids, options, &[])
    }

    /// As [`Self::start_on`], with variables in its environment.
    #[must_use]
    pub fn start_with(
        socket: &str,
        pids: &[u32],
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let mut command = memprof(&["daemon", "--socket", socket]);
        command.envs(environment.iter().copied());
        if !options.contains(&"-i") {
            command.args(["-i", "1"]);
        }
        for pid in pids {
            command.args(["-p", &pid.to_string()]);
        }
        command.args(options);
        let running = Running::spawn(&mut command);
        running.wait_stderr(|line| line.contains("listening on"));
        Self {
            running,
            socket: socket.to_owned(),
        }
    }

    /// The first address that it listens on over TCP.
    #[must_use]
    pub fn tcp(&self) -> http::Tcp {
        http::Tcp::told(&self.running.stderr())
    }

    /// What it tells about itself.
    #[must_use]
    pub fn stats(&self) -> Value {
        serde_json::from_slice(&self.get("/v1/stats").body).expect("statistics in JSON")
    }

    /// Asks for `path`.
    #[must_use]
    pub fn get(&self, path: &str) -> Response {
        http::get(&self.socket, path)
    }

    /// The profile of one process as JSON.
    #[must_use]
    pub fn profile(&self, pid: u32) -> Profile {
        let response = self.get(&format!("/v1/profile?pid={pid}"));
        assert_eq!(
            response.status,
            200,
            "{}",
            String::from_utf8_lossy(&response.body)
        );
        Profile::parse(&response.body)
    }

    /// The images of one process in `/v1/stats`.
    #[must_use]
    pub fn images(&self, pid: u32) -> Vec<Value> {
        let stats = self.get("/v1/stats").json();
        let processes = stats["processes"]
            .as_array()
            .expect("processes in /v1/stats");
        let process = processes
            .iter()
            .find(|process| process["pid"] == pid)
            .unwrap_or_else(|| panic!("no process {pid} in {stats:#}"));
        process["images"].as_array().expect("images").clone()
    }

    /// Waits until `reached` holds for what the profile says of the only
    /// process, and returns that profile.
    #[must_use]
    pub fn profile_when(&self, pid: u32, reached: impl Fn(&Profile) -> bool) -> Profile {
        eventually(|| {
            let profile = self.profile(pid);
            reached(&profile).then_some(profile)
        })
    }

    /// Ends it as an administrator does.
    #[expect(
        clippy::must_use_candidate,
        reason = "most tests only want it to end well"
    )]
    pub fn stop(self) -> Finished {
        self.running.signal(Signal::SIGTERM);
        let finished = self.running.finish();
        finished.expect_code(0);
        finished
    }
}

/// Asks again until there is an answer, and fails the test if there is none in
/// time.
#[track_caller]
pub fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}");
        thread::sleep(Duration::from_millis(20));
    }
}
