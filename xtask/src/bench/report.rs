//! The results: what the JSON file holds, and everything in docs/benchmarks.md
//! comes from.

use serde::{Deserialize, Serialize};

use super::stats::Estimate;

/// Schema of the results.
pub(super) const SCHEMA: &str = "memprof.bench/1";

/// All results of one run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    /// [`SCHEMA`].
    pub(super) schema: String,
    /// Where, when and with what.
    pub(super) host: Host,
    /// Measured with `--quick`.
    pub(super) quick: bool,
    /// How long it took.
    pub(super) duration_s: f64,
    /// What a malloc and a free cost.
    pub(super) pair: Vec<PairTable>,
    /// Real programs.
    pub(super) programs: Vec<ProgramTable>,
    /// Every allocation of a busy program.
    pub(super) trace: Option<Trace>,
    /// A million live blocks.
    pub(super) dump: Option<Dump>,
    /// How long processes stand still.
    #[serde(default)]
    pub(super) stops: Vec<StopRow>,
    /// A sample's stack, walked.
    #[serde(default)]
    pub(super) unwind: Vec<UnwindRow>,
    /// Unwind tables of large files.
    #[serde(default)]
    pub(super) tables: Vec<TableRow>,
    /// Many processes under one daemon.
    pub(super) many: Option<Many>,
    /// What processes pay that are not traced.
    #[serde(default)]
    pub(super) excluded: Vec<ExcludedRow>,
    /// Sections that failed as a whole.
    pub(super) failures: Vec<Failure>,
    /// What memprof is held to.
    pub(super) bars: Vec<Bar>,
}

/// Where, when and with what was measured.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Host {
    /// Time of the start, UTC.
    pub(super) date: String,
    /// The processor's name.
    pub(super) machine: String,
    /// Logical processors.
    pub(super) cpus: usize,
    /// Release of the kernel.
    pub(super) kernel: String,
    /// Version of the C library.
    pub(super) libc: String,
    /// memprof's git commit, with `-dirty` if the sources differ from it.
    pub(super) commit: String,
    /// Peers and programs with their versions, or why they are absent.
    pub(super) versions: Vec<Version>,
}

/// A program that takes part.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Version {
    /// Its name.
    pub(super) name: String,
    /// Its version, or why it is absent.
    pub(super) version: String,
}

/// Whether there is a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// There is.
    Measured,
    /// It could not be tried, and why.
    Absent(String),
    /// It was tried and went wrong, and how.
    Failed(String),
}

/// The cost of one operation under each tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PairTable {
    /// What is measured, see [`super::pair::VARIANTS`].
    pub(super) name: String,
    /// What an operation is.
    pub(super) operation: String,
    /// Threads at it.
    pub(super) threads: usize,
    /// One a tool.
    pub(super) rows: Vec<PairRow>,
}

/// The cost under one tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PairRow {
    /// The tool.
    pub(super) name: String,
    /// Whether there is a result.
    pub(super) outcome: Outcome,
    /// Nanoseconds an operation, on each thread.
    pub(super) ns: Option<Estimate>,
    /// The same over that without a tool, of the same round and process.
    pub(super) over_none: Option<Estimate>,
    /// The row that is the floor of this one.
    pub(super) floor: Option<String>,
    /// Nanoseconds over those of the floor, of the same round and process.
    pub(super) over_floor: Option<Estimate>,
}

/// One program under each tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ProgramTable {
    /// The program and what it does.
    pub(super) name: String,
    /// Calls of malloc's family a second, without a tool.
    pub(super) calls_per_second: Option<f64>,
    /// Who counted them.
    pub(super) calls_source: Option<String>,
    /// One a tool.
    pub(super) rows: Vec<ProgramRow>,
}

/// One program under one tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ProgramRow {
    /// The tool.
    pub(super) name: String,
    /// Whether there is a result.
    pub(super) outcome: Outcome,
    /// Seconds for the work.
    pub(super) seconds: Option<Estimate>,
    /// Units of work a second, and what they are.
    pub(super) throughput: Option<(f64, String)>,
    /// Seconds over those without a tool, of the same round.
    pub(super) over_none: Option<Estimate>,
}

/// Every allocation of two busy threads.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Trace {
    /// Busy threads.
    pub(super) threads: usize,
    /// How probes were attached.
    pub(super) probe_mode: String,
    /// One a number of live blocks.
    pub(super) runs: Vec<TraceRun>,
    /// Resident bytes of the daemon with nothing live.
    pub(super) idle_rss_bytes: u64,
    /// Blocks of one stack then made live.
    pub(super) live_blocks: u64,
    /// Resident bytes of the daemon a live block.
    pub(super) rss_bytes_per_block: f64,
}

/// One run of the busy threads.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TraceRun {
    /// Blocks live at the end.
    pub(super) live: u64,
    /// Wall time.
    pub(super) seconds: f64,
    /// Calls of malloc and free.
    pub(super) calls: u64,
    /// Events the daemon booked.
    pub(super) events: u64,
    /// Lost events by cause, those that are not 0.
    pub(super) dropped: Vec<(String, u64)>,
    /// Processor time of the daemon, until it had booked all.
    pub(super) daemon_cpu_s: f64,
    /// Objects in use: the program's count, the profile's.
    pub(super) inuse_objects: (u64, u64),
    /// Bytes in use: the program's count, the profile's.
    pub(super) inuse_bytes: (u64, u64),
}

