//! Slots of the BPF maps: one a traced process, given back when it is over, and made ready
//! before it is anybody's.
//!
//! A slot has its place in each of the maps by slot. While it is a target's, BPF counts
//! there; nothing is read there any more once the target is over, since its images have
//! kept what they had to. Where every process is traced, slots that are ready lie in a map
//! from which BPF takes them itself.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use aya::{
    maps::{Array, MapData, MapError, PerCpuValues, Queue},
    util::nr_cpus,
};
use memprof_common::{
    config::{TargetConfig, TargetState},
    counters::{COUNTERS, TargetCounters},
    limits::MAX_TARGETS,
    totals::{TargetTotals, totals_index},
    unwind::table::MappingList,
};
use tracing::warn;

use super::{Tracer, random_seed};
use crate::{pipeline::target::Target, probe::loader::CallMaps};

/// A program of BPF's that has found a slot is done with it by then: it takes microseconds,
/// unless it is preempted.
const REST: Duration = Duration::from_millis(300);

/// Which slots are whose.
pub(super) struct Slots {
    states: Array<MapData, TargetState>,
    stock_map: Queue<MapData, u32>,
    unclaimed_map: Array<MapData, u64>,
    calls: CallMaps,
    /// Were a target's, and are nobody's.
    used: Vec<u16>,
    /// None from here on was ever anybody's.
    next: u16,
    /// Were a target's that goes on, and are nobody's from then on.
    resting: Vec<(u16, Instant)>,
    /// Ready, and BPF's to give away: in the map, or taken and not yet told.
    stock: BTreeSet<u16>,
}

impl Slots {
    pub(super) const fn new(
        states: Array<MapData, TargetState>,
        stock_map: Queue<MapData, u32>,
        unclaimed_map: Array<MapData, u64>,
        calls: CallMaps,
    ) -> Self {
        Self {
            states,
            stock_map,
            unclaimed_map,
            calls,
            used: Vec::new(),
            resting: Vec::new(),
            next: 0,
            stock: BTreeSet::new(),
        }
    }

    /// BPF has given a slot away. False if it was not its to give.
    pub(super) fn take_from_stock(&mut self, slot: u16) -> bool {
        self.stock.remove(&slot)
    }

    /// Those that are ready.
    pub(super) fn stock(&self) -> impl Iterator<Item = u16> + '_ {
        self.stock.iter().copied()
    }

    /// How many are nobody's.
    pub(super) fn free(&self) -> usize {
        MAX_TARGETS.saturating_sub(u32::from(self.next)) as usize
            + self.used.len()
            + self.stock.len()
    }

    /// How many calls nobody has looked at, since no slot was free.
    pub(super) fn unclaimed_calls(&self) -> u64 {
        self.unclaimed_map.get(&0, 0).unwrap_or_else(|error| {
            warn!(%error, "cannot read how many calls no slot was free for");
            0
        })
    }

    /// One that is nobody's, and whether it has been somebody's.
    fn take_unready(&mut self) -> Option<(u16, bool)> {
        if u32::from(self.next) < MAX_TARGETS {
            self.next += 1;
            return Some((self.next - 1, false));
        }
        Some((self.used.pop()?, true))
    }
}

impl Tracer {
    /// Takes a slot for a process that the tracer takes on itself; none if all are in use.
    pub(super) fn take_slot(&mut self) -> Option<u16> {
        if self.slots.used.is_empty() {
            self.release_slots();
        }
        while let Some((slot, was_used)) = self.slots.take_unready() {
            if self.clear_slot(slot, was_used) {
                return Some(slot);
            }
        }
        let slot = u16::try_from(self.slots.stock_map.pop(0).ok()?).ok()?;
        self.slots.stock.remove(&slot);
        Some(slot)
    }

