//! Targets with the prefilter: in, out, and its data in between.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{Command, Tracer, attaching::SiteBatch, random_seed};
use crate::{
    export::profile::{Engine, ProbeSite},
    pipeline::{
        install::{Installation, Installed, take_out},
        tables::FileTable,
        target::{State, Target, TargetError},
    },
    prefilter::{
        attach::{Attached, Image, StoppedTime},
        data::SharedData,
        error::{DetachError, PrefilterError},
        reclaim::Pace,
        relocate::displace_behind_first,
    },
    probe::{
        attach::AttachError,
        find::{AllocatorModule, FoundSite},
    },
    sample::ImageId,
};

/// How often a program is looked at again because what was planned for it did not fit.
const MOST_STALE: u8 = 3;

/// How a target's calls are looked at.
#[derive(Debug, Default)]
pub(in crate::pipeline) enum Choice {
    /// By the prefilter, once it is in.
    #[default]
    Open,
    /// By the prefilter.
    Prefilter(Box<Prefilter>),
    /// By uprobes on every call, since the prefilter cannot be had if there is a reason.
    Uprobe(Option<String>),
}

/// What is in a process.
#[derive(Debug)]
pub(in crate::pipeline) struct Prefilter {
    pub(super) image: Image,
    pub(super) data: SharedData,
    /// When shards of threads that have ended are given back.
    pub(super) pace: Pace,
    /// How stacks are walked through it, by device and inode of its files.
    tables: HashMap<(u64, u64), FileTable>,
}

impl Prefilter {
    /// Takes it out of its process; blocks.
    pub(super) fn take_out(
        &self,
        pid: u32,
        time_limit: Duration,
    ) -> Result<StoppedTime, DetachError> {
        take_out(pid, &self.image, time_limit)
    }
}

impl Choice {
    pub(in crate::pipeline) fn engine(&self) -> Engine {
        match self {
            Self::Open | Self::Prefilter(_) => Engine::Prefilter,
            Self::Uprobe(None) => Engine::Uprobe,
            Self::Uprobe(Some(reason)) => Engine::UprobeSince(reason.clone()),
        }
    }
}

/// What has come of hooking modules.
pub(in crate::pipeline) struct Hooked {
    /// Whose they were.
    image: ImageId,
    modules: Vec<AllocatorModule>,
    batch: SiteBatch,
    result: Result<Installed, PrefilterError>,
    time: Duration,
}

/// What the stubs of an image could not do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::pipeline) struct StubLosses {
    /// Calls that were neither counted nor sampled.
    pub(in crate::pipeline) unsharded: u64,
    /// Times that a thread found no gap.
    pub(in crate::pipeline) starved: u64,
    /// Buckets of the sampled set whose frees all trap.
    pub(in crate::pipeline) overflowed: u64,
}

impl StubLosses {
    /// Adds them to the losses by cause.
    pub(in crate::pipeline) fn add_to(&self, losses: &mut BTreeMap<&'static str, u64>) {
        losses.insert("unsharded_calls", self.unsharded);
        losses.insert("starved_threads", self.starved);
    }
}