/// Attaching to a process of many threads and detaching, each of these a value a round.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StopRow {
    /// Its threads.
    pub(super) threads: usize,
    /// Those that allocate all the time.
    pub(super) busy: usize,
    /// The longest stop of an attach.
    pub(super) stopped_ms: Vec<f64>,
    /// From the daemon's start until it listened.
    pub(super) attach_ms: Vec<f64>,
    /// The longest stop of a detach.
    pub(super) unstopped_ms: Vec<f64>,
    /// From SIGTERM to the daemon's end.
    pub(super) detach_ms: Vec<f64>,
}

/// A million live blocks of many stacks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Dump {
    /// Blocks live in the program.
    pub(super) live: u64,
    /// Objects in use in the profile.
    pub(super) profile_live: u64,
    /// Stacks the program allocated from.
    pub(super) stacks: u64,
    /// Stacks the daemon knows.
    pub(super) known_stacks: u64,
    /// Lost events by cause, those that are not 0.
    pub(super) dropped: Vec<(String, u64)>,
    /// Sites probed.
    pub(super) sites: u64,
    /// From the daemon's start until it listens.
    pub(super) attach_clock_ms: f64,
    /// As the daemon tells it.
    pub(super) attach_ms: Option<f64>,
    /// From SIGTERM to the end of a daemon, the program going on.
    pub(super) detach_clock_ms: f64,
    /// As the daemon tells it, once the program has ended.
    pub(super) detach_ms: Option<f64>,
    /// Seconds of each dump as JSON, the first one naming all frames.
    pub(super) json_s: Vec<f64>,
    /// Its size.
    pub(super) json_bytes: u64,
    /// Seconds of each dump as pprof.
    pub(super) pprof_s: Vec<f64>,
    /// Its size.
    pub(super) pprof_bytes: u64,
    /// Resident bytes of the daemon with nothing live.
    pub(super) idle_rss_bytes: u64,
    /// Resident bytes when all blocks were booked, before the first dump.
    pub(super) loaded_rss_bytes: u64,
    /// Resident bytes after the dumps.
    pub(super) rss_bytes: u64,
    /// The most that were ever resident.
    pub(super) rss_peak_bytes: u64,
    /// Kernel memory of the daemon's BPF maps.
    pub(super) bpf_maps_bytes: u64,
}

/// What a call costs whose stack has so many frames.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct UnwindRow {
    /// Frames; none where the call is not sampled.
    pub(super) frames: Option<usize>,
    /// In BPF programs, by the kernel's clock.
    pub(super) bpf: UnwindCost,
    /// In all, as the program sees it.
    pub(super) call: UnwindCost,
}

/// Nanoseconds a call.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct UnwindCost {
    /// The stack is walked by unwind tables.
    pub(super) tables: Option<Estimate>,
    /// The stack is walked by the kernel, by frame pointers.
    pub(super) kernel: Option<Estimate>,
    /// The former over the latter, of the same round.
    pub(super) ratio: Option<Estimate>,
}

/// The unwind table of one file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct TableRow {
    /// The file.
    pub(super) path: String,
    /// Its size.
    pub(super) file_bytes: u64,
    /// Functions in its unwind information.
    pub(super) functions: u64,
    /// Rows of the table.
    pub(super) rows: u64,
    /// The table's size.
    pub(super) table_bytes: u64,
    /// Memory that compiling took at most, one a time.
    pub(super) peak_bytes: Vec<u64>,
    /// Seconds that compiling took, one a time.
    pub(super) seconds: Vec<f64>,
}

/// Many processes under one daemon, beside one of them.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Many {
    /// What the processes run.
    pub(super) programs: String,
    /// Only one of the processes.
    pub(super) one: Traced,
    /// All of them.
    pub(super) all: Traced,
}

/// Processes under a daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Traced {
    /// How many.
    pub(super) processes: usize,
    /// From the daemon's start until all are traced, in milliseconds.
    pub(super) attach_ms: f64,
    /// Processor time of the daemon until then.
    pub(super) attach_cpu_s: f64,
    /// Distinct files with code that they map, and their unwind tables' bytes.
    pub(super) files: (usize, u64),
    /// How often those are mapped, and the bytes if each had a table of its own.
    pub(super) mapped: (usize, u64),
    /// What unwind tables and lists of mappings do take.
    pub(super) unwind_table_bytes: u64,
    /// Kernel memory of the other BPF maps.
    pub(super) bpf_maps_bytes: u64,
    /// Resident bytes of the daemon.
    pub(super) rss_bytes: u64,
    /// The most that were ever resident.
    pub(super) rss_peak_bytes: u64,
    /// Processors that the daemon takes while the processes do nothing.
    pub(super) idle_cores: f64,
    /// From SIGTERM to the daemon's end, in milliseconds.
    pub(super) detach_ms: f64,
}

/// A process beside a daemon for all.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ExcludedRow {
    /// The daemon's rules.
    pub(super) name: String,
    /// Nanoseconds a malloc and a free.
    pub(super) ns: Option<Estimate>,
    /// The same over those without a daemon, of the same round.
    pub(super) over_none: Option<Estimate>,
}

/// A section without results.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    /// Its name.
    pub(super) section: String,
    /// Why.
    pub(super) reason: String,
}

/// Something memprof is held to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bar {
    /// What is asked for.
    pub(super) name: String,
    /// What was measured, or why nothing was.
    pub(super) value: String,
    /// Whether it is met.
    pub(super) verdict: Verdict,
}

/// Whether a bar is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// It is.
    Reached,
    /// It is not.
    Missed,
    /// Nothing to judge by.
    NotMeasured,
}
