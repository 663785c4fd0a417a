//! How much memory memprof may take, and how it is shared out: `--max-memory`.
//!
//! ```text
//! limit = base + maps + reserve + room
//! ```
//!
//! *Base* is what the daemon takes when it traces nothing. *Maps* are those that BPF fills by
//! itself: they are made so small that they may be full. A block in the live map has its place
//! in the books, too: that is the *reserve*. The *room* is for all that the daemon decides
//! about: stacks, unwind tables, processes, names, and profiles while they are made. How full
//! it is says what has to be done (`Budget::orders`).

use memprof_common::limits::{
    DEFAULT_IN_FLIGHT_ENTRIES, DEFAULT_LIVE_ENTRIES, DEFAULT_RING_BYTES, DEFAULT_STACK_ENTRIES,
};
use thiserror::Error;

use crate::{
    ledger::room::BLOCK_BYTES,
    probe::{loader::Sizes, map_bytes},
    ring::mmap_events,
};

/// The limit if none is given: with it the maps have the sizes that they have by themselves.
const DEFAULT_BYTES: u64 = 1 << 30;

/// What a daemon takes that traces nothing: measured 9 MiB, and threads have heaps of their own.
const BASE_BYTES: u64 = 16 << 20;

/// The least room to work in: some tables, stacks and names.
const LEAST_ROOM_BYTES: u64 = 16 << 20;

/// The smallest maps that are made unless smaller ones are asked for.
const LEAST_RING_BYTES: u32 = 256 << 10;
const LEAST_LIVE_ENTRIES: u32 = 4096;
const LEAST_STACK_ENTRIES: u32 = 512;
const LEAST_IN_FLIGHT_ENTRIES: u32 = 1024;

/// In the books there may be some blocks more than in the map, until their frees are found
/// missing there.
pub(super) const fn blocks_in_books(live_entries: u32) -> u64 {
    live_entries as u64 + live_entries as u64 / 4
}

/// A profile in the making takes so many times what stacks take in the books: copies of their
/// counters, names, and what finds stacks that are the same.
const PROFILE_TIMES: u64 = 5;

/// What it takes in any case.
const LEAST_PROFILE_BYTES: u64 = 2 << 20;

/// A block in a copy of the live map, and where it is looked up there: what a sweep takes.
const SWEPT_BLOCK_BYTES: u64 = 64 + 58;

/// How much memory may be taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MaxMemory {
    /// So much, or as much as this host needs at least.
    #[default]
    Default,
    /// So much.
    Bytes(u64),
    /// Without end.
    Unlimited,
}

/// Sizes of the maps that somebody has asked for; the others are made to fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WantedSizes {
    /// See [`Sizes::ring_bytes`].
    pub ring_bytes: Option<u32>,
    /// See [`Sizes::live_entries`].
    pub live_entries: Option<u32>,
    /// See [`Sizes::stack_entries`].
    pub stack_entries: Option<u32>,
    /// See [`Sizes::in_flight_entries`].
    pub in_flight_entries: Option<u32>,
}

/// It cannot be done with so little.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("--max-memory is too little: {}MiB is the least{}", .least_bytes.div_ceil(1 << 20), with_sizes(.sizes_wanted_too))]
pub struct TooLittle {
    /// The least that would do.
    pub least_bytes: u64,
    /// Somebody has asked for sizes.
    pub sizes_wanted_too: bool,
}

fn with_sizes(sizes_wanted_too: &bool) -> &'static str {
    if *sizes_wanted_too {
        " on this host, with the sizes of maps that are asked for"
    } else {
        " on this host"
    }
}

/// What there is of the host that takes memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host {
    /// Processors that there may be: BPF has memory for each.
    pub(super) cpus: u64,
    /// Every process is traced.
    pub(super) traces_all: bool,
}

/// A share of memory for everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Budget {
    /// How large the maps are.
    pub(super) sizes: Sizes,
    /// What they take at their fullest, but for the arena of unwind tables.
    pub(super) map_bytes: u64,
    /// The limit and what it leaves; none without a limit.
    limits: Option<Limits>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limits {
    max_bytes: u64,
    room_bytes: u64,
}