impl Tracer {
    /// Hooks what is not hooked yet of `modules`.
    pub(super) fn hook_modules(&mut self, pid: u32, modules: &[AllocatorModule]) {
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        let mut batch = SiteBatch::default();
        let mut fresh = Vec::new();
        for module in modules {
            let before = batch.places.len();
            for found in &module.sites {
                let file_offset = found.probe_offset();
                let place = (module.file.device, module.file.inode, file_offset.0);
                if target.probed.insert(place) {
                    batch.places.push(place);
                    batch.shown.push(hooked_site(module, found));
                }
            }
            if batch.places.len() > before {
                fresh.push(module.clone());
            }
        }
        let interval_bytes = self.config().interval_in_force();
        if let Err(error) = self.tell_bpf(pid) {
            return self.give_up(pid, error);
        }
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        let Some(image) = target.images.last() else {
            return;
        };
        if fresh.is_empty() {
            return;
        }
        let image_id = image.id;
        let installation = Installation {
            pid,
            slot: target.slot,
            scanner: self.scanner.clone(),
            modules: fresh.clone(),
            data: match &target.choice {
                Choice::Prefilter(prefilter) => Some(prefilter.image.place()),
                Choice::Open | Choice::Uprobe(_) => None,
            },
            interval_bytes,
            seed: random_seed(),
            time_limit: self.options.attach_timeout,
            prober: self.prober.clone(),
        };
        target.jobs += 1;
        target.is_hooking = true;
        let begun = Instant::now();
        let outcome = installation.start(&target.holder);
        let myself = self.myself.clone();
        tokio::spawn(async move {
            let result = outcome.await.unwrap_or(Err(PrefilterError::NoThread));
            let hooked = Hooked {
                image: image_id,
                modules: fresh,
                batch,
                result,
                time: begun.elapsed(),
            };
            if let Some(sender) = myself.upgrade() {
                let _ = sender.send(Command::Hooked(Box::new(hooked))).await;
            }
        });
    }

    /// Modules have been hooked, or could not be.
    pub(super) fn hooked(&mut self, hooked: Hooked) {
        let Hooked {
            image,
            modules,
            batch,
            result,
            time,
        } = hooked;
        let pid = image.pid;
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        target.is_hooking = false;
        let waiting = std::mem::take(&mut target.waiting_modules);
        let is_present = target.images.last().is_some_and(|last| last.id == image);
        if !is_present {
            // The program that is there now has the same places, and is to get them.
            target.forget_places(&batch);
        }
        match result {
            Ok(installed) if is_present => self.keep(pid, batch, installed, time),
            // The program was replaced meanwhile: before it was hooked or after.
            Ok(installed) => {
                target.jobs = target.jobs.saturating_sub(1);
                self.discard(pid, installed.attached.image);
            }
            Err(error) if !is_present => {
                target.jobs = target.jobs.saturating_sub(1);
                debug!(pid, %error, "the program was replaced before it was hooked");
            }
            Err(error) => self.not_hooked(pid, &modules, batch, error),
        }
        if !waiting.is_empty() {
            self.attach_modules(pid, &waiting);
        }
        self.leave_if_asked(pid);
    }

    fn keep(&mut self, pid: u32, batch: SiteBatch, installed: Installed, time: Duration) {
        let interval_bytes = self.config().interval_in_force();
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        let Attached {
            image,
            data,
            rows,
            stopped,
        } = installed.attached;
        let file = (rows.device, rows.inode);
        target.stopped.join(stopped);
        target.image_bytes += image.bytes();
        debug!(pid, ?stopped, bytes = image.bytes(), "the prefilter is in");
        match (&mut target.choice, data) {
            (Choice::Prefilter(prefilter), _) => {
                prefilter.image.absorb(image);
                prefilter.tables.insert(file, installed.table);
            }
            (choice, Some(mut data)) => {
                // It may have changed since.
                data.set_interval(interval_bytes);
                *choice = Choice::Prefilter(Box::new(Prefilter {
                    image,
                    data,
                    pace: Pace::default(),
                    tables: HashMap::from([(file, installed.table)]),
                }));
                if !matches!(target.state, State::Attaching) {
                    info!(pid, "the new program is hooked");
                }
            }
            (_, None) => {}
        }
        self.publish_mappings(pid);
        self.attach_done(pid, batch, Ok(time));
    }

