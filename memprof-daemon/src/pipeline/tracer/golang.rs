//! Go programs: their heap profiles are read every few seconds, and before anyone is told of
//! them. What was read last is what stays of a program that has ended.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::{
    Command, Tracer,
    marks::{Basis, Mark},
};
use crate::{
    export::profile::GoFacts,
    golang::{Bucket, FoundGo, GoError, GoSource, Reading, counters},
    ledger::StackCounters,
    pipeline::{capture::GoCapture, image::Image, stats::GoStatus},
    process::info::ProcessInfo,
    sample::ImageId,
};

/// From one reading to the next at least.
const READ_EVERY: Duration = Duration::from_secs(1);

/// Reading takes one part in so many of a processor's time at most.
const SHARE: u32 = 100;

/// Where many programs are read, all readings together take one part in so many.
const SHARE_OF_ALL: u32 = 20;

/// Readings of the same content after which only a change of the cycle has it read again, ...
const SAME: u32 = 3;

/// ... or so many rounds without one.
const LOOKS: u32 = 10;

/// The Go program of an image.
#[derive(Debug)]
pub(in crate::pipeline) enum GoImage {
    /// It can be read.
    Read(GoTarget),
    /// It cannot; the image's calls of `malloc` are looked at all the same, if it makes any.
    Refused {
        /// The version of the Go that built it.
        version: String,
        /// Why.
        reason: String,
    },
}

/// A Go program that is read.
#[derive(Debug)]
pub(in crate::pipeline) struct GoTarget {
    source: Arc<GoSource>,
    /// As it was found.
    first: Option<Arc<Reading>>,
    last: Option<Arc<Reading>>,
    /// Bytes allocated in `first`.
    first_bytes: f64,
    /// When its cycle was first seen to be what it is in `last`, if it was another before.
    published: Option<Instant>,
    /// All of `last`.
    sum: StackCounters,
    /// Why the last try came to nothing.
    failure: Option<String>,
    next: Instant,
    is_reading: bool,
    /// Readings of the same content that came one after the other.
    same: u32,
    /// Rounds in which nothing but the cycle was read.
    looks: u32,
}

/// A reading has been tried.
pub(in crate::pipeline) struct GoRead {
    image: ImageId,
    result: Result<Option<Reading>, GoError>,
    /// Dropped when it is booked.
    _done: Option<mpsc::Sender<()>>,
}

impl GoImage {
    pub(in crate::pipeline) fn new(found: FoundGo) -> Self {
        match found.profile {
            Ok((source, first)) => {
                let mut target = GoTarget {
                    source,
                    first: None,
                    last: None,
                    first_bytes: 0.0,
                    published: None,
                    sum: StackCounters::default(),
                    failure: None,
                    next: Instant::now() + READ_EVERY,
                    is_reading: false,
                    same: 0,
                    looks: 0,
                };
                if let Some(first) = first {
                    target.first = Some(Arc::new(first.clone()));
                    target.book(first);
                    target.first_bytes = target.sum.alloc_bytes;
                }
                Self::Read(target)
            }
            Err(error) => Self::Refused {
                version: found.version,
                reason: error.to_string(),
            },
        }
    }

    pub(in crate::pipeline) const fn target(&self) -> Option<&GoTarget> {
        match self {
            Self::Read(target) => Some(target),
            Self::Refused { .. } => None,
        }
    }

    /// What has it read once more.
    pub(super) fn last_reading(
        &self,
        image: ImageId,
    ) -> Option<impl FnOnce() -> GoRead + Send + 'static> {
        let source = Arc::clone(self.target()?.source());
        Some(move || GoRead {
            image,
            result: source.read(),
            _done: None,
        })
    }

    /// What is told of it wherever it is.
    pub(super) fn status(&self, ended: Option<Instant>) -> GoStatus {
        match self {
            Self::Read(target) => target.status(ended),
            Self::Refused { version, reason } => GoStatus {
                version: version.clone(),
                mem_profile_rate: None,
                age_s: None,
                published_s: None,
                refusal: Some(reason.clone()),
                failure: None,
            },
        }
    }

    /// Why it is not read, if it is not.
    pub(in crate::pipeline) fn refusal(&self) -> Option<&str> {
        match self {
            Self::Read(_) => None,
            Self::Refused { reason, .. } => Some(reason),
        }
    }
}

impl Image {
    /// It is the Go program that was found in it, if one was.
    pub(in crate::pipeline) fn set_go(&mut self, found: Option<FoundGo>) {
        self.go = found.filter(|_| !self.is_copy).map(GoImage::new);
    }

    /// Whether it is a Go program that calls no allocator.
    pub(in crate::pipeline) const fn is_only_go(&self) -> bool {
        self.go.is_some() && !self.has_allocator
    }

