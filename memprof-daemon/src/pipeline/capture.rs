//! From a capture of the ledger to a profile with names.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::Arc,
    time::{Duration, SystemTime},
};

use memprof_common::unwind::walk::StackEnd;

use crate::{
    address::{AbsAddr, FileOffset, FrameAddress},
    export::{
        profile::{
            ChildOf, Engine, GoFacts, Inherited, ProbeInfo, ProcessMemory, ProcessProfile, Profile,
            StackProfile,
        },
        totals::ExactTotals,
    },
    golang::{Bucket, GoSource, Named, NamedStack},
    ledger::{StackCounters, StackTrace},
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
    /// What it has from its parent.
    pub inherited: Option<Inherited>,
    /// Whose child it is, if it is traced for that.
    pub child_of: Option<ChildOf>,
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
    /// The counters of a Go program's own profile, which this is then.
    pub(super) go: Option<GoCapture>,
    /// Why there is none beside it.
    pub go_refusal: Option<String>,
}

/// A Go program's own profile in a [`Capture`].
#[derive(Clone, Debug)]
pub(super) struct GoCapture {
    /// Who names its stacks.
    pub(super) source: Arc<GoSource>,
    /// What is told of it.
    pub(super) facts: GoFacts,
    /// Its counters, by stack and size.
    pub(super) stacks: Vec<(Arc<Bucket>, StackCounters)>,
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
            let mut go_facts = None;
            if let Some(go) = image.go {
                let (named, failure) = name_go(go.source, &go.stacks, first, symbolizer).await?;
                go_facts = Some(GoFacts {
                    failure: go.facts.failure.clone().or(failure),
                    ..go.facts
                });
                stacks = named;
            } else {
                image.losses.insert("broken_stacks", broken_samples);
            }
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
                inherited: image.inherited,
                child_of: image.child_of,
                totals: image.totals,
                losses: image.losses,
                go: go_facts,
                go_refusal: image.go_refusal,
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

/// Names the stacks of a Go program: its own code by its own tables, and the rest, such as a C
/// library's, as any program's. If its tables cannot be read, all of it, and why.
async fn name_go(
    source: Arc<GoSource>,
    stacks: &[(Arc<Bucket>, StackCounters)],
    mappings: Arc<NamedMappings>,
    symbolizer: &SymbolizeHandle,
) -> Result<(Vec<StackProfile>, Option<String>), SymbolizeError> {
    let buckets: Vec<_> = stacks
        .iter()
        .map(|(bucket, _)| Arc::clone(bucket))
        .collect();
    let (named, failure) = {
        let (buckets, mappings) = (buckets.clone(), Arc::clone(&mappings));
        let names = move || source.names(&buckets, &*mappings);
        match tokio::task::spawn_blocking(names).await {
            Ok(Ok(named)) => (named, None),
            Ok(Err(error)) => (Vec::new(), Some(error.to_string())),
            Err(_) => return Err(SymbolizeError::Failed),
        }
    };
    let named = if failure.is_none() {
        named
    } else {
        let unnamed = buckets.iter().map(|bucket| NamedStack::unnamed(bucket));
        unnamed.collect()
    };
    let mut others: Vec<AbsAddr> = named.iter().flat_map(NamedStack::others).collect();
    others.sort_unstable();
    others.dedup();
    let traces = others.iter().map(|&address| {
        Arc::new(StackTrace {
            frames: vec![FrameAddress(address)],
            end: StackEnd::Complete,
            by_frame_pointer: false,
        })
    });
    let frames = symbolizer.symbolize(traces.collect(), mappings).await?;
    let others: HashMap<AbsAddr, Arc<Frame>> = others
        .into_iter()
        .zip(frames)
        .filter_map(|(address, frames)| Some((address, frames.into_iter().next()?)))
        .collect();
    let stacks = stacks
        .iter()
        .zip(named)
        .map(|((_, counters), named)| StackProfile {
            counters: *counters,
            end: if named.is_cut {
                StackEnd::Truncated
            } else {
                StackEnd::Complete
            },
            by_frame_pointer: false,
            frames: named
                .frames
                .into_iter()
                .filter_map(|frame| match frame {
                    Named::Frame(frame) => Some(frame),
                    Named::Other(address) => others.get(&address).cloned(),
                })
                .collect(),
        });
    Ok((stacks.collect(), failure))
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
