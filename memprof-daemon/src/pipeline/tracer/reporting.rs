//! What the tracer tells others: captures, summaries, statistics.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Tracer,
    golang::GoImage,
    marks::{Basis, Mark},
};
use crate::{
    export::profile::{Engine, ProbeInfo},
    ledger::StackCounters,
    pipeline::{
        capture::{Capture, ImageCapture},
        image::Image,
        stats::{
            Books, Cost, ImageStats, ProcessFacts, ProcessStats, ProcessSummary, Stats, Sums,
            milliseconds,
        },
        target::Target,
    },
    sample::ImageId,
};

impl Tracer {
    /// Brings the books to the present.
    pub(super) fn catch_up(&mut self) {
        self.drain_mmap_events();
        self.drain_ring();
        self.close_replaced();
        self.settle();
        self.refresh_totals();
    }

    /// The counters of one process or of all; with a mark, what has changed since.
    pub(super) fn capture(&mut self, wanted: Option<u32>, window: Option<&Mark>) -> Capture {
        self.catch_up();
        self.refresh_memory();
        let basis = Basis::new(self.reset.as_deref(), window);
        let is_wanted = |pid: u32| wanted.is_none_or(|wanted| wanted == pid);
        let mut snapshot: BTreeMap<ImageId, _> = self
            .ledger
            .snapshot(|image| is_wanted(image.pid))
            .images
            .into_iter()
            .map(|image| (image.image, image.stacks))
            .collect();
        let mut probe = ProbeInfo {
            mode: self.probe_mode.name().to_owned(),
            sites: Vec::new(),
        };
        let mut images = Vec::new();
        let mut duration = Duration::ZERO;
        for (_, target) in self.shown().filter(|(pid, _)| is_wanted(**pid)) {
            duration = duration.max(basis.limit(target.since.elapsed()));
            probe.sites.extend(target.sites.iter().cloned());
            let losses = self.losses(target.slot);
            for image in &target.images {
                if basis.is_over(image) || image.is_unseen {
                    continue;
                }
                let stacks = snapshot.remove(&image.id).unwrap_or_default();
                let lost = image.losses(losses, &self.ledger.tally(image.id));
                let go = image.go.as_ref().and_then(GoImage::target);
                let is_only_go = image.is_only_go() && stacks.is_empty();
                let is_read = go.is_some();
                images.extend(go.map(|go| ImageCapture {
                    inherited: None,
                    child_of: image.child_of,
                    info: image.info.clone(),
                    exited: image.ended(),
                    engine: Engine::GoRuntime,
                    memory: image.memory,
                    traced: basis.traced(image),
                    totals: None,
                    losses: BTreeMap::new(),
                    mappings: image.code.first().clone(),
                    perf_map: None,
                    groups: Vec::new(),
                    go: Some(basis.go(go, image)),
                    go_refusal: None,
                }));
                // What calls no allocator has no other profile.
                if is_only_go && is_read {
                    continue;
                }
                images.push(ImageCapture {
                    info: image.info.clone(),
                    exited: image.ended(),
                    engine: match &image.engine {
                        _ if is_only_go => Engine::GoRuntime,
                        Some(engine) => engine.clone(),
                        None => target.choice.engine(),
                    },
                    memory: image.memory,
                    go: None,
                    go_refusal: image
                        .go
                        .as_ref()
                        .and_then(GoImage::refusal)
                        .map(str::to_owned),
                    traced: basis.traced(image),
                    inherited: image.inherited,
                    child_of: image.child_of,
                    totals: basis
                        .totals(image, image.totals.exact())
                        .filter(|_| !is_only_go),
                    losses: basis.losses(image, lost),
                    mappings: image.code.first().clone(),
                    perf_map: image.perf_map.clone(),
                    groups: image.versions.group(basis.counters(image, stacks)),
                });
            }
        }
        if let Some(system) = &self.system {
            probe.sites.extend(system.files.sites().cloned());
        }
        probe.sites.sort();
        probe.sites.dedup();
        Capture {
            captured_at: SystemTime::now(),
            duration,
            window: basis.window(),
            sample_interval_bytes: self.options.sample_interval_bytes,
            coarsest_interval_bytes: self.coarsest_interval_bytes,
            probe,
            images,
        }
    }

    pub(super) fn processes(&mut self) -> Vec<ProcessSummary> {
        self.catch_up();
        self.shown()
            .map(|(&pid, target)| {
                let info = target.images.last().map(|image| &image.info);
                ProcessSummary {
                    facts: self.facts_of(pid, target),
                    exe: info.map(|info| info.exe.clone()).unwrap_or_default(),
                    origin: info.map(|info| info.origin.clone()),
                    modules: target.modules_read(),
                }
            })
            .collect()
    }

