//! Staying below `--max-memory`: each second what is taken is added up, and if it is much, less
//! is taken. [`crate::pipeline::budget`] says how much is much, and docs/limits.md in which
//! order what is given up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::Tracer;
use crate::{
    pipeline::{
        budget::{Budget, Orders, Usage},
        stats::{MemoryBytes, MemoryStats},
        target::Target,
    },
    probe::heap::give_back_holes,
    process::{info::read_memory, mapping::Mapping},
    symbolize::SymbolizeHandle,
};

/// Caches that were dropped are full again when somebody asks for a profile: not more often.
const DROP_CACHES_EVERY: Duration = Duration::from_secs(10);

/// How often free memory is given back, however little is taken.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(30);

/// The memory that is taken, and what has been done to keep it below the limit.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) budget: Budget,
    names: SymbolizeHandle,
    orders: Orders,
    /// How many profiles there is memory for at a time.
    profiles: Arc<AtomicUsize>,
    caches_dropped: Option<Instant>,
    /// When free memory was last given back.
    given_back: Instant,
    /// It is being given back, elsewhere.
    is_giving_back: Arc<AtomicBool>,
    cache_drops: u64,
    forgotten_early: u64,
    refused_targets: u64,
    has_warned: bool,
}

impl Memory {
    pub(super) fn new(budget: Budget, names: SymbolizeHandle) -> Self {
        if let Some(max_bytes) = budget.max_name_bytes() {
            names.limit_names(max_bytes);
        }
        Self {
            budget,
            names,
            orders: Orders::default(),
            profiles: Arc::new(AtomicUsize::new(usize::MAX)),
            caches_dropped: None,
            given_back: Instant::now(),
            is_giving_back: Arc::default(),
            cache_drops: 0,
            forgotten_early: 0,
            refused_targets: 0,
            has_warned: false,
        }
    }

    /// How many profiles there is memory for at a time, now and later.
    pub(super) fn profiles(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.profiles)
    }

    /// Whether no further process is taken on.
    pub(super) const fn refuses_targets(&self) -> bool {
        self.orders.refuses_targets
    }

    /// Tells once that not all that is wanted can be kept.
    fn warn(&mut self, what: &str) {
        if !self.has_warned {
            self.has_warned = true;
            warn!(
                max_bytes = self.budget.max_bytes(),
                "memory is short: {what}; raise --max-memory or -i. Told once, and counted in \
                 /v1/stats"
            );
        }
    }

    /// Has the C library give back what is free, where it may take its time.
    fn give_back_free(&mut self) {
        self.given_back = Instant::now();
        let is_under_way = Arc::clone(&self.is_giving_back);
        if !is_under_way.swap(true, Ordering::Relaxed) {
            tokio::task::spawn_blocking(move || {
                give_back_holes();
                is_under_way.store(false, Ordering::Relaxed);
            });
        }
    }
}

impl Tracer {
    /// Adds up what is taken, and does what has to be done about it.
    pub(super) fn look_after_memory(&mut self) {
        self.ledger.shrink();
        let usage = self.memory_usage();
        let before = self.memory.orders;
        let orders = self.memory.budget.orders(&usage, &before);
        self.memory.orders = orders;
        self.memory
            .profiles
            .store(orders.max_profiles, Ordering::Relaxed);
        self.ledger.limit_stacks(orders.max_stack_bytes);
        self.tables
            .limit(orders.max_table_bytes, orders.max_compile_bytes);
        if orders.gives_back {
            self.give_memory_back();
        } else if orders.forgets_ended {
            self.forget_some_ended();
        }
        if self.memory.given_back.elapsed() >= GIVE_BACK_EVERY {
            self.memory.give_back_free();
        }
        if !self.ledger.has_room_for_stacks() {
            self.memory
                .warn("further stacks are counted as unknown ones");
        }
        if self.tables.refused() > 0 {
            self.memory
                .warn("there is no room for unwind tables, and stacks are cut");
        }
        match (before.refuses_targets, orders.refuses_targets) {
            (false, true) => warn!("memory is short: no further process is taken on"),
            (true, false) => info!("there is memory again: processes are taken on"),
            _ => {}
        }
    }

