//! Loads the BPF object and hands out its maps.

use aya::{
    EbpfError, EbpfLoader,
    maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuArray, Queue, RingBuf},
    programs::{ProgramError, RawTracePoint},
};
use aya_log::EbpfLogger;
use memprof_common::{
    config::{AttachCookie, TargetConfig, TargetState},
    counters::TargetCounters,
    limits::{
        DEFAULT_IN_FLIGHT_ENTRIES, DEFAULT_LIVE_ENTRIES, DEFAULT_RING_BYTES, DEFAULT_STACK_ENTRIES,
    },
    stack::{StackKey, StackRecord},
    stack_copy::StackCopy,
    totals::TargetTotals,
};
use std::os::fd::AsFd as _;

use thiserror::Error;

use super::{
    arena::{self, Arena, SlabMaker},
    attach::Prober,
    live_map::LiveMap,
    mode::{ModeChoice, Unsupported},
    programs::{ProgramLoadError, ProgramSet, Programs},
    walker::{UnsupportedWalker, Walker},
};

/// The object that `cargo xtask ebpf` builds and `build.rs` vouches for.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("MEMPROF_BPF_OBJECT"));

/// The daemon is woken when this share of the ring is in use: the rest is for what comes
/// until it has a CPU.
const WAKE_SHARE: u64 = 8;

/// How large the maps are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes in the event ring: a power of two, at least a page.
    pub ring_bytes: u32,
    /// Sampled blocks that can be live at once.
    pub live_entries: u32,
    /// Distinct stacks that BPF can know at once.
    pub stack_entries: u32,
    /// Allocation calls that can be in flight at once.
    pub in_flight_entries: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            ring_bytes: DEFAULT_RING_BYTES,
            live_entries: DEFAULT_LIVE_ENTRIES,
            stack_entries: DEFAULT_STACK_ENTRIES,
            in_flight_entries: DEFAULT_IN_FLIGHT_ENTRIES,
        }
    }
}

