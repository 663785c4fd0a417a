//! What BPF's maps take of the kernel's memory at their fullest.
//!
//! Upper bounds by the layouts of kernel/bpf: the kernel itself tells something only from
//! Linux 6.4 on (`memlock` in `/proc/PID/fdinfo`), leaves out what its allocator rounds up,
//! and tells it of maps that are there already.

use memprof_common::{
    config::{TargetConfig, TargetState},
    counters::TargetCounters,
    limits::{CAPTURE_BUFFERS, MAX_KNOWN_PROCESSES, MAX_TARGETS},
    live::{LiveKey, LiveValue},
    occupancy::Occupancy,
    stack::{StackKey, StackRecord},
    totals::{TOTALS_ENTRIES, TargetTotals},
    unwind::{cache::RuleCache, table::MAX_SLABS},
};

/// `struct htab_elem`, with the words that a lock and alignment add (kernel/bpf/hashtab.c).
const ELEMENT_BYTES: u64 = 48;

/// `struct bucket`, in the same file.
const BUCKET_BYTES: u64 = 16;

/// What the allocator puts before each element (`LLIST_NODE_SZ` in kernel/bpf/memalloc.c).
const ALLOCATED_BYTES: u64 = 8;

const PAGE_BYTES: u64 = 4096;

/// What a call in flight takes, and the block that it has taken
/// (`memprof-ebpf/src/in_flight.rs`).
const IN_FLIGHT_BYTES: u64 = 56;
const TAKEN_BYTES: u64 = (size_of::<LiveKey>() + size_of::<LiveValue>()) as u64;

/// The most that a value of a per-CPU array can be (`PCPU_MIN_UNIT_SIZE` in
/// include/linux/percpu.h): where stacks are captured.
const SCRATCH_BYTES: u64 = 32 << 10;

/// What stacks are walked with there.
const RULES_BYTES: u64 = (CAPTURE_BUFFERS * size_of::<RuleCache>()) as u64;

/// A hash table whose elements are allocated as they come.
fn growing(entries: u32, key: usize, value: usize) -> u64 {
    let element = ELEMENT_BYTES + words(key) + words(value) + ALLOCATED_BYTES;
    buckets(entries) + u64::from(entries) * kmalloc(element)
}

/// A hash table whose elements are allocated with it. Each CPU has one more.
fn allocated(entries: u32, cpus: u64, key: u64, value: u64) -> u64 {
    let element = ELEMENT_BYTES + key + value;
    buckets(entries) + (u64::from(entries) + cpus) * element
}

fn buckets(entries: u32) -> u64 {
    u64::from(entries).next_power_of_two() * BUCKET_BYTES
}

/// Keys and values take whole words.
const fn words(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(8)
}

/// The size that the kernel's allocator gives for one (`kmalloc_info` in mm/slab_common.c).
fn kmalloc(bytes: u64) -> u64 {
    match bytes {
        65..=96 => 96,
        129..=192 => 192,
        bytes => bytes.next_power_of_two(),
    }
}

/// The map of live blocks.
pub fn live(entries: u32) -> u64 {
    growing(entries, size_of::<LiveKey>(), size_of::<LiveValue>())
}

/// The map of stacks.
pub fn stacks(entries: u32) -> u64 {
    growing(entries, size_of::<StackKey>(), size_of::<StackRecord>())
}

/// The two maps of calls in flight.
pub fn in_flight(entries: u32, cpus: u64) -> u64 {
    allocated(entries, cpus, 8, IN_FLIGHT_BYTES) + allocated(entries, cpus, 8, TAKEN_BYTES)
}

/// The event ring: its data, two pages of positions and one of its own, and the list of its
/// pages, which is twice as long, since the data is mapped twice.
pub fn ring(bytes: u32) -> u64 {
    let pages = u64::from(bytes) / PAGE_BYTES;
    u64::from(bytes) + 3 * PAGE_BYTES + 2 * 8 * pages
}

/// All others but the arena of unwind tables, which grows as it is used.
pub fn others(cpus: u64, traces_all: bool) -> u64 {
    let targets = u64::from(MAX_TARGETS);
    let by_slot = targets * (words(size_of::<TargetConfig>()) + words(size_of::<TargetState>()));
    let counters = targets * words(size_of::<TargetCounters>());
    let totals = u64::from(TOTALS_ENTRIES) * words(size_of::<TargetTotals>());
    // What is traced one by one takes a place each; of all processes there are more.
    let known = if traces_all {
        MAX_KNOWN_PROCESSES
    } else {
        MAX_TARGETS
    };
    let slots = buckets(MAX_KNOWN_PROCESSES)
        + u64::from(known) * kmalloc(ELEMENT_BYTES + 2 * 8 + ALLOCATED_BYTES);
    let free_slots = targets * 4;
    let arena = u64::from(MAX_SLABS) * 8;
    // Pointers to what each CPU has, and the small maps, each of which takes a page or two.
    let small = (targets + u64::from(TOTALS_ENTRIES)) * 8 + 16 * PAGE_BYTES;
    by_slot
        + slots
        + free_slots
        + arena
        + small
        + size_of::<Occupancy>() as u64
        + cpus * (counters + totals + SCRATCH_BYTES + RULES_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check the sizes of elements against those that were worked out by hand: 120 bytes of
    /// a live block come from the allocator's 128, 1,104 of a stack from its 2,048.
    #[test]
    fn elements() {
        assert_eq!(live(1 << 20), (1 << 20) * (128 + 16));
        assert_eq!(stacks(1 << 16), (1 << 16) * (2048 + 16));
        assert_eq!(kmalloc(72), 96);
        assert_eq!(kmalloc(96), 96);
        assert_eq!(kmalloc(97), 128);
        assert_eq!(kmalloc(150), 192);
    }

    /// Check that processors and processes count.
    #[test]
    fn grows_with_the_host() {
        let step = others(3, false) - others(2, false);
        assert_eq!(step, 1024 * 192 + 2048 * 384 + (32 << 10) + 4 * 512 * 32);
        assert!(others(2, true) > others(2, false) + (5 << 20));
    }
}
