//! The JSON that `memprof` writes, as a reader sees it.

use std::{collections::BTreeMap, fs, path::Path, sync::OnceLock};

use jsonschema::Validator;
use serde::Deserialize;
use serde_json::Value;

/// A profile, schema `memprof.profile/1`.
#[derive(Clone, Debug, Deserialize)]
pub struct Profile {
    /// Name and version of the format.
    pub schema: String,
    /// How long was recorded.
    pub duration_s: f64,
    /// Mean sampling gap.
    pub sample_interval_bytes: u64,
    /// Where the probes were.
    pub probe: Probe,
    /// One entry a process image.
    pub processes: Vec<Process>,
}

/// The probes.
#[derive(Clone, Debug, Deserialize)]
pub struct Probe {
    /// How they were attached.
    pub mode: String,
    /// Every site.
    pub sites: Vec<Site>,
}

/// A probed address.
#[derive(Clone, Debug, Deserialize)]
pub struct Site {
    /// Path of the file.
    pub module: String,
    /// The function.
    pub function: String,
    /// Place in the file.
    pub file_offset: u64,
    /// The same from the function's first byte.
    pub offset: u64,
    /// The instruction there.
    pub instruction: String,
    /// The kernel emulates it.
    pub emulated: bool,
}

/// A process image.
#[derive(Clone, Debug, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Name of its main thread.
    pub comm: String,
    /// Path of its program.
    pub exe: String,
    /// Effective user id.
    pub uid: u32,
    /// Its ids in the pid namespaces that it is in, memprof's own first.
    pub namespace_pids: Vec<u32>,
    /// Path of its cgroup.
    pub cgroup: String,
    /// The container that the path names.
    pub container: Option<Container>,
    /// The systemd unit that it names.
    pub unit: Option<String>,
    /// It has ended, or replaced its program.
    pub exited: bool,
    /// How its calls were looked at.
    pub engine: String,
    /// Why it is not the prefilter, if that was wanted.
    pub engine_reason: Option<String>,
    /// Of a Go program's own profile.
    pub go: Option<Go>,
    /// Why there is none of a Go program.
    pub go_refusal: Option<String>,
    /// For how long it was traced.
    pub traced_s: f64,
    /// What it has from its parent.
    pub inherited: Option<Inherited>,
    /// Whose child it is, if it was traced for that.
    pub child_of: Option<ChildOf>,
    /// All calls, counted exactly.
    pub totals: Option<CallTotals>,
    /// Allocating calls by size.
    pub size_histogram: Option<Vec<SizeClass>>,
    /// What was lost, by cause.
    pub losses: BTreeMap<String, u64>,
    /// Sums over its stacks.
    pub estimates: Estimates,
    /// Its stacks.
    pub stacks: Vec<Stack>,
}

/// Which profile of a Go program it is.
#[derive(Clone, Debug, Deserialize)]
pub struct Go {
    /// Version of Go.
    pub version: String,
    /// Its `runtime.MemProfileRate`.
    pub mem_profile_rate: Option<u64>,
    /// That was another before.
    pub rate_changed: bool,
    /// What the numbers are estimated with.
    pub sample_interval_bytes: u64,
    /// How old the reading is.
    pub age_s: Option<f64>,
    /// A collection has ended.
    pub collected: bool,
    /// No count changed while it was read.
    pub settled: bool,
    /// All of its history is in it.
    pub since_start: bool,
    /// Why the last try to read it failed.
    pub failure: Option<String>,
}

/// What a forked process has from its parent.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Inherited {
    /// The parent.
    pub parent_pid: u32,
    /// Blocks that it held.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Whose child a process is.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct ChildOf {
    /// The parent.
    pub parent_pid: u32,
    /// How long it had lived before it was traced, if that is known.
    pub untraced_s: Option<f64>,
}

/// A container.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Container {
    /// Who made it.
    pub runtime: Option<String>,
    /// Its id.
    pub id: String,
    /// The uid of its pod.
    pub pod_uid: Option<String>,
}

/// Exact numbers of calls.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct CallTotals {
    /// Calls that asked for a block.
    pub alloc_calls: u64,
    /// Bytes asked for.
    pub alloc_bytes: u64,
    /// Calls that gave a block up.
    pub free_calls: u64,
}

/// The calls that asked for sizes in a range.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct SizeClass {
    /// The smallest.
    pub min_bytes: u64,
    /// The largest, if there is one.
    pub max_bytes: Option<u64>,
    /// How many calls.
    pub calls: u64,
}

/// Sums over the stacks of a process, with their intervals.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub struct Estimates {
    /// Allocations.
    pub alloc_objects: u64,
    /// Their bytes.
    pub alloc_bytes: u64,
    /// 95% confidence interval of them.
    pub alloc_bytes_ci95: [u64; 2],
    /// Those not freed.
    pub inuse_objects: u64,
    /// Their bytes.
    pub inuse_bytes: u64,
    /// 95% confidence interval of them.
    pub inuse_bytes_ci95: [u64; 2],
    /// Samples that the numbers rest on.
    pub samples: u64,
}

/// A stack and its numbers.
#[derive(Clone, Debug, Deserialize)]
pub struct Stack {
    /// Allocations.
    pub alloc_objects: u64,
    /// Their bytes.
    pub alloc_bytes: u64,
    /// 95% confidence interval of them.
    pub alloc_bytes_ci95: [u64; 2],
    /// Those not freed.
    pub inuse_objects: u64,
    /// Their bytes.
    pub inuse_bytes: u64,
    /// 95% confidence interval of them.
    pub inuse_bytes_ci95: [u64; 2],
    /// Samples that the numbers rest on.
    pub samples: u64,
    /// There were more callers than frames.
    pub truncated: bool,
    /// Why there are no more frames.
    pub end: String,
    /// Some frames were found by frame pointers.
    pub by_frame_pointer: bool,
    /// Leaf first.
    pub frames: Vec<Frame>,
}

