//! The maps. Their sizes here are the smallest that load; the daemon sets the
//! real ones before it loads the object.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, PerCpuArray, ProgramArray, Queue, RingBuf},
};
use memprof_common::{
    config::{TargetConfig, TargetState},
    counters::TargetCounters,
    limits::{
        CAPTURE_BUFFERS, DEFAULT_IN_FLIGHT_ENTRIES, DEFAULT_LIVE_ENTRIES, DEFAULT_RING_BYTES,
        DEFAULT_STACK_ENTRIES, MAX_KNOWN_PROCESSES, MAX_TARGETS,
    },
    live::{LiveKey, LiveValue},
    occupancy::Occupancy,
    stack::{StackKey, StackRecord},
    totals::{TOTALS_ENTRIES, TargetTotals},
    unwind::cache::RuleCache,
};

use crate::{
    in_flight::{InFlightCall, TakenBlock},
    stack::Scratch,
};

/// Events for the daemon.
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(DEFAULT_RING_BYTES, 0);

/// Traced processes by slot.
#[map]
pub(crate) static TARGETS: Array<TargetConfig> = Array::with_max_entries(MAX_TARGETS, 0);

/// What BPF itself keeps of each target. Only BPF writes it while the slot is a target's:
/// the daemon rewrites `TARGETS` at will and would undo a count in there.
#[map]
pub(crate) static STATES: Array<TargetState> = Array::with_max_entries(MAX_TARGETS, 0);

/// What every call adds to, by slot and epoch
/// ([`memprof_common::totals::totals_index`]).
#[map]
pub(crate) static TOTALS: PerCpuArray<TargetTotals> =
    PerCpuArray::with_max_entries(TOTALS_ENTRIES, 0);

/// Slots of traced processes by pid, for the tracepoints, which have no cookie, and for
/// probes that are every process's; [`memprof_common::config::NO_SLOT`] of those that such
/// probes are to leave alone. Not preallocated: most daemons have a few processes in it.
#[map]
pub(crate) static SLOTS: HashMap<u32, u32> =
    HashMap::with_max_entries(MAX_KNOWN_PROCESSES, BPF_F_NO_PREALLOC);

/// Slots that are nobody's and made ready, for processes that turn up.
#[map]
pub(crate) static FREE_SLOTS: Queue<u32> = Queue::with_max_entries(MAX_TARGETS, 0);

/// How many calls were not looked at, since no slot was free for their process or the ring
/// had no room to tell of it.
#[map]
pub(crate) static UNCLAIMED_CALLS: Array<u64> = Array::with_max_entries(1, 0);

/// Losses by slot.
#[map]
pub(crate) static COUNTERS: PerCpuArray<TargetCounters> =
    PerCpuArray::with_max_entries(MAX_TARGETS, 0);

/// Allocation calls between entry and return, by tid (the kernel's pid_tgid).
#[map]
pub(crate) static IN_FLIGHT: HashMap<u64, InFlightCall> =
    HashMap::with_max_entries(DEFAULT_IN_FLIGHT_ENTRIES, 0);

/// Blocks that a `realloc` between entry and return has taken out of `LIVE`, by
/// thread. Apart from `IN_FLIGHT`, whose values are copied at every such call,
/// for the few that reallocate a sampled block.
#[map]
pub(crate) static TAKEN: HashMap<u64, TakenBlock> =
    HashMap::with_max_entries(DEFAULT_IN_FLIGHT_ENTRIES, 0);

/// Sampled blocks that have not been freed. Not preallocated: few targets come
/// near the limit, and the memory would be gone whether used or not.
#[map]
pub(crate) static LIVE: HashMap<LiveKey, LiveValue> =
    HashMap::with_max_entries(DEFAULT_LIVE_ENTRIES, BPF_F_NO_PREALLOC);

/// Where `LIVE` has blocks. Mapped by the daemon, which takes blocks out of `LIVE`
/// too.
#[map]
pub(crate) static OCCUPANCY: Array<Occupancy> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Stacks by name; a kilobyte each, so not preallocated either.
#[map]
pub(crate) static STACKS: HashMap<StackKey, StackRecord> =
    HashMap::with_max_entries(DEFAULT_STACK_ENTRIES, BPF_F_NO_PREALLOC);

/// Where stacks are captured before they have a name.
#[map]
pub(crate) static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// What walks have found last in the arena, for each buffer of `SCRATCH`.
#[map]
pub(crate) static RULES: PerCpuArray<RuleCache> =
    PerCpuArray::with_max_entries(CAPTURE_BUFFERS as u32, 0);

/// The program that goes on with a walk, for kernels where tail calls walk.
#[map]
pub(crate) static WALK_ON: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// The words of unwind tables and lists of mappings. This is what it is called in the
/// object; the daemon puts an array of maps in its place, which cannot be declared
/// without type information. A look-up in either is a few instructions that the kernel
/// compiles, not a call.
#[map]
pub(crate) static ARENA: Array<u32> = Array::with_max_entries(1, 0);

/// How often the daemon has begun to give words of the arena a new meaning.
#[map]
pub(crate) static ARENA_REUSES: Array<u64> = Array::with_max_entries(1, 0);

/// What walks saw, for tests of the unwinder.
#[map]
pub(crate) static STACK_COPIES: RingBuf = RingBuf::with_byte_size(4096, 0);
