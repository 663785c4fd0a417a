//! JSON, schema `memprof.profile/1`: `docs/json.md` says what each field means,
//! `docs/memprof.profile-1.schema.json` says it to machines.

mod frames;

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write},
    time::{Duration, SystemTime},
};

use serde::{Serialize, Serializer};

use self::frames::{Frames, Written};
use crate::export::{
    go::GoObject,
    numbers::{Numbers, by_inuse},
    profile::{ChildOf, Inherited, Origin, ProbeSite, ProcessProfile, Profile, StackProfile},
    totals::{CallTotals, SizeClass},
};

/// The value of the field `schema`.
pub const SCHEMA: &str = "memprof.profile/1";

/// The same for the profile of a window: what is in use may be below zero there, which readers
/// of the other need not know of.
pub const WINDOW_SCHEMA: &str = "memprof.window/1";

/// Writes a profile as JSON, stack by stack, with a newline at the end.
///
/// # Errors
///
/// Those of the writer.
pub fn write(profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    let mut out = BufWriter::new(out);
    serde_json::to_writer(&mut out, &Document::from(profile))?;
    out.write_all(b"\n")?;
    out.flush()
}

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    captured_at: String,
    duration_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    window_s: Option<f64>,
    kernel: &'a str,
    arch: &'a str,
    sample_interval_bytes: u64,
    probe: Probe<'a>,
    processes: Processes<'a>,
}

#[derive(Serialize)]
struct Probe<'a> {
    mode: &'a str,
    sites: Vec<Site<'a>>,
}

#[derive(Serialize)]
struct Site<'a> {
    module: &'a str,
    function: &'a str,
    file_offset: u64,
    offset: u32,
    instruction: &'a str,
    emulated: bool,
}

impl<'a> From<&'a Profile> for Document<'a> {
    fn from(profile: &'a Profile) -> Self {
        let site = |site: &'a ProbeSite| Site {
            module: &site.module,
            function: &site.function,
            file_offset: site.file_offset,
            offset: site.offset,
            instruction: &site.instruction,
            emulated: site.emulated,
        };
        Self {
            schema: match profile.window {
                Some(_) => WINDOW_SCHEMA,
                None => SCHEMA,
            },
            captured_at: rfc_3339(profile.captured_at),
            duration_s: seconds(profile.duration),
            window_s: profile.window.map(seconds),
            kernel: &profile.kernel,
            arch: &profile.arch,
            sample_interval_bytes: profile.sample_interval_bytes,
            probe: Probe {
                mode: &profile.probe.mode,
                sites: profile.probe.sites.iter().map(site).collect(),
            },
            processes: Processes(profile),
        }
    }
}

/// A time in UTC, with milliseconds. Times before 1970 are no times of ours:
/// they are a clock that was never set.
pub(crate) fn rfc_3339(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time.max(SystemTime::UNIX_EPOCH)).to_string()
}

/// Nobody reads more than milliseconds in it.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e3).round() / 1e3
}

struct Processes<'a>(&'a Profile);

impl Serialize for Processes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let processes = self.0.processes.iter();
        serializer.collect_seq(processes.map(|process| {
            let interval = self.0.coarsest_interval_of(process);
            Process::new(process, interval)
        }))
    }
}

#[derive(Serialize)]
struct Process<'a> {
    pid: u32,
    comm: &'a str,
    exe: &'a str,
    #[serde(flatten)]
    origin: &'a Origin,
    start_time: String,
    exited: bool,
    engine: &'static str,
    engine_reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    go: Option<GoObject<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    go_refusal: Option<&'a str>,
    traced_s: f64,
    inherited: Option<Inherited>,
    #[serde(skip_serializing_if = "Option::is_none")]
    child_of: Option<ChildOf>,
    memory: Option<Memory>,
    totals: Option<CallTotals>,
    size_histogram: Option<&'a [SizeClass]>,
    losses: &'a BTreeMap<&'static str, u64>,
    estimates: Estimates,
    stacks: Stacks<'a>,
}

#[derive(Serialize)]
struct Memory {
    rss_bytes: u64,
    rss_anon_bytes: u64,
    rss_file_bytes: u64,
    rss_peak_bytes: u64,
    swap_bytes: u64,
    virtual_bytes: u64,
}

impl<'a> Process<'a> {
    fn new(process: &'a ProcessProfile, sample_interval_bytes: u64) -> Self {
        Self {
            pid: process.pid,
            comm: &process.comm,
            exe: &process.exe,
            origin: &process.origin,
            start_time: rfc_3339(process.start_time),
            exited: process.exited,
            engine: process.engine.name(),
            engine_reason: process.engine.reason(),
            go: process.go.as_ref().map(GoObject::from),
            go_refusal: process.go_refusal.as_deref(),
            traced_s: seconds(process.traced),
            inherited: process.inherited,
            child_of: process.child_of,
            memory: process.memory.map(|memory| Memory {
                rss_bytes: memory.rss_bytes,
                rss_anon_bytes: memory.rss_anon_bytes,
                rss_file_bytes: memory.rss_file_bytes,
                rss_peak_bytes: memory.rss_peak_bytes,
                swap_bytes: memory.swap_bytes,
                virtual_bytes: memory.virtual_bytes,
            }),
            totals: process.totals.as_ref().map(|totals| totals.calls),
            size_histogram: process
                .totals
                .as_ref()
                .map(|totals| totals.size_histogram.as_slice()),
            losses: &process.losses,
            estimates: Numbers::of_process(process, sample_interval_bytes).into(),
            stacks: Stacks(process),
        }
    }
}

struct Stacks<'a>(&'a ProcessProfile);

impl Serialize for Stacks<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let written = Written::default();
        serializer.collect_seq(
            by_inuse(self.0)
                .into_iter()
                .map(|(stack, numbers)| Stack::new(stack, numbers, &written)),
        )
    }
}

/// What a stack and a process have in common.
#[derive(Serialize)]
struct Estimates {
    alloc_objects: u64,
    alloc_bytes: u64,
    alloc_bytes_ci95: [u64; 2],
    inuse_objects: i64,
    inuse_bytes: i64,
    inuse_bytes_ci95: [i64; 2],
    samples: u64,
}

impl From<Numbers> for Estimates {
    fn from(numbers: Numbers) -> Self {
        Self {
            alloc_objects: numbers.alloc_objects,
            alloc_bytes: numbers.alloc_bytes,
            alloc_bytes_ci95: numbers.alloc_bytes_ci95,
            inuse_objects: numbers.inuse_objects,
            inuse_bytes: numbers.inuse_bytes,
            inuse_bytes_ci95: numbers.inuse_bytes_ci95,
            samples: numbers.samples,
        }
    }
}

#[derive(Serialize)]
struct Stack<'a> {
    #[serde(flatten)]
    estimates: Estimates,
    truncated: bool,
    end: &'static str,
    by_frame_pointer: bool,
    frames: Frames<'a>,
}

impl<'a> Stack<'a> {
    fn new(stack: &'a StackProfile, numbers: Numbers, written: &'a Written<'a>) -> Self {
        Self {
            estimates: numbers.into(),
            truncated: stack.truncated(),
            end: stack.end.name(),
            by_frame_pointer: stack.by_frame_pointer,
            frames: Frames {
                frames: &stack.frames,
                written,
            },
        }
    }
}

#[cfg(test)]
mod tests;