/// A frame.
#[derive(Clone, Debug, Deserialize)]
pub struct Frame {
    /// Its name, if it has one.
    pub function: Option<String>,
    /// The file it is in.
    pub module: Option<String>,
    /// Place in that file.
    pub file_offset: Option<u64>,
    /// The call's address, in hexadecimal, where there is no place in a file.
    pub address: Option<String>,
    /// Source file.
    pub file: Option<String>,
    /// Line in it.
    pub line: Option<u64>,
    /// Inlined into the next frame.
    #[serde(default)]
    pub inlined: bool,
    /// Why it has no name.
    pub unknown: Option<String>,
}

/// Sums over stacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Allocations.
    pub alloc_objects: u64,
    /// Their bytes.
    pub alloc_bytes: u64,
    /// Those not freed.
    pub inuse_objects: u64,
    /// Their bytes.
    pub inuse_bytes: u64,
}

impl Totals {
    /// `count` blocks of `size` bytes allocated, `kept` of them not freed.
    #[must_use]
    pub fn of(count: u64, kept: u64, size: u64) -> Self {
        Self {
            alloc_objects: count,
            alloc_bytes: count * size,
            inuse_objects: kept,
            inuse_bytes: kept * size,
        }
    }
}

/// The sums of some stacks' numbers.
pub fn sum<'a>(stacks: impl IntoIterator<Item = &'a Stack>) -> Totals {
    let mut totals = Totals::default();
    for stack in stacks {
        totals.alloc_objects += stack.alloc_objects;
        totals.alloc_bytes += stack.alloc_bytes;
        totals.inuse_objects += stack.inuse_objects;
        totals.inuse_bytes += stack.inuse_bytes;
    }
    totals
}

impl Profile {
    /// Reads a profile and validates it against the documented schema.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let json: Value = serde_json::from_slice(bytes).unwrap_or_else(|error| {
            panic!("no JSON: {error}: {}", String::from_utf8_lossy(bytes));
        });
        let errors: Vec<String> = schema()
            .iter_errors(&json)
            .take(5)
            .map(|error| format!("{} at {}", error, error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "not as the schema has it: {errors:#?}");
        let profile: Self = serde_json::from_value(json).expect("a profile");
        assert_eq!(profile.schema, "memprof.profile/1");
        profile
    }

    /// Reads a file.
    #[must_use]
    pub fn read(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self::parse(&bytes)
    }

    /// The only process.
    #[must_use]
    pub fn process(&self) -> &Process {
        assert_eq!(self.processes.len(), 1, "one process: {self:#?}");
        &self.processes[0]
    }
}

impl Process {
    /// The stacks that allocated in `function` itself.
    pub fn with_leaf(&self, function: &str) -> Vec<&Stack> {
        self.stacks_where(|stack| stack.frames[0].is(function))
    }

    /// The stacks that `function` is on.
    pub fn through(&self, function: &str) -> Vec<&Stack> {
        self.stacks_where(|stack| stack.frames.iter().any(|frame| frame.is(function)))
    }

    /// The sums of the stacks that allocated in `function` itself.
    #[must_use]
    pub fn leaf_totals(&self, function: &str) -> Totals {
        sum(self.with_leaf(function))
    }

    /// The sums over all stacks.
    #[must_use]
    pub fn totals(&self) -> Totals {
        sum(&self.stacks)
    }

    /// Fails the test unless exactly one stack has the leaf `function`.
    #[must_use]
    pub fn only_stack(&self, function: &str) -> &Stack {
        let stacks = self.with_leaf(function);
        assert_eq!(
            stacks.len(),
            1,
            "one stack with leaf {function}; there are these: {:#?}",
            self.stacks.iter().map(Stack::path).collect::<Vec<_>>()
        );
        stacks[0]
    }

    /// Its exact totals, which must be known.
    #[must_use]
    pub fn exact(&self) -> CallTotals {
        self.totals.expect("exact totals")
    }

    /// What was lost for one cause.
    #[must_use]
    pub fn loss(&self, cause: &str) -> u64 {
        *self
            .losses
            .get(cause)
            .unwrap_or_else(|| panic!("no {cause} among the losses: {:?}", self.losses))
    }

    fn stacks_where(&self, wanted: impl Fn(&Stack) -> bool) -> Vec<&Stack> {
        self.stacks.iter().filter(|stack| wanted(stack)).collect()
    }
}

impl Stack {
    /// Its sums.
    #[must_use]
    pub fn totals(&self) -> Totals {
        sum([self])
    }

    /// The names of its frames, leaf first.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.frames.iter().map(Frame::name).collect()
    }

    /// Its names in one line.
    #[must_use]
    pub fn path(&self) -> String {
        self.names().join(" < ")
    }
}

impl Frame {
    /// Whether it is in `function`.
    #[must_use]
    pub fn is(&self, function: &str) -> bool {
        self.function.as_deref() == Some(function)
    }

    /// Its name, or why it has none in parentheses.
    #[must_use]
    pub fn name(&self) -> &str {
        self.function
            .as_deref()
            .or(self.unknown.as_deref())
            .unwrap_or("(nothing)")
    }
}

/// The documented schema.
fn schema() -> &'static Validator {
    static SCHEMA: OnceLock<Validator> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../docs/memprof.profile-1.schema.json"
        );
        let text = fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let schema: Value = serde_json::from_slice(&text).expect("the schema is JSON");
        jsonschema::validator_for(&schema).expect("the schema is a JSON Schema")
    })
}
