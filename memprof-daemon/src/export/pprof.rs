//! pprof's profile.proto, gzip'ed, with the four sample types of Go's heap
//! profiles: `go tool pprof` and profile stores read it.

pub mod legacy;
mod proto;

use std::{
    collections::{HashMap, hash_map::Entry},
    io::{self, BufWriter, Write},
    ptr,
    time::SystemTime,
};

use flate2::{Compression, write::GzEncoder};
use prost::Message as _;

use crate::{
    export::{
        line::{build_id, frame_lines, module},
        losses,
        numbers::{Numbers, ValueType, by_inuse},
        profile::{ProcessProfile, Profile},
    },
    process::mapping::Mapping,
    symbolize::frame::Frame,
};

/// What of a profile readers are to see first, and how processes are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The values that are shown if no others are asked for.
    pub default: ValueType,
    /// Whether samples are labelled with their process also where there is one only.
    pub labelled: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            default: ValueType::InuseSpace,
            labelled: false,
        }
    }
}

/// Writes a profile as gzip'ed profile.proto.
///
/// # Errors
///
/// Those of the writer.
pub fn write(profile: &Profile, options: Options, out: &mut dyn Write) -> io::Result<()> {
    let encoded = build(profile, options).encode_to_vec();
    let mut gzip = GzEncoder::new(BufWriter::new(out), Compression::default());
    gzip.write_all(&encoded)?;
    gzip.finish()?.flush()
}

/// Builds the message.
fn build(profile: &Profile, options: Options) -> proto::Profile {
    let mut builder = Builder::new();
    builder.header(profile, options);
    // Readers take the first mapping for the program's own.
    for process in &profile.processes {
        builder.program_first(process);
    }
    let label_processes = options.labelled || profile.processes.len() > 1;
    for process in &profile.processes {
        builder.process(process, label_processes);
    }
    builder.message
}

/// A mapping by what makes it one, not by which process has it: processes that
/// run the same file at the same address share it, and those that have another
/// file there do not.
#[derive(PartialEq, Eq, Hash)]
struct MappingKey {
    start: u64,
    end: u64,
    file_offset: u64,
    device: u64,
    inode: u64,
    filename: i64,
    build_id: i64,
}

/// An address means nothing without its mapping; without one, only the name it
/// was given tells it apart.
#[derive(PartialEq, Eq, Hash)]
struct LocationKey {
    mapping_id: u64,
    address: u64,
    function_id: u64,
}

/// The message with what finds its parts again.
struct Builder {
    message: proto::Profile,
    strings: HashMap<String, i64>,
    mappings: HashMap<MappingKey, u64>,
    locations: HashMap<LocationKey, u64>,
    functions: HashMap<(i64, i64), u64>,
}

impl Builder {
    fn new() -> Self {
        let mut builder = Self {
            message: proto::Profile::default(),
            strings: HashMap::new(),
            mappings: HashMap::new(),
            locations: HashMap::new(),
            functions: HashMap::new(),
        };
        builder.string("");
        builder
    }

    fn header(&mut self, profile: &Profile, options: Options) {
        for value_type in ValueType::ALL {
            let sample_type = proto::ValueType {
                r#type: self.string(value_type.name()),
                unit: self.string(value_type.unit()),
            };
            self.message.sample_type.push(sample_type);
        }
        self.message.default_sample_type = self.string(options.default.name());
        self.message.period_type = Some(proto::ValueType {
            r#type: self.string("space"),
            unit: self.string("bytes"),
        });
        self.message.period = signed(profile.sample_interval_bytes);
        let since_1970 = profile.captured_at.duration_since(SystemTime::UNIX_EPOCH);
        self.message.time_nanos = since_1970.map_or(0, |time| signed_nanos(time.as_nanos()));
        self.message.duration_nanos = signed_nanos(profile.duration.as_nanos());
        // The format has no place for losses; comments are shown at least.
        for process in &profile.processes {
            for (name, &number) in &process.losses {
                if number != 0 {
                    let loss = losses::sentence(name, number);
                    let comment = self.string(&format!("process {}: {loss}", process.pid));
                    self.message.comment.push(comment);
                }
            }
        }
    }

    fn program_first(&mut self, process: &ProcessProfile) {
        let frames = process.stacks.iter().flat_map(|stack| &stack.frames);
        let program = frames
            .filter(|frame| module(frame).is_some_and(|module| module == process.exe))
            .find_map(|frame| frame.mapping.as_deref());
        if let Some(mapping) = program {
            self.mapping(mapping);
        }
    }

    /// Which process it is, if there are several; and what of its origin is known.
    fn labels(&mut self, process: &ProcessProfile, labelled: bool) -> Vec<proto::Label> {
        let mut labels = Vec::new();
        if labelled {
            labels.push(proto::Label {
                key: self.string("pid"),
                str: 0,
                num: i64::from(process.pid),
            });
        }
        let cgroup = &process.origin.cgroup;
        let container = cgroup.container.as_ref();
        let texts = [
            ("comm", labelled.then_some(process.comm.as_str())),
            (
                "container_id",
                container.map(|container| container.id.as_str()),
            ),
            (
                "pod_uid",
                container.and_then(|container| container.pod_uid.as_deref()),
            ),
            ("unit", cgroup.unit.as_deref()),
        ];
        for (key, text) in texts {
            if let Some(text) = text {
                labels.push(proto::Label {
                    key: self.string(key),
                    str: self.string(text),
                    num: 0,
                });
            }
        }
        labels
    }