impl Budget {
    /// Shares a limit out.
    ///
    /// # Errors
    ///
    /// [`TooLittle`].
    pub(super) fn new(max: MaxMemory, wanted: &WantedSizes, host: Host) -> Result<Self, TooLittle> {
        let least_bytes = of_all(&least(wanted), host) + LEAST_ROOM_BYTES;
        let max_bytes = match max {
            MaxMemory::Unlimited => return Ok(Self::unlimited(wanted, host)),
            MaxMemory::Default => DEFAULT_BYTES.max(least_bytes),
            MaxMemory::Bytes(bytes) => bytes,
        };
        let Some(spare) = max_bytes.checked_sub(least_bytes) else {
            return Err(TooLittle {
                least_bytes,
                sizes_wanted_too: *wanted != WantedSizes::default(),
            });
        };
        let sizes = shared_out(spare, wanted, host);
        Ok(Self {
            sizes,
            map_bytes: of_maps(&sizes, host),
            limits: Some(Limits {
                max_bytes,
                room_bytes: max_bytes - of_all(&sizes, host),
            }),
        })
    }

    fn unlimited(wanted: &WantedSizes, host: Host) -> Self {
        let sizes = all_of(wanted, &Sizes::default());
        Self {
            sizes,
            map_bytes: of_maps(&sizes, host),
            limits: None,
        }
    }

    /// The limit; none if there is none.
    pub(super) fn max_bytes(&self) -> Option<u64> {
        self.limits.map(|limits| limits.max_bytes)
    }

    /// How many blocks may be in the books before the map has to be looked at.
    pub(super) const fn max_blocks(&self) -> u64 {
        // Two batches of events more, since a map can be very small.
        blocks_in_books(self.sizes.live_entries) + 8192
    }

    /// How many bytes of names may be remembered.
    pub(super) fn max_name_bytes(&self) -> Option<u64> {
        self.limits.map(|limits| limits.room_bytes / 8)
    }

    /// What is to be done about what is taken.
    pub(super) fn orders(&self, usage: &Usage, before: &Orders) -> Orders {
        let Some(Limits { room_bytes, .. }) = self.limits else {
            return Orders::default();
        };
        let spent = usage.spent();
        let high = room_bytes / 4 * 3;
        let top = room_bytes / 8 * 7;
        let is_high = spent >= high;
        // Copies of all stacks are made for a profile: these have to find room, too.
        let most_stacks = room_bytes / (PROFILE_TIMES + 1);
        let more = top.saturating_sub(spent);
        let a_profile = usage.stack_bytes * PROFILE_TIMES + LEAST_PROFILE_BYTES;
        Orders {
            gives_back: is_high,
            forgets_ended: usage.stack_bytes >= most_stacks / 8 * 7,
            max_stack_bytes: Some(most_stacks.min(usage.stack_bytes + more)),
            max_compile_bytes: Some(room_bytes.saturating_sub(spent)),
            max_table_bytes: Some(usage.table_bytes + more),
            // Not on and off all the time.
            refuses_targets: spent >= top || (before.refuses_targets && is_high),
            max_profiles: usize::try_from(room_bytes.saturating_sub(spent) / a_profile)
                .unwrap_or(usize::MAX)
                .max(1),
        }
    }
}

/// What is taken at one moment, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Unwind tables and lists of mappings, in the kernel.
    pub(super) table_bytes: u64,
    /// What the prefilter has mapped into processes: theirs, most of it never touched, and not
    /// counted.
    pub(super) prefilter_bytes: u64,
    /// Blocks in the books.
    pub(super) block_bytes: u64,
    /// Stacks in the books.
    pub(super) stack_bytes: u64,
    /// Processes that are or were traced.
    pub(super) process_bytes: u64,
    /// Names that are remembered.
    pub(super) name_bytes: u64,
    /// Anonymous memory of the daemon, as the kernel sees it; with the three before.
    pub(super) resident_bytes: u64,
}

impl Usage {
    /// Of the daemon's memory what nothing else here names.
    pub(super) fn other_bytes(&self) -> u64 {
        self.resident_bytes.saturating_sub(self.named_bytes())
    }

    /// What is accounted for of the daemon's own.
    fn named_bytes(&self) -> u64 {
        self.block_bytes + self.stack_bytes + self.process_bytes + self.name_bytes
    }

    /// What is taken of the room.
    fn spent(&self) -> u64 {
        // What is accounted for can be more than the kernel sees: pages that were never
        // touched.
        let own = self.resident_bytes.max(self.named_bytes());
        let own = own.saturating_sub(self.block_bytes.saturating_add(BASE_BYTES));
        own + self.table_bytes
    }
}

