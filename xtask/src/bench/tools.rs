//! The tools that are put on a running process, and taken off again.

use std::{
    fmt, fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::Signal;

use super::{
    check,
    context::{Context, allocator_of},
    process::{self, Process},
};

/// The script that bpftrace runs.
const LEAK_SCRIPT: &str = include_str!("targets/leak.bt");

/// Room in bpftrace's maps: more than blocks are live in any measurement.
const BPFTRACE_KEYS: &str = "2000000";

/// Python and a compiler have to start before memleak's probes are in place.
const MEMLEAK_LIMIT: Duration = Duration::from_secs(60);

/// How probes are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probe {
    /// Decides in the target; only samples trap.
    Prefilter,
    /// The best way of the uprobe engine.
    Uprobe,
    /// One session link for all sites.
    Session,
    /// One link for all entries, one for all returns.
    Multi,
    /// A perf event a site.
    Perf,
}

impl Probe {
    /// As `--probe` has it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Prefilter => "prefilter",
            Self::Uprobe => "uprobe",
            Self::Session => "session",
            Self::Multi => "multi",
            Self::Perf => "perf",
        }
    }
}

/// Where empty programs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Where memprof has its own, returns included.
    Sites,
    /// The same without returns.
    SitesOnly,
    /// At the first instruction of each function, emulated or not.
    Starts,
}

/// A tool that is put on a running process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tool {
    /// Empty BPF programs at memprof's sites.
    Floor {
        /// How they are attached.
        probe: Probe,
        /// Where.
        place: Place,
    },
    /// `memprof record`.
    Memprof {
        /// How its probes are attached, unless it may choose.
        probe: Option<Probe>,
        /// Its sampling interval, unless the default.
        interval: Option<&'static str>,
    },
    /// The leak script in bpftrace.
    Bpftrace,
    /// memleak of bcc.
    Memleak,
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Floor { probe, place } => {
                let place = match place {
                    Place::Sites => "",
                    Place::SitesOnly => ", no returns",
                    Place::Starts => ", at the functions' first instructions",
                };
                write!(f, "floor {}{place}", probe.name())
            }
            Self::Memprof { probe, interval } => {
                write!(f, "memprof {}", probe.map_or("auto", Probe::name))?;
                match interval {
                    None => Ok(()),
                    Some("1") => f.write_str(", every allocation"),
                    Some(interval) => write!(f, ", {interval}"),
                }
            }
            Self::Bpftrace => f.write_str("bpftrace leak script"),
            Self::Memleak => f.write_str("bcc memleak"),
        }
    }
}

/// What the target did while a tool was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Calls of malloc.
    pub(super) allocs: u64,
    /// Bytes they asked for.
    pub(super) bytes: u64,
}

impl Tool {
    /// Why it cannot take part.
    pub(super) fn absence(self, context: &Context) -> Option<String> {
        match self {
            Self::Floor { .. } => context.floor.clone().err(),
            Self::Memprof { probe: Some(_), .. } if !context.has_probe_option => {
                Some("this memprof has no --probe".to_owned())
            }
            Self::Memprof { .. } => None,
            Self::Bpftrace => context.bpftrace.clone().err(),
            Self::Memleak => context.memleak.clone().err(),
        }
    }