    /// Takes the slots back of targets of which nothing is under way any more.
    pub(super) fn release_slots(&mut self) {
        let over: Vec<u32> = self
            .targets
            .iter()
            .filter(|(_, target)| target.has_slot && target.is_over())
            .map(|(&pid, _)| pid)
            .collect();
        for pid in over {
            if let Some(target) = self.targets.get_mut(&pid) {
                target.has_slot = false;
                let (slot, may_be_in_use) = (target.slot, target.is_leaving());
                self.give_back(slot, may_be_in_use);
            }
        }
        let now = Instant::now();
        let rested = self
            .slots
            .resting
            .extract_if(.., |(_, until)| *until <= now);
        let rested: Vec<u16> = rested.map(|(slot, _)| slot).collect();
        for slot in rested {
            self.slots.calls.forget(slot);
            self.slots.used.push(slot);
        }
    }

    /// A slot is nobody's any more; not yet, if the process goes on, since a program of BPF's
    /// may have found it before.
    pub(super) fn give_back(&mut self, slot: u16, may_be_in_use: bool) {
        if may_be_in_use {
            self.slots.resting.push((slot, Instant::now() + REST));
        } else {
            self.slots.used.push(slot);
        }
    }

    /// Makes slots ready and lets BPF give them away.
    pub(super) fn fill_stock(&mut self) {
        if self.memory.refuses_targets() {
            return self.empty_stock();
        }
        while let Some((slot, was_used)) = self.slots.take_unready() {
            if !self.clear_slot(slot, was_used) {
                continue;
            }
            let config = self.config_of_nobody();
            let told = self
                .target_map
                .set(u32::from(slot), config, 0)
                .and_then(|()| self.slots.stock_map.push(u32::from(slot), 0));
            match told {
                Ok(()) => {
                    self.slots.stock.insert(slot);
                }
                Err(error) => {
                    // At the next round, then.
                    warn!(slot, %error, "cannot make a slot ready");
                    self.slots.used.push(slot);
                    return;
                }
            }
        }
    }

    /// Takes back those slots that are ready and not taken yet: calls of further processes are
    /// counted and not looked at.
    fn empty_stock(&mut self) {
        while let Ok(slot) = self.slots.stock_map.pop(0) {
            if let Ok(slot) = u16::try_from(slot)
                && self.slots.stock.remove(&slot)
            {
                self.slots.used.push(slot);
            }
        }
    }

    /// What a process that takes a slot begins with: the settings in force, and no code that
    /// is known.
    pub(super) fn config_of_nobody(&self) -> TargetConfig {
        TargetConfig {
            pid: 0,
            stack_depth: self.options.stack_depth,
            sample_interval_bytes: self.config().interval_in_force(),
            stack_seed: self.stack_seed,
            sample_seed: random_seed(),
            malloc_nests: 0,
            unwind: self.options.unwind as u32,
            mappings: MappingList::default().0,
            mappings_epoch: 0,
            pools: u32::from(!self.options.pools.is_empty()),
        }
    }

    /// Sets back what was counted in a slot. A slot that cannot be is not used again.
    fn clear_slot(&mut self, slot: u16, was_used: bool) -> bool {
        if !was_used {
            return true;
        }
        let cleared = self.try_to_clear_slot(u32::from(slot));
        if let Err(error) = &cleared {
            warn!(slot, %error, "a slot is lost: it cannot be set back");
        }
        cleared.is_ok()
    }

    fn try_to_clear_slot(&mut self, slot: u32) -> Result<(), MapError> {
        let cpus = nr_cpus().map_err(|(_, error)| MapError::from(error))?;
        let counters = vec![
            TargetCounters {
                dropped: [0; COUNTERS]
            };
            cpus
        ];
        let totals = vec![TargetTotals::default(); cpus];
        let states = &mut self.slots.states;
        states.set(slot, TargetState::default(), 0)?;
        self.counter_map
            .set(slot, PerCpuValues::try_from(counters)?, 0)?;
        for epoch in [0, 1] {
            let totals = PerCpuValues::try_from(totals.clone())?;
            self.totals_map.set(totals_index(slot, epoch), totals, 0)?;
        }
        Ok(())
    }
}

impl Target {
    /// Whether nothing of it is under way any more.
    pub(super) fn is_over(&self) -> bool {
        // Of one that is traced with all others, jobs only read; what they bring is dropped.
        let is_done = self.is_shared || self.jobs == 0 && self.detach_time.is_some();
        !self.is_live() && self.has_settled() && is_done
    }
}