    /// Gives back what can be had again; if that was done a moment ago, what cannot.
    fn give_memory_back(&mut self) {
        let is_due = |at: Instant| at.elapsed() >= DROP_CACHES_EVERY;
        if self.memory.caches_dropped.is_none_or(is_due) {
            self.memory.caches_dropped = Some(Instant::now());
            self.memory.cache_drops += 1;
            self.memory.names.forget();
            self.scanner.forget_files(Duration::ZERO);
            self.forget_stacks_soon();
        } else {
            self.forget_some_ended();
        }
        self.memory.give_back_free();
    }

    /// Forgets a quarter of the processes that have ended, those that did so first.
    fn forget_some_ended(&mut self) {
        let ended = |(&pid, target): (&u32, &Target)| Some((target.ended()?, pid));
        let over = self.targets.iter().filter(|(_, target)| target.is_over());
        let mut ended: Vec<_> = over.filter_map(ended).collect();
        ended.sort_unstable();
        ended.truncate(ended.len().div_ceil(4));
        if ended.is_empty() {
            return;
        }
        for (_, pid) in &ended {
            self.forget_ended(*pid);
        }
        self.memory.forgotten_early += ended.len() as u64;
        self.forget_stacks_soon();
        self.memory
            .warn("processes that have ended are forgotten earlier than --keep-exited says");
    }

    /// Looks at the live map if more is in the books than can be in there: frees were lost.
    /// Not while a sweep is under way.
    pub(super) fn bound_blocks(&mut self) {
        if self.ledger.blocks() > self.memory.budget.max_blocks() {
            self.sweep();
        }
    }

    /// Counts a process that was not taken on for want of memory.
    pub(super) const fn count_refused_target(&mut self) {
        self.memory.refused_targets += 1;
    }

    fn memory_usage(&self) -> Usage {
        let targets = self.targets.values();
        Usage {
            table_bytes: self.tables.bytes(),
            prefilter_bytes: targets.clone().map(|target| target.image_bytes).sum(),
            block_bytes: self.ledger.block_bytes(),
            stack_bytes: self.ledger.stack_bytes(),
            process_bytes: targets.map(Target::bytes).sum(),
            name_bytes: self.memory.names.name_bytes(),
            resident_bytes: read_memory(std::process::id())
                .map_or(0, |memory| memory.rss_anon_bytes),
        }
    }

    pub(super) fn memory_stats(&self) -> MemoryStats {
        let usage = self.memory_usage();
        let memory = &self.memory;
        let sizes = memory.budget.sizes;
        MemoryStats {
            max_bytes: memory.budget.max_bytes(),
            bytes: MemoryBytes {
                maps: memory.budget.map_bytes,
                tables: usage.table_bytes,
                prefilter: usage.prefilter_bytes,
                blocks: usage.block_bytes,
                stacks: usage.stack_bytes,
                processes: usage.process_bytes,
                names: usage.name_bytes,
                other: usage.other_bytes(),
            },
            ring_bytes: sizes.ring_bytes,
            live_entries: sizes.live_entries,
            stack_entries: sizes.stack_entries,
            in_flight_entries: sizes.in_flight_entries,
            max_stack_bytes: memory.orders.max_stack_bytes,
            refuses_stacks: !self.ledger.has_room_for_stacks(),
            refuses_targets: memory.refuses_targets(),
            cache_drops: memory.cache_drops,
            forgotten_early: memory.forgotten_early,
            refused_targets: memory.refused_targets,
            refused_tables: self.tables.refused(),
        }
    }
}

/// What a mapping takes: itself, its counts of references, its place in a table, and a path.
const MAPPING_BYTES: usize = size_of::<Mapping>() + 128;

/// What is kept of a probed place, and what is told of it.
const SITE_BYTES: usize = 256;

impl Target {
    /// What is known of it takes so much, roughly.
    fn bytes(&self) -> u64 {
        let of_images: usize = self.images.iter().map(|image| image.bytes()).sum();
        (size_of::<Self>() + of_images + self.sites.len() * SITE_BYTES) as u64
    }
}

impl crate::pipeline::image::Image {
    fn bytes(&self) -> usize {
        let mappings = self.code.now().len() + self.code.first().len();
        size_of::<Self>() + mappings * MAPPING_BYTES + self.versions.bytes()
    }
}