    /// Whether it is one of which nothing can be read.
    pub(in crate::pipeline) fn is_refused(&self) -> bool {
        let refusal = self.go.as_ref().and_then(GoImage::refusal);
        refusal.is_some() && !self.has_allocator
    }

    /// Whether it has ended before what Go has built in it could be read.
    pub(in crate::pipeline) const fn has_missed_go(&self) -> bool {
        self.maps_go && self.go.is_none()
    }

    /// Whether it is what a process still runs in which something of Go's was found, and that is
    /// not known of it.
    pub(in crate::pipeline) fn lacks_go(&self, now: &ProcessInfo) -> bool {
        let is_it = self.info.start_ticks == now.start_ticks && self.info.exe == now.exe;
        is_it && self.go.is_none() && !self.is_copy
    }
}

impl GoTarget {
    pub(in crate::pipeline) const fn source(&self) -> &Arc<GoSource> {
        &self.source
    }

    /// What all stacks have together.
    pub(in crate::pipeline) const fn sum(&self) -> &StackCounters {
        &self.sum
    }

    /// Bytes allocated since it was found.
    pub(in crate::pipeline) fn bytes_since_found(&self) -> f64 {
        (self.sum.alloc_bytes - self.first_bytes).max(0.0)
    }

    pub(super) const fn last(&self) -> Option<&Arc<Reading>> {
        self.last.as_ref()
    }

    /// As it was when it was found: what had happened before is nothing of what happens.
    pub(super) const fn first(&self) -> Option<&Arc<Reading>> {
        self.first.as_ref()
    }

    fn book(&mut self, reading: Reading) {
        if self.last.as_ref().is_some_and(|last| last.at > reading.at) {
            return;
        }
        // The lowest bit says whether the cycle was added to what is published.
        let cycle_before = self.last.as_ref().map(|last| last.cycle >> 1);
        if cycle_before.is_some_and(|before| before != reading.cycle >> 1) {
            self.published = Some(reading.at);
        }
        let is_same = self.last.as_ref().is_some_and(|last| {
            last.cycle == reading.cycle
                && !reading.is_early
                && reading.is_settled
                && last.counts == reading.counts
        });
        self.same = if is_same { self.same + 1 } else { 0 };
        self.looks = 0;
        self.sum = StackCounters::default();
        for (_, counters) in stacks(&reading) {
            self.sum += counters;
        }
        self.failure = None;
        self.last = Some(Arc::new(reading));
    }

    fn status(&self, ended: Option<Instant>) -> GoStatus {
        let until = ended.unwrap_or_else(Instant::now);
        let seconds = |since: Instant| until.saturating_duration_since(since).as_secs_f64();
        GoStatus {
            version: self.source.program().version().to_owned(),
            mem_profile_rate: self.last().map(|last| last.rate_bytes),
            age_s: self.last().map(|last| seconds(last.at)),
            published_s: self.published.map(seconds),
            refusal: None,
            failure: self.failure.clone(),
        }
    }

    /// What is told of it in a profile.
    pub(super) fn facts(&self, ended: Option<Instant>, is_since_start: bool) -> GoFacts {
        let last = self.last.as_deref();
        let until = ended.unwrap_or_else(Instant::now);
        GoFacts {
            version: self.source.program().version().to_owned(),
            rate_bytes: last.map(|last| last.rate_bytes),
            rate_changed: last.is_some_and(|last| last.rate_changed),
            interval_bytes: last.map_or(0, |last| last.interval_bytes),
            age: last.map(|last| until.saturating_duration_since(last.at)),
            has_collected: last.is_some_and(|last| !last.is_early),
            is_since_start,
            is_settled: last.is_none_or(|last| last.is_settled),
            failure: self.failure.clone(),
        }
    }
}

/// The counters of each bucket.
fn stacks(reading: &Reading) -> impl Iterator<Item = (&Arc<Bucket>, StackCounters)> {
    reading.counts.iter().map(|count| {
        let counters = counters(
            count.bucket.size_bytes,
            count.allocs,
            count.frees,
            reading.interval_bytes,
        );
        (&count.bucket, counters)
    })
}

