//! Sizes that both sides must know.

/// The deepest stack memprof captures, in frames.
///
/// The kernel's own limit for a BPF stack is `kernel.perf_event_max_stack`,
/// 127 by default (`include/uapi/linux/perf_event.h`, `PERF_MAX_STACK_DEPTH`).
pub const MAX_STACK_DEPTH: usize = 127;

/// How many tasks can capture a stack on one CPU at the same time, each but the last
/// preempted in the middle.
pub const CAPTURE_BUFFERS: usize = 4;

/// How many processes one daemon can trace at a time: the length of the map of
/// targets.
pub const MAX_TARGETS: u32 = 1024;

/// How many processes BPF can know by pid: those that are traced, and those that are left
/// alone although probes that are every process's trap them.
pub const MAX_KNOWN_PROCESSES: u32 = 1 << 16;

/// Default number of bytes in the event ring; a power of two and a multiple of
/// the page size.
pub const DEFAULT_RING_BYTES: u32 = 8 << 20;

/// Default number of sampled blocks that can be live at once, over all targets.
pub const DEFAULT_LIVE_ENTRIES: u32 = 1 << 20;

/// Default number of distinct stacks that can be known to BPF at once.
pub const DEFAULT_STACK_ENTRIES: u32 = 1 << 16;

/// Default number of allocation calls that can be in flight at once: one a
/// thread.
pub const DEFAULT_IN_FLIGHT_ENTRIES: u32 = 1 << 14;

/// The largest sampling interval: [`crate::sampler`] divides in 32-bit steps.
pub const MAX_SAMPLE_INTERVAL_BYTES: u64 = u32::MAX as u64;
