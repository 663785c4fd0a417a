//! `memprof record`, from start to profile.

use std::{process::Command, time::Duration};

use nix::sys::signal::Signal;

use crate::{
    dir::TempDir,
    memprof::memprof,
    profile::{Process, Profile},
    running::{Finished, LIMIT, Running},
    targets::Target,
};

/// What ends a recording of a running process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The target exits.
    TargetExits,
    /// SIGINT to memprof; the target still lives.
    Interrupt,
}

/// A recording to be made.
#[derive(Debug)]
pub struct Record<'a> {
    dir: &'a TempDir,
    options: Vec<String>,
    environment: Vec<(String, String)>,
    limit: Duration,
}

/// A recording that was made.
#[derive(Debug)]
pub struct Recorded {
    /// The profile.
    pub profile: Profile,
    /// `memprof` itself.
    pub memprof: Finished,
    /// The target's own output.
    pub target: Finished,
}

impl Recorded {
    /// The profile's only process.
    #[must_use]
    pub fn process(&self) -> &Process {
        self.profile.process()
    }
}

impl<'a> Record<'a> {
    /// A recording with its profile in `dir`, of every allocation.
    #[must_use]
    pub fn every_allocation(dir: &'a TempDir) -> Self {
        Self::with(dir, &["-i", "1"])
    }

    /// A recording with its profile in `dir`.
    #[must_use]
    pub fn with(dir: &'a TempDir, options: &[&str]) -> Self {
        Self {
            dir,
            options: options.iter().map(|&option| option.to_owned()).collect(),
            environment: Vec::new(),
            limit: LIMIT,
        }
    }

    /// With a variable in memprof's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With more options.
    #[must_use]
    pub fn options(mut self, options: &[&str]) -> Self {
        self.options
            .extend(options.iter().map(|&option| option.to_owned()));
        self
    }

    /// With more time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    fn file(&self) -> String {
        self.dir.file("profile.json")
    }

    /// Without `-p` or a command.
    fn start(&self) -> Command {
        let mut command = memprof(&["record"]);
        command
            .args(&self.options)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .args(["-f", "json", "-o", &self.file()]);
        command
    }

    /// Records a command from its start to its end. All goes it waits for are
    /// given at once.
    #[must_use]
    pub fn command(self, target: &Target, args: &[&str]) -> Recorded {
        let mut command = self.start();
        command.arg("--").arg(target.path()).args(args);
        self.run_command(&mut command)
    }

    /// As [`Self::command`], of a program that is not ours.
    #[must_use]
    pub fn program(self, program: &str, args: &[&str]) -> Recorded {
        let mut command = self.start();
        command.arg("--").arg(program).args(args);
        self.run_command(&mut command)
    }

    fn run_command(self, command: &mut Command) -> Recorded {
        let mut memprof = Running::spawn(command);
        memprof.send_last("go");
        let memprof = memprof.finish_within(self.limit);
        memprof.expect_code(0);
        Recorded {
            profile: Profile::read(self.file()),
            target: memprof.clone(),
            memprof,
        }
    }

    /// Records a process that runs already and waits for a go: from there until
    /// it is done.
    #[must_use]
    pub fn attach(self, target: &mut Command, end: End) -> Recorded {
        let mut target = Running::spawn(target);
        target.wait_stdout(|line| line == "ready");
        let mut command = self.start();
        command.args(["-p", &target.pid().to_string()]);
        let memprof = Running::spawn(&mut command);
        memprof.wait_stderr(|line| line.starts_with("memprof: recording"));

        target.send("go");
        target.wait_stdout_for(self.limit, |line| line == "done");
        let (memprof, target) = match end {
            End::TargetExits => {
                target.close_stdin();
                let target = target.finish();
                (memprof.finish_within(self.limit), target)
            }
            End::Interrupt => {
                memprof.signal(Signal::SIGINT);
                let memprof = memprof.finish_within(self.limit);
                assert!(target.is_running(), "the target ended with the recording");
                target.close_stdin();
                (memprof, target.finish())
            }
        };
        memprof.expect_code(0);
        target.expect_code(0);
        let profile = Profile::read(self.file());
        let exited: Vec<bool> = profile
            .processes
            .iter()
            .map(|process| process.exited)
            .collect();
        assert_eq!(
            exited,
            [end == End::TargetExits],
            "whether the target had exited when the recording ended"
        );
        Recorded {
            profile,
            memprof,
            target,
        }
    }
}