/// The counters of each bucket that has any; with a mark, counted from there on or, if it is
/// of a window, what has changed since.
fn counters_since(
    target: &GoTarget,
    image: &Image,
    mark: Option<&Mark>,
    is_window: bool,
) -> Vec<(Arc<Bucket>, StackCounters)> {
    let Some(last) = target.last() else {
        return Vec::new();
    };
    let before = mark.map(|mark| mark.go(image).or_else(|| target.first()));
    let before: std::collections::HashMap<u64, StackCounters> = before
        .flatten()
        .map(|before| {
            stacks(before)
                .map(|(bucket, counters)| (bucket.address, counters))
                .collect()
        })
        .unwrap_or_default();
    stacks(last)
        .filter_map(|(bucket, now)| {
            let then = before.get(&bucket.address).copied().unwrap_or_default();
            let counters = match mark {
                None => now,
                Some(_) if is_window => {
                    now.has_changed_since(&then).then_some(())?;
                    now.change_since(&then)
                }
                Some(_) => now.counted_from(&then),
            };
            let has_any = is_window || now.samples > 0;
            has_any.then(|| (Arc::clone(bucket), counters))
        })
        .collect()
}

impl Basis<'_> {
    /// A Go program's profile.
    pub(super) fn go(&self, target: &GoTarget, image: &Image) -> GoCapture {
        GoCapture {
            source: Arc::clone(&target.source),
            facts: target.facts(image.until(), self.mark().is_none()),
            stacks: counters_since(target, image, self.mark(), self.window().is_some()),
        }
    }
}

impl Tracer {
    /// Has those read that were not for some time.
    pub(super) fn read_go_in_turn(&mut self) {
        let now = Instant::now();
        let mut due = Vec::new();
        // If each was read once that is.
        let mut round = Duration::ZERO;
        for target in self.targets.values_mut().filter(|target| target.is_live()) {
            let Some(image) = target.images.last_mut() else {
                continue;
            };
            if let Some(GoImage::Read(go)) = &image.go {
                let is_quiet = go.same >= SAME;
                let last = go.last().filter(|_| !is_quiet);
                round += last.map_or(Duration::ZERO, |last| last.took);
            }
            if let Some(GoImage::Read(go)) = &mut image.go
                && !go.is_reading
                && go.next <= now
            {
                go.is_reading = true;
                let is_quiet = go.same >= SAME && go.looks < LOOKS;
                let look = is_quiet.then(|| go.last.clone()).flatten();
                due.push((image.id, Arc::clone(&go.source), look));
            }
        }
        self.go_rest = round * SHARE_OF_ALL;
        for (image, source, look) in due {
            self.spawn_job(move || {
                let result = match look {
                    Some(last) if source.is_unchanged(&last) => Ok(None),
                    _ => source.read(),
                };
                Command::GoRead(Box::new(GoRead {
                    image,
                    result,
                    _done: None,
                }))
            });
        }
    }

    /// Has one process's read, or all; `done` is dropped when they are booked.
    pub(super) fn read_go_now(&self, pid: Option<u32>, done: &mpsc::Sender<()>) {
        for (_, target) in self
            .targets
            .iter()
            .filter(|(other, target)| pid.is_none_or(|pid| pid == **other) && target.is_live())
        {
            let Some(image) = target.images.last() else {
                continue;
            };
            let Some(go) = image.go.as_ref().and_then(GoImage::target) else {
                continue;
            };
            let (image, source, done) = (image.id, Arc::clone(&go.source), done.clone());
            self.spawn_job(move || {
                Command::GoRead(Box::new(GoRead {
                    image,
                    result: source.read(),
                    _done: Some(done),
                }))
            });
        }
    }

    /// A reading has come.
    pub(super) fn go_read(&mut self, read: GoRead) {
        let pid = read.image.pid;
        let image = self.targets.get_mut(&pid).and_then(|target| {
            target
                .images
                .iter_mut()
                .find(|image| image.id == read.image)
        });
        let Some(image) = image else {
            return;
        };
        let has_ended = image.ended();
        let all_rest = self.go_rest;
        let Some(GoImage::Read(go)) = &mut image.go else {
            return;
        };
        go.is_reading = false;
        let mut rest = READ_EVERY.max(all_rest);
        match read.result {
            Ok(Some(reading)) => {
                rest = rest.max(reading.took * SHARE);
                go.book(reading);
            }
            // As it was, or it has not begun.
            Ok(None) => go.looks += 1,
            // The last reading stays. Of a process that is ending nothing can be read.
            Err(error) if has_ended => debug!(pid, %error, "the Go program has ended"),
            Err(error) => {
                let message = error.to_string();
                if go.failure.as_ref() != Some(&message) && !matches!(error, GoError::Memory(_)) {
                    warn!(pid, %error, "cannot read the Go program's profile");
                }
                go.failure = Some(message);
            }
        }
        go.next = Instant::now() + rest;
    }

    /// Lets go of the memory of a program that has ended.
    pub(super) fn end_go(image: &Image) {
        if let Some(go) = image.go.as_ref().and_then(GoImage::target) {
            go.source.close();
        }
    }
}
