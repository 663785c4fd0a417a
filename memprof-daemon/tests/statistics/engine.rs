//! How each engine decides which blocks are samples.

use memprof::prefilter::gaps::Gaps;
use memprof_common::{
    random::{Draws, Stream},
    sampler::should_sample,
    totals::{SIZE_CLASSES, size_class},
};

/// CPUs that allocate in turn, or threads.
const LANES: usize = 2;

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Every call is decided by itself.
    Uprobe,
    /// Calls count down a gap, which is sometimes thrown away, and sometimes not there.
    Prefilter,
}

impl Engine {
    pub(crate) const ALL: [Self; 2] = [Self::Uprobe, Self::Prefilter];

    /// Begins to sample.
    pub(crate) fn start(self, seed: u64) -> Sampler {
        Sampler {
            engine: self,
            seed,
            place: 0,
            calls: [[0; SIZE_CLASSES]; LANES],
            // Elsewhere, so that BPF's decisions have other bits.
            gaps: Gaps::new(!seed),
            gaps_taken: 0,
            lanes: [Lane::default(); LANES],
        }
    }
}

/// A thread under the prefilter.
#[derive(Clone, Copy, Default)]
struct Lane {
    countdown: i64,
    /// The gap's interval; 0: there is no gap, and BPF decides.
    interval: u64,
}

/// An engine at work.
pub(crate) struct Sampler {
    engine: Engine,
    seed: u64,
    place: usize,
    calls: [[u64; SIZE_CLASSES]; LANES],
    gaps: Gaps,
    gaps_taken: u64,
    lanes: [Lane; LANES],
}

impl Sampler {
    /// The next call asks for a block. The interval to weigh it with, if it is a sample.
    pub(crate) fn sample(&mut self, size_bytes: u64, interval: u64) -> Option<u64> {
        let lane = self.place / 3 % LANES;
        self.place += 1;
        match self.engine {
            Engine::Uprobe => self.decide(lane, size_bytes, interval).then_some(interval),
            Engine::Prefilter => self.count_down(lane, size_bytes, interval),
        }
    }

    /// As BPF does: by CPU and class, by what each has counted.
    fn decide(&mut self, lane: usize, size_bytes: u64, interval: u64) -> bool {
        let class = size_class(size_bytes);
        let stream = Stream {
            seed: self.seed,
            epoch: 0,
            cpu: lane as u32,
            class,
        };
        let mut draws = Draws::new(stream, self.calls[lane][class]);
        self.calls[lane][class] += 1;
        should_sample(size_bytes, interval, || draws.draw())
    }

    /// As the stubs do.
    fn count_down(&mut self, lane: usize, size_bytes: u64, interval: u64) -> Option<u64> {
        // At first, and as the daemon asks now and then, whatever is left of the gap.
        if self.place % 97 < 2 {
            self.take_gap(lane, interval);
        }
        self.lanes[lane].countdown -= size_bytes.max(1).cast_signed();
        if self.lanes[lane].countdown > 0 {
            return None;
        }
        let decided = self.lanes[lane].interval;
        self.take_gap(lane, interval);
        if decided != 0 {
            return Some(decided);
        }
        self.decide(lane, size_bytes, interval).then_some(interval)
    }

    fn take_gap(&mut self, lane: usize, interval: u64) {
        self.gaps_taken += 1;
        // No gap could say that all blocks are samples, and now and then the ring is empty.
        self.lanes[lane] = if interval <= 1 || self.gaps_taken.is_multiple_of(3) {
            Lane::default()
        } else {
            let gap = self.gaps.draw(interval);
            Lane {
                countdown: gap.bytes.cast_signed(),
                interval: gap.interval_bytes,
            }
        };
    }
}
