//! Reading exact totals at the right time.
//!
//! The totals of image N and of image N + 2 are counted in the same place
//! ([`totals_index`]). When the tracer meets image N + 1 it reads that place: what
//! stands there is the end of N and the beginning of N + 2. That is true unless
//! N + 2 had begun by then, which the reading itself cannot tell, but the ring can:
//! BPF tells of each `execve`, or counts that it could not. So a reading is kept
//! if, with everything that was in the ring taken out of it, no later image is
//! known to have begun; else both images' totals are unknown, and said to be.

use memprof_common::{
    counters::DropReason,
    totals::{TargetTotals, totals_index},
};
use tracing::{debug, warn};

use super::Tracer;
use crate::{
    pipeline::{target::Target, totals::sum},
    sample::ImageId,
};

/// Images that follow one another faster than this many readings are confirmed
/// wait for the next time.
const MAX_CONFIRMATIONS: u32 = 8;

impl Tracer {
    /// What stands in the place of an image's totals.
    fn read_totals(&self, slot: u16, epoch: u32) -> Option<TargetTotals> {
        match self
            .totals_map
            .get(&totals_index(u32::from(slot), epoch), 0)
        {
            Ok(values) => Some(sum(values.iter())),
            Err(error) => {
                warn!(%error, "cannot read the exact totals");
                None
            }
        }
    }

    /// The number of the image that the target runs, as far as BPF has told or
    /// counted that it could not.
    fn epoch_begun(&self, target: &Target) -> u32 {
        let lost = self.losses(target.slot);
        let lost = lost.get(DropReason::ExecRingFull as usize).copied();
        let lost = u32::try_from(lost.unwrap_or(0)).unwrap_or(u32::MAX);
        target.execs_told.saturating_add(lost)
    }

    /// Reads the totals of all images that run. To be preceded by draining the
    /// ring.
    pub(super) fn refresh_totals(&mut self) {
        let running: Vec<u32> = self
            .targets
            .iter()
            .filter(|(_, target)| target.is_live())
            .map(|(&pid, _)| pid)
            .collect();
        for pid in running {
            self.refresh_totals_of(pid);
        }
    }

    /// Reads the totals of a target's present image.
    pub(super) fn refresh_totals_of(&mut self, pid: u32) {
        if let Some(target) = self.targets.get_mut(&pid) {
            target.refresh_stubs();
        }
        let Some(target) = self.targets.get(&pid) else {
            return;
        };
        let Some(epoch) = target.images.last().map(|image| image.id.epoch) else {
            return;
        };
        let reading = self
            .read_totals(target.slot, epoch)
            .filter(|_| self.epoch_begun(target) <= epoch.saturating_add(1));
        if let Some(image) = self.targets.get_mut(&pid).and_then(Target::current) {
            image.totals.set_last(reading);
        }
    }

    /// Ends the totals of the present image, since `next` has been met; returns
    /// what the totals of `next` begin with.
    pub(super) fn turn_totals(&mut self, next: ImageId) -> Option<TargetTotals> {
        let target = self.targets.get(&next.pid)?;
        let reading = self.read_totals(target.slot, next.epoch.wrapping_add(1));
        let target = self.targets.get_mut(&next.pid)?;
        let base = std::mem::replace(&mut target.next_totals_base, reading);
        let old = target.current()?;
        if old.id.epoch.wrapping_add(1) == next.epoch {
            old.totals.set_last(reading);
            self.unconfirmed_totals.push(next);
            return base;
        }
        // An image in between was missed, and has used one of the places.
        debug!(
            pid = next.pid,
            "an image was missed; exact totals are unknown"
        );
        old.totals.set_last(None);
        self.unconfirmed_totals.push(next);
        None
    }

    /// Keeps the readings that [`Self::turn_totals`] made, or drops those that
    /// were made too late.
    pub(super) fn confirm_totals(&mut self) {
        for _ in 0..MAX_CONFIRMATIONS {
            let unconfirmed = std::mem::take(&mut self.unconfirmed_totals);
            if unconfirmed.is_empty() {
                return;
            }
            self.drain_ring();
            for met in unconfirmed {
                self.confirm_totals_at(met);
            }
        }
    }

    fn confirm_totals_at(&mut self, met: ImageId) {
        let Some(target) = self.targets.get(&met.pid) else {
            return;
        };
        if self.epoch_begun(target) <= met.epoch {
            return;
        }
        debug!(
            pid = met.pid,
            epoch = met.epoch,
            "exact totals were read too late"
        );
        let Some(target) = self.targets.get_mut(&met.pid) else {
            return;
        };
        for image in &mut target.images {
            if image.id.epoch.wrapping_add(1) == met.epoch {
                image.totals.set_last(None);
            } else if image.id.epoch == met.epoch.wrapping_add(1) {
                image.totals.set_base(None);
            }
        }
        if target.images.last().is_some_and(|image| image.id == met) {
            target.next_totals_base = None;
        }
    }
}
