//! What the tracer tells others: captures, summaries, statistics.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use super::Tracer;
use crate::{
    export::profile::ProbeInfo,
    pipeline::{
        capture::{Capture, ImageCapture},
        stats::{ImageStats, ProcessStats, ProcessSummary, Stats},
    },
    sample::ImageId,
};

impl Tracer {
    pub(super) fn capture(&mut self, wanted: Option<u32>) -> Capture {
        self.drain_mmap_events();
        self.drain_ring();
        self.close_replaced();
        self.settle();
        self.refresh_memory();
        self.refresh_totals();
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
        for (_, target) in self.targets.iter().filter(|(pid, _)| is_wanted(**pid)) {
            duration = duration.max(target.since.elapsed());
            probe.sites.extend(target.sites.iter().cloned());
            let losses = self.losses(target.slot);
            for image in &target.images {
                images.push(ImageCapture {
                    info: image.info.clone(),
                    exited: image.ended(),
                    engine: image
                        .engine
                        .clone()
                        .unwrap_or_else(|| target.choice.engine()),
                    memory: image.memory,
                    traced: image.traced(),
                    totals: image.totals.exact(),
                    losses: image.losses(losses, &self.ledger.tally(image.id)),
                    mappings: image.code.first().clone(),
                    perf_map: image.perf_map.clone(),
                    groups: image
                        .versions
                        .group(snapshot.remove(&image.id).unwrap_or_default()),
                });
            }
        }
        probe.sites.sort();
        probe.sites.dedup();
        Capture {
            captured_at: SystemTime::now(),
            duration,
            sample_interval_bytes: self.options.sample_interval_bytes,
            coarsest_interval_bytes: self.coarsest_interval_bytes,
            probe,
            images,
        }
    }

    pub(super) fn processes(&self) -> Vec<ProcessSummary> {
        self.targets
            .iter()
            .map(|(&pid, target)| {
                let info = target.images.last().map(|image| &image.info);
                ProcessSummary {
                    pid,
                    comm: info.map(|info| info.comm.clone()).unwrap_or_default(),
                    exe: info.map(|info| info.exe.clone()).unwrap_or_default(),
                    origin: info.map(|info| info.origin.clone()),
                    state: target.state.name(),
                    modules: target.modules.iter().cloned().collect(),
                }
            })
            .collect()
    }

    pub(super) fn stats(&mut self) -> Stats {
        self.drain_ring();
        self.close_replaced();
        self.settle();
        self.refresh_totals();
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
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
            missing_stacks: self.missing_stacks,
            unwind: self.options.unwind.name(),
            unwind_table_bytes: self.tables.bytes(),
            mapping_lists: self.work.lists,
            mapping_lists_ms: milliseconds(self.work.list_time),
            longest_table_delay_ms: milliseconds(self.work.longest_table_delay),
            longest_round_ms: milliseconds(self.work.longest_round),
            processes: self
                .targets
                .iter()
                .map(|(&pid, target)| {
                    let losses = self.losses(target.slot);
                    let engine = target
                        .images
                        .last()
                        .and_then(|image| image.engine.clone())
                        .unwrap_or_else(|| target.choice.engine());
                    ProcessStats {
                        pid,
                        comm: target
                            .images
                            .last()
                            .map(|image| image.info.comm.clone())
                            .unwrap_or_default(),
                        state: target.state.name(),
                        sites: target.sites.len(),
                        engine: engine.name(),
                        engine_reason: engine.reason().map(str::to_owned),
                        stopped_ms: milliseconds(target.stopped.last),
                        longest_stopped_ms: milliseconds(target.stopped.max),
                        image_bytes: target.image_bytes,
                        attach_ms: milliseconds(target.attach_time),
                        detach_ms: target.detach_time.map(milliseconds),
                        images: target
                            .images
                            .iter()
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
}
