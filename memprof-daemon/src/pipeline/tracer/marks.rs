//! Counting from a moment on: profiles of a window of time, and counters set back.
//!
//! Nothing is ever set back in the books, since blocks of before are freed later. A mark is
//! a copy of all counters, and what is told is their difference to it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Tracer,
    golang::{GoImage, GoTarget},
};
use crate::{
    export::totals::ExactTotals,
    golang::Reading,
    ledger::{StackSnapshot, baseline::Baseline},
    pipeline::image::Image,
    sample::{ImageId, StackId},
};

/// All counters at one moment.
#[derive(Debug)]
pub(in crate::pipeline) struct Mark {
    at: Instant,
    counters: Baseline,
    images: HashMap<ImageId, ImageMark>,
}

#[derive(Debug)]
struct ImageMark {
    totals: Option<ExactTotals>,
    losses: BTreeMap<&'static str, u64>,
    /// What its Go runtime had published.
    go: Option<Arc<Reading>>,
}

impl Mark {
    /// Whether it knows the image: one of the same name that began later is another.
    fn knows(&self, image: &Image) -> bool {
        image.since() <= self.at
    }

    /// Whether it has anything of a process.
    pub(in crate::pipeline) fn has(&self, pid: u32) -> bool {
        self.images.keys().any(|image| image.pid == pid)
    }

    /// What an image's Go runtime had published.
    pub(super) fn go(&self, image: &Image) -> Option<&Arc<Reading>> {
        self.of(image)?.go.as_ref()
    }

    fn of(&self, image: &Image) -> Option<&ImageMark> {
        self.images.get(&image.id).filter(|_| self.knows(image))
    }
}

/// From when on a capture counts.
pub(super) struct Basis<'a> {
    /// Since when allocations are counted, if not from the first on.
    reset: Option<&'a Mark>,
    /// Where the window begins, if it is of one.
    window: Option<&'a Mark>,
}

impl<'a> Basis<'a> {
    pub(super) fn new(reset: Option<&'a Mark>, window: Option<&'a Mark>) -> Self {
        Self {
            // A window's numbers are differences already.
            reset: reset.filter(|_| window.is_none()),
            window,
        }
    }

    pub(super) fn mark(&self) -> Option<&'a Mark> {
        self.window.or(self.reset)
    }

    /// For how long has been counted, of what goes on for `time`.
    pub(super) fn limit(&self, time: Duration) -> Duration {
        self.mark().map_or(time, |mark| time.min(mark.at.elapsed()))
    }

    /// How long the window was.
    pub(super) fn window(&self) -> Option<Duration> {
        self.window.map(|mark| mark.at.elapsed())
    }

    /// Whether the image is over and done with before anything counts. What one held at its
    /// end is told until it is forgotten, only not in a window.
    pub(super) fn is_over(&self, image: &Image) -> bool {
        self.window
            .is_some_and(|mark| image.until().is_some_and(|until| until <= mark.at))
    }

    /// For how long the image was traced while it counted.
    pub(super) fn traced(&self, image: &Image) -> Duration {
        let until = image.until().unwrap_or_else(Instant::now);
        let since = self
            .mark()
            .map_or(image.since(), |mark| image.since().max(mark.at));
        until.saturating_duration_since(since)
    }

    /// The counters of an image's stacks; those without any are left out of a window.
    pub(super) fn counters(
        &self,
        image: &Image,
        mut stacks: Vec<(StackId, StackSnapshot)>,
    ) -> Vec<(StackId, StackSnapshot)> {
        let before = |mark: &'a Mark, stack| {
            let known = mark.knows(image);
            known.then(|| mark.counters.get(image.id, stack)).flatten()
        };
        if let Some(mark) = self.window {
            stacks.retain_mut(|(id, stack)| {
                let before = before(mark, *id).copied().unwrap_or_default();
                let has_changed = stack.counters.has_changed_since(&before);
                stack.counters = stack.counters.change_since(&before);
                has_changed
            });
        } else if let Some(mark) = self.reset {
            for (id, stack) in &mut stacks {
                if let Some(before) = before(mark, *id) {
                    stack.counters = stack.counters.counted_from(before);
                }
            }
        }
        stacks
    }

    /// The exact totals of an image; none if they are not known at both ends.
    pub(super) fn totals(&self, image: &Image, totals: Option<ExactTotals>) -> Option<ExactTotals> {
        match self.mark().and_then(|mark| mark.of(image)) {
            Some(before) => Some(totals?.since(before.totals.as_ref()?)),
            None => totals,
        }
    }

    /// The losses of an image.
    pub(super) fn losses(
        &self,
        image: &Image,
        mut losses: BTreeMap<&'static str, u64>,
    ) -> BTreeMap<&'static str, u64> {
        if let Some(before) = self.mark().and_then(|mark| mark.of(image)) {
            for (cause, number) in &mut losses {
                let before = before.losses.get(cause).copied().unwrap_or_default();
                *number = number.saturating_sub(before);
            }
        }
        losses
    }
}

impl Tracer {
    /// Copies all counters.
    pub(super) fn mark(&mut self) -> Mark {
        self.catch_up();
        let mut images = HashMap::new();
        for target in self.targets.values() {
            let losses = self.losses(target.slot);
            for image in &target.images {
                let mark = ImageMark {
                    totals: image.totals.exact(),
                    losses: image.losses(losses, &self.ledger.tally(image.id)),
                    go: image
                        .go
                        .as_ref()
                        .and_then(GoImage::target)
                        .and_then(GoTarget::last)
                        .cloned(),
                };
                images.insert(image.id, mark);
            }
        }
        Mark {
            at: Instant::now(),
            counters: self.ledger.baseline(),
            images,
        }
    }

    /// Has allocations counted from now on, in profiles.
    pub(super) fn reset(&mut self) -> SystemTime {
        self.reset = Some(Arc::new(self.mark()));
        SystemTime::now()
    }
}
