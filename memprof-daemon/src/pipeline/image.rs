//! What the pipeline knows of one program image of a traced process: of one program, from its
//! exec to the next or to its end.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use memprof_common::{
    counters::{COUNTERS, DropReason},
    totals::TargetTotals,
};

use super::{
    totals::ImageTotals,
    tracer::{golang::GoImage, prefilter::StubLosses},
    versions::StackVersions,
};
use crate::{
    export::profile::{ChildOf, Engine, Inherited, ProcessMemory},
    ledger::EventTally,
    process::{
        history::CodeHistory,
        info::{ProcessInfo, read_memory},
        perf_map::{self, PerfMap},
    },
    sample::ImageId,
};

/// One program image of a target.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) id: ImageId,
    pub(super) info: ProcessInfo,
    pub(super) code: CodeHistory,
    pub(super) versions: StackVersions,
    /// Samples whose stack is not kept, since too many are.
    pub(super) unkept_stacks: u64,
    /// Where it names the code that it makes at run time, once there is such.
    pub(super) perf_map: Option<Arc<PerfMap>>,
    /// The last reading.
    pub(super) memory: Option<ProcessMemory>,
    /// Exact totals.
    pub(super) totals: ImageTotals,
    /// What it has from its parent: blocks that are in the parent's books.
    pub(super) inherited: Option<Inherited>,
    /// Whose child it is, if it is traced for that.
    pub(super) child_of: Option<ChildOf>,
    /// It has ended before anything in it was probed.
    pub(super) is_unseen: bool,
    /// How its calls were looked at, once it has ended.
    pub(super) engine: Option<Engine>,
    /// What stubs in it could not do.
    pub(super) stub_losses: StubLosses,
    /// The Go program that it is, if it is one.
    pub(super) go: Option<GoImage>,
    /// It was seen to map what Go has built.
    pub(super) maps_go: bool,
    /// It maps an allocator.
    pub(super) has_allocator: bool,
    /// It was made as a copy of another process, and has its memory: if that is a Go program,
    /// its runtime does not go on in a copy.
    pub(super) is_copy: bool,
    /// Traced from here ...
    since: Instant,
    /// ... to here, once it has ended.
    until: Option<Instant>,
    /// Losses of the target before this image, which are not its own.
    losses_before: [u64; COUNTERS],
    /// Losses of the target at the end of this image, once it has ended.
    losses_at_end: Option<[u64; COUNTERS]>,
}

impl Image {
    /// The first image's totals begin at zero; a later one's base is the
    /// caller's to set.
    pub(super) fn new(
        id: ImageId,
        info: ProcessInfo,
        code: CodeHistory,
        losses_before: [u64; COUNTERS],
    ) -> Self {
        Self {
            id,
            info,
            code,
            versions: StackVersions::default(),
            unkept_stacks: 0,
            perf_map: None,
            memory: None,
            totals: ImageTotals::new((id.epoch == 0).then(TargetTotals::default)),
            inherited: None,
            child_of: None,
            is_unseen: false,
            engine: None,
            stub_losses: StubLosses::default(),
            go: None,
            maps_go: false,
            has_allocator: false,
            is_copy: false,
            since: Instant::now(),
            until: None,
            losses_before,
            losses_at_end: None,
        }
    }

    /// Reads what the kernel says it holds; keeps the last answer of a process
    /// that is ending. False if the kernel does not tell.
    pub(super) fn refresh_memory(&mut self) -> bool {
        if self.losses_at_end.is_some() {
            return true;
        }
        let memory = read_memory(self.id.pid);
        let is_known = memory.is_ok();
        self.memory = memory.ok().or(self.memory);
        is_known
    }

    /// Opens the file in which it names the code that it makes at run time: when it has
    /// exited, its `/tmp` cannot be reached any more.
    pub(super) fn find_perf_map(&mut self) {
        let makes_code = || {
            self.code
                .now()
                .iter()
                // A program can name its memory: then it is `[anon:...]`.
                .any(|mapping| {
                    let name = mapping.name.as_str();
                    mapping.file.is_none() && (name.is_empty() || name.starts_with("[anon"))
                })
        };
        if self.perf_map.is_none() && !self.ended() && makes_code() {
            self.perf_map = perf_map::open(self.id.pid, self.info.start_time)
                .ok()
                .map(Arc::new);
        }
    }

    pub(super) fn end(&mut self, losses: [u64; COUNTERS]) {
        self.losses_at_end = Some(losses);
        self.until = Some(Instant::now());
    }

    /// Since when it is traced.
    pub(super) const fn since(&self) -> Instant {
        self.since
    }

    /// When it ended, if it has.
    pub(super) const fn until(&self) -> Option<Instant> {
        self.until
    }

    pub(super) const fn ended(&self) -> bool {
        self.losses_at_end.is_some()
    }

    /// What was lost of this image, by cause, given the target's counters now.
    pub(super) fn losses(
        &self,
        now: [u64; COUNTERS],
        tally: &EventTally,
    ) -> BTreeMap<&'static str, u64> {
        let upper = self.losses_at_end.unwrap_or(now);
        let counted = upper
            .iter()
            .zip(&self.losses_before)
            .map(|(upper, before)| upper.saturating_sub(*before));
        let mut losses: BTreeMap<&'static str, u64> = DropReason::ALL
            .iter()
            .map(|reason| reason.name())
            .zip(counted)
            .collect();
        if let Some(unreported) = losses.get_mut(DropReason::AllocUnreported.name()) {
            *unreported = unreported.saturating_sub(tally.recovered_unreported);
        }
        *losses.entry(DropReason::CutStaleTables.name()).or_default() +=
            self.versions.stale_samples;
        self.stub_losses.add_to(&mut losses);
        losses.insert("recovered_allocations", tally.recovered_allocations);
        losses.insert("swept_frees", tally.swept_frees);
        losses.insert("unmatched_frees", tally.unmatched_frees);
        losses.insert("replaced_allocations", tally.replaced_allocations);
        losses.insert("stacks_full", self.unkept_stacks + tally.stacks_full);
        losses
    }
}