/// Why the object could not be brought into the kernel.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The kernel refused the object or one of its maps.
    #[error("cannot load the BPF object")]
    Object(#[source] Box<EbpfError>),
    /// The kernel refused a program; the source holds the verifier's words.
    #[error("the kernel refused the BPF program `{name}`")]
    Program {
        /// Which.
        name: &'static str,
        /// Why.
        #[source]
        source: ProgramLoadError,
    },
    /// The way to attach that is wanted is not there.
    #[error(transparent)]
    Mode(#[from] Unsupported),
    /// The way to walk that is wanted is not there.
    #[error(transparent)]
    Walker(#[from] UnsupportedWalker),
    /// A map is not what this daemon expects: object and daemon do not belong
    /// together.
    #[error("the BPF map `{name}` is missing or of another type")]
    Map {
        /// Which.
        name: &'static str,
        /// Why, if it is there.
        #[source]
        source: Option<Box<MapError>>,
    },
    /// The object lacks a program.
    #[error("the BPF object has no program `{0}`")]
    NoProgram(&'static str),
    /// The log of the BPF side could not be set up.
    #[error("cannot read the log of the BPF programs")]
    Log(#[source] aya_log::Error),
}

/// The programs' memory, each map for one owner.
pub struct Maps {
    /// Events.
    pub events: RingBuf<MapData>,
    /// Traced processes by slot.
    pub targets: Array<MapData, TargetConfig>,
    /// Slots by pid.
    pub slots: HashMap<MapData, u32, u32>,
    /// What BPF keeps of each target, by slot.
    pub states: Array<MapData, TargetState>,
    /// Slots that processes take when they turn up.
    pub free_slots: Queue<MapData, u32>,
    /// Calls that were not looked at for want of a slot.
    pub unclaimed_calls: Array<MapData, u64>,
    /// Calls under way, by thread.
    pub calls: CallMaps,
    /// Losses by slot.
    pub counters: PerCpuArray<MapData, TargetCounters>,
    /// Exact totals by slot and epoch.
    pub totals: PerCpuArray<MapData, TargetTotals>,
    /// Sampled blocks not yet freed.
    pub live: LiveMap,
    /// Stacks by name.
    pub stacks: HashMap<MapData, StackKey, StackRecord>,
    /// Unwind tables.
    pub arena: (Arena, SlabMaker),
    /// What walks saw, if that is wanted.
    pub stack_copies: Option<RingBuf<MapData>>,
}

/// Calls under way, by thread (the kernel's pid_tgid). What is kept of each is BPF's
/// (`InFlightCall` in `memprof-ebpf/src/in_flight.rs`), and begins with its cookie.
#[derive(Debug)]
pub struct CallMaps {
    in_flight: HashMap<MapData, u64, [u64; 7]>,
}

impl CallMaps {
    /// Forgets the calls of the target that was in a slot and whose probes are off: they
    /// return unseen, and what they have counted in the slot is not theirs to take back.
    pub fn forget(&mut self, slot: u16) {
        let is_its = |cookie: u64| AttachCookie(cookie).slot() == u32::from(slot);
        let threads: Vec<u64> = self
            .in_flight
            .iter()
            .flatten()
            .filter(|(_, [cookie, ..])| is_its(*cookie))
            .map(|(thread, _)| thread)
            .collect();
        for thread in threads {
            // It may have ended meanwhile.
            let _ = self.in_flight.remove(&thread);
        }
    }
}

/// How the object is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// How large the maps are.
    pub sizes: Sizes,
    /// How the probes will be attached.
    pub mode: ModeChoice,
    /// How stacks are walked; the best way that is there if none is named.
    pub walker: Option<Walker>,
    /// Turns the diagnostics of the BPF side on; without it they cost nothing, since
    /// the verifier removes code behind a constant.
    pub bpf_log: bool,
    /// Has BPF copy the memory that each walk began with, for tests.
    pub copy_stacks: bool,
}

/// Copies of stacks on their way, at most.
const STACK_COPIES: u32 = 1024;

/// What a loaded object consists of.
pub struct Loaded {
    /// Its programs, loaded and attached to nothing but the tracepoints.
    pub prober: Prober,
    /// How they walk stacks.
    pub walker: Walker,
    /// Its maps.
    pub maps: Maps,
    /// Its log, if asked for.
    pub log: Option<EbpfLogger<&'static dyn log::Log>>,
}

/// Programs, which `memprof-ebpf/src/main.rs` defines, and the tracepoints they
/// belong to.
const TRACEPOINTS: [(&str, &str); 2] = [
    ("process_exec", "sched_process_exec"),
    ("thread_exit", "sched_process_exit"),
];

/// Loads the object, with its programs for the given way of attaching.
///
/// # Errors
///
/// [`LoadError`]; nothing stays behind in the kernel.
///
/// # Minimum kernel version
///
/// 5.15: ring buffer (5.8), `bpf_get_attach_cookie` in uprobes (5.15).
pub fn load(options: &LoadOptions) -> Result<Loaded, LoadError> {
    let LoadOptions {
        sizes,
        bpf_log,
        copy_stacks,
        ..
    } = *options;
    let mode = options.mode.resolve()?;
    let walker = options.walker.unwrap_or_else(Walker::best).try_out(mode)?;
    let copies_bytes = if copy_stacks {
        (size_of::<StackCopy>() as u32 * STACK_COPIES).next_power_of_two()
    } else {
        4096
    };
    let log_level: u8 = if bpf_log {
        aya_log::Level::Debug as u8
    } else {
        0
    };
    // Copies of stacks are large, and read when events are.
    let wake_bytes = if copy_stacks {
        0
    } else {
        u64::from(sizes.ring_bytes) / WAKE_SHARE
    };
    let mut ebpf = EbpfLoader::new()
        .override_global(aya_log::LEVEL, &log_level, false)
        .override_global("HAS_LOOP", &u8::from(walker == Walker::Loop), true)
        .override_global("WAKE_BYTES", &wake_bytes, true)
        .override_global("COPY_STACKS", &u8::from(copy_stacks), true)
        .map_max_entries("STACK_COPIES", copies_bytes)
        .map_max_entries("EVENTS", sizes.ring_bytes)
        .map_max_entries("LIVE", sizes.live_entries)
        .map_max_entries("STACKS", sizes.stack_entries)
        .map_max_entries("IN_FLIGHT", sizes.in_flight_entries)
        .map_max_entries("TAKEN", sizes.in_flight_entries)
        .load(OBJECT)
        .map_err(|error| LoadError::Object(Box::new(error)))?;

    // Before the maps go to their owners: here they are all together.
    let slabs = arena::create_slabs().map_err(|error| map_error("ARENA", error))?;
    let others = [("ARENA", slabs.fd().as_fd())];
    let load = |walker| {
        Programs::load(mode, ProgramSet::Tracing(walker), OBJECT, &ebpf, &others)
            .map(|programs| (programs, walker))
            .map_err(|(name, source)| LoadError::Program { name, source })
    };
    let (programs, walker) = match load(walker) {
        // Nobody has asked for tail calls, and there are programs without.
        Err(error) if walker == Walker::TailCalls && options.walker.is_none() => {
            // With the verifier's words, which are many.
            tracing::debug!(?error, "tail calls are refused");
            tracing::warn!(%error, "stacks are walked by frame pointers alone");
            load(Walker::FramePointers)?
        }
        loaded => loaded?,
    };
    let log = if bpf_log {
        Some(EbpfLogger::init(&mut ebpf).map_err(LoadError::Log)?)
    } else {
        None
    };
    let mut take = |name: &'static str| {
        ebpf.take_map(name)
            .ok_or(LoadError::Map { name, source: None })
    };
    let maps = Maps {
        events: typed("EVENTS", take("EVENTS")?)?,
        targets: typed("TARGETS", take("TARGETS")?)?,
        slots: typed("SLOTS", take("SLOTS")?)?,
        states: typed("STATES", take("STATES")?)?,
        free_slots: typed("FREE_SLOTS", take("FREE_SLOTS")?)?,
        unclaimed_calls: typed("UNCLAIMED_CALLS", take("UNCLAIMED_CALLS")?)?,
        calls: CallMaps {
            in_flight: typed("IN_FLIGHT", take("IN_FLIGHT")?)?,
        },
        counters: typed("COUNTERS", take("COUNTERS")?)?,
        totals: typed("TOTALS", take("TOTALS")?)?,
        live: LiveMap::new(take("LIVE")?, &take("OCCUPANCY")?)
            .map_err(|error| map_error("LIVE", error))?,
        stacks: typed("STACKS", take("STACKS")?)?,
        arena: Arena::new(
            ArrayOfMaps::try_from(Map::ArrayOfMaps(slabs))
                .map_err(|error| map_error("ARENA", error))?,
            typed("ARENA_REUSES", take("ARENA_REUSES")?)?,
        ),
        stack_copies: if copy_stacks {
            Some(typed("STACK_COPIES", take("STACK_COPIES")?)?)
        } else {
            None
        },
    };

    for (name, tracepoint) in TRACEPOINTS {
        let program: &mut RawTracePoint = ebpf
            .program_mut(name)
            .ok_or(LoadError::NoProgram(name))?
            .try_into()
            .map_err(|error| program_error(name, error))?;
        program
            .load()
            .and_then(|()| program.attach(tracepoint))
            .map_err(|error| program_error(name, error))?;
    }
    Ok(Loaded {
        prober: Prober::new(ebpf, programs, mode),
        walker,
        maps,
        log,
    })
}

fn typed<T>(name: &'static str, map: Map) -> Result<T, LoadError>
where
    T: TryFrom<Map, Error = MapError>,
{
    T::try_from(map).map_err(|error| map_error(name, error))
}

fn map_error(name: &'static str, error: MapError) -> LoadError {
    LoadError::Map {
        name,
        source: Some(Box::new(error)),
    }
}

fn program_error(name: &'static str, error: ProgramError) -> LoadError {
    LoadError::Program {
        name,
        source: ProgramLoadError::Aya(Box::new(error)),
    }
}

/// Loads empty programs instead of those that trace: what their traps cost is the
/// floor that tracing is measured against.
///
/// # Errors
///
/// [`LoadError`]; nothing stays behind in the kernel.
pub fn load_floor(mode: ModeChoice, entries_only: bool) -> Result<Prober, LoadError> {
    let mode = mode.resolve()?;
    let ebpf = EbpfLoader::new()
        .load(OBJECT)
        .map_err(|error| LoadError::Object(Box::new(error)))?;
    let set = if entries_only {
        ProgramSet::EmptyEntriesOnly
    } else {
        ProgramSet::Empty
    };
    let programs = Programs::load(mode, set, OBJECT, &ebpf, &[])
        .map_err(|(name, source)| LoadError::Program { name, source })?;
    Ok(Prober::new(ebpf, programs, mode))
}