/// What is to be done to stay below the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Orders {
    /// Caches are to be dropped, and if that was done a moment ago, ended processes forgotten.
    pub(super) gives_back: bool,
    /// Ended processes are to be forgotten, since stacks of others will soon have no room.
    pub(super) forgets_ended: bool,
    /// Stacks may take so much; none without a limit.
    pub(super) max_stack_bytes: Option<u64>,
    /// Unwind tables may take so much; none without a limit.
    pub(super) max_table_bytes: Option<u64>,
    /// Compiling a table may take so much; none without a limit.
    pub(super) max_compile_bytes: Option<u64>,
    /// No further process is taken on.
    pub(super) refuses_targets: bool,
    /// So many profiles may be made at a time.
    pub(super) max_profiles: usize,
}

impl Default for Orders {
    /// Those without a limit.
    fn default() -> Self {
        Self {
            gives_back: false,
            forgets_ended: false,
            max_stack_bytes: None,
            max_table_bytes: None,
            max_compile_bytes: None,
            refuses_targets: false,
            max_profiles: usize::MAX,
        }
    }
}

/// The maps that BPF fills, and the buffers that the kernel writes records into.
fn of_maps(sizes: &Sizes, host: Host) -> u64 {
    map_bytes::ring(sizes.ring_bytes)
        + map_bytes::live(sizes.live_entries)
        + map_bytes::stacks(sizes.stack_entries)
        + map_bytes::in_flight(sizes.in_flight_entries, host.cpus)
        + map_bytes::others(host.cpus, host.traces_all)
        + host.cpus * (mmap_events::BUFFER_BYTES as u64 + 4096)
}

/// What the books and a sweep need for the blocks of the live map.
fn of_blocks(live_entries: u32) -> u64 {
    blocks_in_books(live_entries) * BLOCK_BYTES + u64::from(live_entries) * SWEPT_BLOCK_BYTES
}

/// All but the room.
fn of_all(sizes: &Sizes, host: Host) -> u64 {
    BASE_BYTES + of_maps(sizes, host) + of_blocks(sizes.live_entries)
}

/// Those sizes that were asked for, and others for the rest.
fn all_of(wanted: &WantedSizes, others: &Sizes) -> Sizes {
    Sizes {
        ring_bytes: wanted.ring_bytes.unwrap_or(others.ring_bytes),
        live_entries: wanted.live_entries.unwrap_or(others.live_entries),
        stack_entries: wanted.stack_entries.unwrap_or(others.stack_entries),
        in_flight_entries: wanted.in_flight_entries.unwrap_or(others.in_flight_entries),
    }
}

fn least(wanted: &WantedSizes) -> Sizes {
    let least = Sizes {
        ring_bytes: LEAST_RING_BYTES,
        live_entries: LEAST_LIVE_ENTRIES,
        stack_entries: LEAST_STACK_ENTRIES,
        in_flight_entries: LEAST_IN_FLIGHT_ENTRIES,
    };
    all_of(wanted, &least)
}

/// Sizes that take their shares of what is spare beyond the least: half of it goes to live
/// blocks, on both sides, a seventh to stacks on their way, a sixteenth to the ring, and a
/// 64th to calls in flight. What is left is room.
fn shared_out(spare: u64, wanted: &WantedSizes, host: Host) -> Sizes {
    let live = |entries: u32| map_bytes::live(entries) + of_blocks(entries);
    let in_flight = |entries: u32| map_bytes::in_flight(entries, host.cpus);
    let ring_bytes = largest(
        LEAST_RING_BYTES,
        DEFAULT_RING_BYTES,
        spare / 16,
        map_bytes::ring,
    );
    let others = Sizes {
        // The kernel takes nothing else.
        ring_bytes: 1 << ring_bytes.ilog2(),
        live_entries: largest(LEAST_LIVE_ENTRIES, DEFAULT_LIVE_ENTRIES, spare / 2, live),
        stack_entries: largest(
            LEAST_STACK_ENTRIES,
            DEFAULT_STACK_ENTRIES,
            spare / 7,
            map_bytes::stacks,
        ),
        in_flight_entries: largest(
            LEAST_IN_FLIGHT_ENTRIES,
            DEFAULT_IN_FLIGHT_ENTRIES,
            spare / 64,
            in_flight,
        ),
    };
    all_of(wanted, &others)
}

/// The largest size of which what it takes beyond the least fits a share.
fn largest(least: u32, most: u32, share: u64, bytes: impl Fn(u32) -> u64) -> u32 {
    let fits = |size: u32| bytes(size) <= bytes(least) + share;
    let (mut below, mut above) = (least, most);
    while below < above {
        let middle = below + (above - below).div_ceil(2);
        if fits(middle) {
            below = middle;
        } else {
            above = middle - 1;
        }
    }
    below
}

#[cfg(test)]
mod tests;