    fn not_hooked(
        &mut self,
        pid: u32,
        modules: &[AllocatorModule],
        batch: SiteBatch,
        error: PrefilterError,
    ) {
        let Some(target) = self.targets.get_mut(&pid) else {
            return;
        };
        let may_probe = target.mode.may_probe();
        if target.exit_seen {
            return self.attach_done(pid, batch, Err(AttachError::Exited));
        }
        target.jobs = target.jobs.saturating_sub(1);
        target.forget_places(&batch);
        let is_first = matches!(target.state, State::Attaching);
        let is_late = matches!(target.choice, Choice::Prefilter(_));
        if matches!(error, PrefilterError::Stale) && !is_first && target.stale_plans < MOST_STALE {
            // The news of the program that is there now may be on its way, or be lost.
            target.stale_plans += 1;
            target.jobs += 1;
            if let Some(image) = target.images.last().map(|image| image.id) {
                debug!(pid, %error, "looked at again");
                self.spawn_rescan(image);
            }
            return;
        }
        if !may_probe {
            if is_first {
                return self.give_up(pid, TargetError::Prefilter(Box::new(error)));
            }
            warn!(pid, %error, "what was mapped later gets no prefilter");
            return;
        }
        if is_late {
            warn!(pid, %error, "an allocator that was mapped later is probed at every call");
        } else {
            info!(pid, %error, "no prefilter: probed at every call");
            target.choice = Choice::Uprobe(Some(error.to_string()));
        }
        self.probe_modules(pid, modules);
    }

    /// Fills up what the stubs take from.
    pub(super) fn refill(&mut self) {
        for target in self.targets.values_mut().filter(|target| target.is_live()) {
            if let Choice::Prefilter(prefilter) = &mut target.choice {
                prefilter.data.tick();
            }
        }
    }

    /// A new interval is in force.
    pub(super) fn set_prefilter_intervals(&mut self, interval_bytes: u64) {
        for target in self.targets.values_mut().filter(|target| target.is_live()) {
            if let Choice::Prefilter(prefilter) = &mut target.choice {
                prefilter.data.set_interval(interval_bytes);
            }
        }
    }
}

impl Target {
    /// These are not probed, nor hooked, after all.
    fn forget_places(&mut self, batch: &SiteBatch) {
        for place in &batch.places {
            self.probed.remove(place);
        }
    }

    /// How stacks are walked through a file, if that is known yet.
    pub(in crate::pipeline) fn table_of(&self, file: (u64, u64)) -> Option<&FileTable> {
        let stubs = match &self.choice {
            Choice::Prefilter(prefilter) => prefilter.tables.get(&file),
            Choice::Open | Choice::Uprobe(_) => None,
        };
        stubs.or_else(|| self.tables.get(&file))
    }

    /// What the stubs have counted, for the present image.
    pub(in crate::pipeline) fn refresh_stubs(&mut self) {
        if let Choice::Prefilter(prefilter) = &self.choice {
            let (totals, stats) = (prefilter.data.totals(), prefilter.data.stats());
            if let Some(image) = self.images.last_mut() {
                image.totals.set_stubs(totals);
                image.stub_losses = StubLosses {
                    unsharded: stats.unsharded,
                    starved: stats.starved,
                    overflowed: stats.overflowed_buckets,
                };
            }
        }
    }

    /// The present image has ended, and its prefilter with it: what is left of that is
    /// to be looked after by the caller.
    pub(in crate::pipeline) fn end_stubs(&mut self) -> Option<Image> {
        self.refresh_stubs();
        if let Some(image) = self.images.last_mut() {
            image.engine = Some(self.choice.engine());
        }
        match std::mem::take(&mut self.choice) {
            Choice::Prefilter(prefilter) => Some(prefilter.image),
            other => {
                self.choice = other;
                None
            }
        }
    }
}

/// A function that is entered by a jump, as it is shown.
fn hooked_site(module: &AllocatorModule, found: &FoundSite) -> ProbeSite {
    // The first instruction stays where it can: what is displaced does not depend on where the
    // function is, but for pages' ends.
    let start = found.file_offset.0;
    let displaced = module
        .code(found)
        .ok()
        .and_then(|code| displace_behind_first(&code, start).ok());
    let entry = displaced.map_or(start, |displaced| displaced.address);
    let offset = entry.saturating_sub(start) as u32;
    ProbeSite {
        module: module.file.path.to_string_lossy().into_owned(),
        function: found.symbol.to_owned(),
        file_offset: found.file_offset.0.saturating_add(offset.into()),
        offset,
        instruction: "jmp".to_owned(),
        emulated: true,
    }
}