    pub(super) fn stats(&mut self) -> Stats {
        self.catch_up();
        Stats {
            version: env!("CARGO_PKG_VERSION"),
            uptime_s: self.started.elapsed().as_secs_f64(),
            probe_mode: self.probe_mode.name(),
            sample_interval_bytes: self.options.sample_interval_bytes,
            known_stacks: self.ledger.known_stacks(),
            sweeps: self.sweeps,
            failed_sweeps: self.failed_sweeps,
            undecodable_events: self.undecodable_events,
            lost_mapping_events: self.mmap_events.lost(),
            traces_all: self.system.is_some(),
            follows_children: self.family.is_some(),
            children: self
                .family
                .as_ref()
                .map(|family| family.tally)
                .unwrap_or_default(),
            free_slots: self.slots.free(),
            unclaimed_calls: self.slots.unclaimed_calls(),
            forgotten_processes: self.forgotten_targets,
            missed_go_programs: self.system.as_ref().map_or(0, |system| system.go.missed()),
            missing_stacks: self.missing_stacks,
            unwind: self.options.unwind.name(),
            unwind_table_bytes: self.tables.bytes(),
            mapping_lists: self.work.lists,
            mapping_lists_ms: milliseconds(self.work.list_time),
            longest_table_delay_ms: milliseconds(self.work.longest_table_delay),
            longest_round_ms: milliseconds(self.work.longest_round),
            sums: self.sums(),
            attaching: self.work.attaching,
            memory: self.memory_stats(),
            processes: self
                .shown()
                .map(|(&pid, target)| {
                    let losses = self.losses(target.slot);
                    ProcessStats {
                        facts: self.facts_of(pid, target),
                        sites: target.sites.len(),
                        images: target
                            .images
                            .iter()
                            .filter(|image| !image.is_unseen)
                            .map(|image| {
                                let tally = self.ledger.tally(image.id);
                                ImageStats::new(
                                    image.id.epoch,
                                    self.ledger.live(image.id),
                                    tally,
                                    &image.versions,
                                    image.losses(losses, &tally),
                                    image.totals.exact(),
                                    image.stub_losses.overflowed,
                                )
                            })
                            .collect(),
                    }
                })
                .collect(),
        }
    }

    /// The targets that others are told of.
    fn shown(&self) -> impl Iterator<Item = (&u32, &Target)> {
        let targets = self.targets.iter();
        targets.filter(|(_, target)| !target.is_unwanted && !target.is_untraced_child())
    }

    fn facts_of(&self, pid: u32, target: &Target) -> ProcessFacts {
        let image = target.images.last();
        let engine = engine_of(target);
        ProcessFacts {
            pid,
            comm: image
                .map(|image| image.info.comm.clone())
                .unwrap_or_default(),
            state: target.state_name(),
            engine: engine.name(),
            engine_reason: engine.reason().map(str::to_owned),
            go: image.and_then(|image| Some(image.go.as_ref()?.status(image.until()))),
            child_of: target.child.map(|child| child.parent),
            cost: cost_of(target),
            books: self.books_of(target),
        }
    }

    /// What a target's books say, in short.
    fn books_of(&self, target: &Target) -> Books {
        let losses = self.losses(target.slot);
        let mut counted = target.replaced.clone();
        // Of a program that was replaced nothing is in use any more.
        let mut held = StackCounters::default();
        for image in &target.images {
            let of_image = self.counted(image, losses);
            held = of_image.allocated;
            counted.add(&of_image);
        }
        let until = target.images.last().and_then(Image::until);
        let traced = counted.since.map_or(Duration::ZERO, |since| {
            until
                .unwrap_or_else(Instant::now)
                .saturating_duration_since(since)
        });
        Books::new(counted, &held, traced)
    }

    /// The sums over all targets, also those that are forgotten.
    fn sums(&mut self) -> Sums {
        let mut sums = self.forgotten.clone();
        for target in self.targets.values() {
            sums.add(&self.sums_of(target));
        }
        // A loss that turned out to be none is not taken back where counters may only grow.
        for (cause, number) in &mut sums.losses {
            let told = self.told_losses.entry(cause).or_default();
            *told = (*told).max(*number);
            *number = *told;
        }
        sums
    }
}

/// How the calls of a target's present or last program are looked at.
fn engine_of(target: &Target) -> Engine {
    let image = target.images.last();
    if image.is_some_and(Image::is_only_go) {
        return Engine::GoRuntime;
    }
    let engine = image.and_then(|image| image.engine.clone());
    engine.unwrap_or_else(|| target.choice.engine())
}

fn cost_of(target: &Target) -> Cost {
    Cost {
        stopped_ms: milliseconds(target.stopped.last),
        longest_stopped_ms: milliseconds(target.stopped.max),
        image_bytes: target.image_bytes,
        shards_given_back: target.shards_given_back,
        attach_ms: milliseconds(target.attach_time),
        detach_ms: target.detach_time.map(milliseconds),
    }
}