    fn process(&mut self, process: &ProcessProfile, labelled: bool) {
        let label = self.labels(process, labelled);
        let mut known: HashMap<*const Frame, u64> = HashMap::new();
        for (stack, numbers) in by_inuse(process) {
            if numbers.is_zero() {
                continue;
            }
            let locations = stack.frames.iter().map(|frame| {
                // Stacks share their frames, which the profile keeps in place.
                let key = ptr::from_ref(&**frame);
                match known.get(&key) {
                    Some(&id) => id,
                    None => {
                        let id = self.location(frame);
                        known.insert(key, id);
                        id
                    }
                }
            });
            let location_id = locations.collect();
            self.message.sample.push(proto::Sample {
                location_id,
                value: values(&numbers),
                label: label.clone(),
            });
        }
    }

    fn location(&mut self, frame: &Frame) -> u64 {
        let mapping_id = match frame.mapping.as_deref() {
            Some(mapping) => self.mapping(mapping),
            None => 0,
        };
        let mut lines = Vec::new();
        for line in frame_lines(frame) {
            let (file, number) = line
                .function
                .map_or((None, None), |known| (known.file.as_deref(), known.line));
            let function_id = self.function(&line.label(), file.unwrap_or_default());
            lines.push(proto::Line {
                function_id,
                line: number.map_or(0, i64::from),
            });
            self.note_names(mapping_id, line.function.is_ok(), file, number);
        }
        let key = LocationKey {
            mapping_id,
            address: frame.address.0,
            function_id: lines.first().map_or(0, |line| line.function_id),
        };
        let next_id = next_id(&self.message.location);
        match self.locations.entry(key) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                self.message.location.push(proto::Location {
                    id: next_id,
                    mapping_id,
                    address: frame.address.0,
                    line: lines,
                });
                *new.insert(next_id)
            }
        }
    }

    /// Notes in a mapping's flags what names its locations have.
    fn note_names(&mut self, mapping_id: u64, named: bool, file: Option<&str>, line: Option<u32>) {
        let place = usize::try_from(mapping_id)
            .ok()
            .and_then(|id| id.checked_sub(1));
        let mapping = place.and_then(|place| self.message.mapping.get_mut(place));
        if let Some(mapping) = mapping {
            mapping.has_functions |= named;
            mapping.has_filenames |= file.is_some();
            mapping.has_line_numbers |= line.is_some();
            // Only debug information has lines, and it has inlined functions.
            mapping.has_inline_frames |= line.is_some();
        }
    }

    fn mapping(&mut self, mapping: &Mapping) -> u64 {
        let file = mapping.file.as_deref();
        let filename = match file {
            Some(file) => self.string(&file.path.to_string_lossy()),
            // As perf calls memory without a name.
            None if mapping.name.is_empty() => self.string("//anon"),
            None => self.string(&mapping.name),
        };
        let build_id = match file.and_then(build_id) {
            Some(build_id) => self.string(&build_id),
            None => 0,
        };
        let key = MappingKey {
            start: mapping.start.0,
            end: mapping.end.0,
            file_offset: mapping.file_offset.0,
            device: file.map_or(0, |file| file.device),
            inode: file.map_or(0, |file| file.inode),
            filename,
            build_id,
        };
        let next_id = next_id(&self.message.mapping);
        match self.mappings.entry(key) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                self.message.mapping.push(proto::Mapping {
                    id: next_id,
                    memory_start: mapping.start.0,
                    memory_limit: mapping.end.0,
                    file_offset: mapping.file_offset.0,
                    filename,
                    build_id,
                    ..proto::Mapping::default()
                });
                *new.insert(next_id)
            }
        }
    }

    fn function(&mut self, name: &str, file: &str) -> u64 {
        let name = self.string(name);
        let filename = self.string(file);
        let next_id = next_id(&self.message.function);
        match self.functions.entry((name, filename)) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                self.message.function.push(proto::Function {
                    id: next_id,
                    name,
                    filename,
                });
                *new.insert(next_id)
            }
        }
    }

    fn string(&mut self, string: &str) -> i64 {
        if let Some(&index) = self.strings.get(string) {
            return index;
        }
        let index = signed(self.message.string_table.len() as u64);
        self.message.string_table.push(string.to_owned());
        self.strings.insert(string.to_owned(), index);
        index
    }
}

/// The id of the next entry: ids are places, from 1 on.
fn next_id<T>(entries: &[T]) -> u64 {
    entries.len() as u64 + 1
}

fn values(numbers: &Numbers) -> Vec<i64> {
    let values = ValueType::ALL.iter();
    values
        .map(|&value_type| numbers.value(value_type))
        .collect()
}

/// The format has signed numbers everywhere.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn signed_nanos(nanos: u128) -> i64 {
    i64::try_from(nanos).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
