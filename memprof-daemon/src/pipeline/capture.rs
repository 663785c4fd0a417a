//! From a capture of the ledger to a profile with names.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    address::{AbsAddr, FileOffset},
    export::{
        profile::{Engine, ProbeInfo, ProcessMemory, ProcessProfile, Profile, StackProfile},
        totals::ExactTotals,
    },
    process::{
        info::ProcessInfo,
        mapping::MappingTable,
        perf_map::{NamedMappings, PerfMap},
    },
    symbolize::{
        frame::Frame,
        trim::trim,
        worker::{SymbolizeError, SymbolizeHandle},
    },
};

use super::versions::GroupMappings;
pub use super::versions::StackGroup;

/// Everything a profile is made of, at one moment, without names.
#[derive(Clone, Debug)]
pub struct Capture {
    /// When.
    pub captured_at: SystemTime,
    /// Since the first attach, or since counting began anew, or of the window.
    pub duration: Duration,
    /// How long the window was, if it is of one.
    pub window: Option<Duration>,
    /// Mean sampling gap.
    pub sample_interval_bytes: u64,
    /// The largest that was ever in force.
    pub coarsest_interval_bytes: u64,
    /// Where the probes are.
    pub probe: ProbeInfo,
    /// One entry a process image.
    pub images: Vec<ImageCapture>,
}

/// One process image in a [`Capture`].
#[derive(Clone, Debug)]
pub struct ImageCapture {
    /// Who.
    pub info: ProcessInfo,
    /// It has ended.
    pub exited: bool,
    /// How its calls are looked at.
    pub engine: Engine,
    /// What the kernel says it holds.
    pub memory: Option<ProcessMemory>,
    /// For how long it was traced.
    pub traced: Duration,
    /// All of its calls, counted exactly; none if they are not known.
    pub totals: Option<ExactTotals>,
    /// What was lost.
    pub losses: BTreeMap<&'static str, u64>,
    /// What its code was at each place first.
    pub mappings: MappingTable,
    /// Where it names the code that it has made at run time.
    pub perf_map: Option<Arc<PerfMap>>,
    /// Its counters.
    pub groups: Vec<StackGroup>,
}

impl Capture {
    /// Sampled allocations in it.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.images
            .iter()
            .flat_map(|image| &image.groups)
            .flat_map(|group| &group.stacks)
            .map(|stack| stack.counters.samples)
            .sum()
    }

    /// Gives every frame its name.
    ///
    /// # Errors
    ///
    /// If the thread that names is gone.
    pub async fn symbolize(self, symbolizer: &SymbolizeHandle) -> Result<Profile, SymbolizeError> {
        let mut processes = Vec::with_capacity(self.images.len());
        for mut image in self.images {
            let first = Arc::new(NamedMappings::new(image.mappings, image.perf_map));
            let mut broken_samples = 0;
            let mut stacks = Vec::new();
            for group in image.groups {
                let mappings = GroupMappings {
                    first: Arc::clone(&first),
                    meanings: group.meanings,
                };
                let trimmed = trim(group.stacks, &mappings);
                broken_samples += trimmed.broken_samples;
                let traces = trimmed
                    .stacks
                    .iter()
                    .map(|stack| Arc::clone(&stack.trace))
                    .collect();
                let named = symbolizer.symbolize(traces, Arc::new(mappings)).await?;
                stacks.extend(trimmed.stacks.iter().zip(named).map(|(stack, frames)| {
                    StackProfile {
                        counters: stack.counters,
                        frames,
                        end: stack.trace.end,
                        by_frame_pointer: stack.trace.by_frame_pointer,
                    }
                }));
            }
            image.losses.insert("broken_stacks", broken_samples);
            processes.push(ProcessProfile {
                pid: image.info.pid,
                comm: image.info.comm,
                exe: image.info.exe,
                origin: image.info.origin,
                start_time: image.info.start_time,
                exited: image.exited,
                engine: image.engine,
                memory: image.memory,
                traced: image.traced,
                totals: image.totals,
                losses: image.losses,
                stacks: add_up(stacks),
            });
        }
        let (kernel, arch) = host();
        Ok(Profile {
            captured_at: self.captured_at,
            duration: self.duration,
            window: self.window,
            kernel,
            arch,
            sample_interval_bytes: self.sample_interval_bytes,
            coarsest_interval_bytes: self.coarsest_interval_bytes,
            probe: self.probe,
            processes,
        })
    }
}

/// Where a frame is: its place in a file, wherever that was mapped.
#[derive(PartialEq, Eq, Hash)]
enum Place {
    InFile(u64, u64, FileOffset),
    Nowhere(AbsAddr),
}

fn place(frame: &Frame) -> Place {
    let file = frame
        .mapping
        .as_ref()
        .and_then(|mapping| mapping.file.as_ref());
    match (file, frame.file_offset) {
        (Some(file), Some(offset)) => Place::InFile(file.device, file.inode, offset),
        _ => Place::Nowhere(frame.address),
    }
}

/// Makes one of stacks that are the same, and were captured at different addresses: of a
/// library that was unloaded and loaded elsewhere.
fn add_up(stacks: Vec<StackProfile>) -> Vec<StackProfile> {
    let mut sums: Vec<StackProfile> = Vec::with_capacity(stacks.len());
    let mut known = HashMap::with_capacity(stacks.len());
    for stack in stacks {
        let places: Vec<Place> = stack.frames.iter().map(|frame| place(frame)).collect();
        match known.entry((places, stack.end as u32, stack.by_frame_pointer)) {
            Entry::Vacant(new) => {
                new.insert(sums.len());
                sums.push(stack);
            }
            Entry::Occupied(old) => {
                if let Some(sum) = sums.get_mut(*old.get()) {
                    sum.counters += stack.counters;
                }
            }
        }
    }
    sums
}

/// Kernel release and machine, as `uname` has them.
fn host() -> (String, String) {
    nix::sys::utsname::uname().map_or_else(
        |_| ("unknown".to_owned(), std::env::consts::ARCH.to_owned()),
        |names| {
            (
                names.release().to_string_lossy().into_owned(),
                names.machine().to_string_lossy().into_owned(),
            )
        },
    )
}