    /// Puts it on process `pid`. `is_slower` tells whether the process pays for
    /// probes, for a tool that does not say when it is ready.
    ///
    /// # Errors
    ///
    /// It does not become ready.
    pub(super) fn attach(
        self,
        context: &Context,
        pid: u32,
        is_slower: &mut dyn FnMut() -> Result<bool>,
    ) -> Result<Attached> {
        let pid_word = pid.to_string();
        let profile = context.file("attached.json");
        let path = |found: &std::result::Result<PathBuf, String>| {
            found.clone().map_err(|why| anyhow!(why))
        };
        let mut command = match self {
            Self::Floor { .. } => Command::new(path(&context.floor)?),
            Self::Memprof { .. } => Command::new(&context.memprof),
            Self::Bpftrace => Command::new(path(&context.bpftrace)?),
            Self::Memleak => Command::new(path(&context.memleak)?),
        };
        match self {
            Self::Floor { probe, place } => {
                command.args(["-p", &pid_word, "--probe", probe.name()]);
                match place {
                    Place::Sites => {}
                    Place::SitesOnly => {
                        command.arg("--entry-only");
                    }
                    Place::Starts => {
                        command.arg("--at-start");
                    }
                }
            }
            Self::Memprof { .. } => {
                let _ = fs::remove_file(&profile);
                command.arg("record").args(self.memprof_arguments());
                command.args(["-p", &pid_word, "-o"]).arg(&profile);
            }
            Self::Bpftrace => {
                let script = context.file("leak.bt");
                fs::write(&script, LEAK_SCRIPT.replace("LIBRARY", &allocator_of(pid)?))?;
                command.args(["-p", &pid_word]).arg(script);
                command.env("BPFTRACE_MAP_KEYS_MAX", BPFTRACE_KEYS);
            }
            Self::Memleak => {
                command.args(["-p", &pid_word, "3600"]);
            }
        }
        let process = Process::spawn(&mut command)?;
        let limit = process::LIMIT;
        match self {
            Self::Floor { .. } => {
                process.wait_stderr(limit, |line| line == "floor: attached")?;
            }
            Self::Memprof { .. } => {
                let wanted = |line: &str| line.starts_with("memprof: recording pid ");
                process.wait_stderr(limit, wanted)?;
            }
            Self::Bpftrace => {
                process.wait_stdout(limit, |line| line == "ready")?;
            }
            Self::Memleak => wait_until_slower(is_slower)?,
        }
        Ok(Attached {
            tool: self,
            process,
            profile,
        })
    }

    /// memprof's options: how to attach, and how often to sample.
    pub(super) fn memprof_arguments(self) -> Vec<String> {
        let mut arguments = Vec::new();
        if let Self::Memprof { probe, interval } = self {
            if let Some(probe) = probe {
                arguments.extend(["--probe".to_owned(), probe.name().to_owned()]);
            }
            if let Some(interval) = interval {
                arguments.extend(["-i".to_owned(), interval.to_owned()]);
            }
        }
        arguments
    }
}

fn wait_until_slower(is_slower: &mut dyn FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + MEMLEAK_LIMIT;
    while Instant::now() < deadline {
        if is_slower()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    bail!("its probes did not come")
}

/// A tool that is on a process.
pub(super) struct Attached {
    tool: Tool,
    process: Process,
    profile: PathBuf,
}

/// What a tool left when it was taken off.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Calls of the allocator it saw, if it counts them.
    pub(super) calls: Option<(u64, &'static str)>,
}

impl Attached {
    /// Takes it off, and checks that it has seen `work` if that is known.
    ///
    /// # Errors
    ///
    /// It failed, or did not see what the target did.
    pub(super) fn detach(self, work: Option<Work>) -> Result<Left> {
        self.process.signal(Signal::SIGINT);
        self.end(work)
    }

    /// As [`Self::detach`], of a tool that ends with its target.
    ///
    /// # Errors
    ///
    /// As [`Self::detach`].
    pub(super) fn end(self, work: Option<Work>) -> Result<Left> {
        let finished = self.process.finish(process::LIMIT)?;
        if self.tool == Tool::Memleak {
            // Its exit status after SIGINT tells nothing.
            if !finished.stdout.contains("outstanding") && !finished.stdout.contains("Attaching") {
                bail!("it reported nothing");
            }
            return Ok(Left::default());
        }
        let finished = finished.success(&self.tool.to_string())?;
        match self.tool {
            Tool::Floor { .. } | Tool::Memleak => Ok(Left::default()),
            Tool::Memprof { interval, .. } => {
                let text = fs::read(&self.profile).context("it wrote no profile")?;
                let profile = serde_json::from_slice(&text).context("its profile is no JSON")?;
                let calls = check::profile(&profile, interval == Some("1"), work)?;
                Ok(Left {
                    calls: calls.map(|calls| (calls, "memprof")),
                })
            }
            Tool::Bpftrace => {
                let mallocs = check::bpftrace_count(&finished.stdout, "@mallocs")?;
                let frees = check::bpftrace_count(&finished.stdout, "@frees").unwrap_or(0);
                check::counted(mallocs, work)?;
                Ok(Left {
                    calls: Some((mallocs + frees, "bpftrace")),
                })
            }
        }
    }
}
