//! The estimates as estimates: sampler, weights, books and intervals together,
//! over repetitions with fixed seeds. Both engines are held to the same.
//!
//! `cargo test -p memprof-daemon --test statistics -- --nocapture` prints the
//! tables of `docs/sampling.md`, and fails if they are others than printed there.

#[path = "statistics/engine.rs"]
mod engine;

use engine::Engine;
use memprof::{
    interval::{Interval, interval_95},
    ledger::{Ledger, StackCounters},
    sample::{AllocKey, AllocSample, FreeSample, ImageId, StackId},
};
use memprof_common::{function::Function, stack::StackKey};

/// Mean gap between samples, but for single bytes.
const INTERVAL: u64 = 4096;

/// Repetitions of each case: the share of intervals that hold the truth is then
/// known to two thirds of a percent.
const REPETITIONS: u32 = 1200;

/// As [`REPETITIONS`], where that share is held to two percent in both engines: then it
/// is known to a third of a percent.
const COVER_REPETITIONS: u32 = 4000;

/// How far a mean may be from what it estimates. With 30 means one run in
/// 50,000 would fail by chance, if seeds were not fixed.
const SIGMAS: f64 = 5.0;

const SAMPLING_MD: &str = include_str!("../../docs/sampling.md");

/// Xorshift64*, for what is not the sampler's: sizes, and seeds.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15 ^ seed << 17)
    }

    fn draw(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        (f64::from(self.draw()) + 1.0) / 2_f64.powi(32)
    }
}

/// Sizes that a stack asks for, every second of them freed.
struct Case {
    name: &'static str,
    interval: u64,
    sizes: Vec<u64>,
}

fn probability(size: u64, interval: u64) -> f64 {
    -(-(size.max(1) as f64) / interval as f64).exp_m1()
}

impl Case {
    /// As many sizes as make `samples` on average.
    fn new(
        name: &'static str,
        interval: u64,
        samples: f64,
        mut size: impl FnMut(usize) -> u64,
    ) -> Self {
        let mut sizes = Vec::new();
        let mut expected = 0.0;
        while expected < samples {
            let size = size(sizes.len());
            expected += probability(size, interval);
            sizes.push(size);
        }
        Self {
            name,
            interval,
            sizes,
        }
    }

    /// Bytes, or with `inuse` those of the blocks that are not freed.
    fn true_bytes(&self, inuse: bool) -> f64 {
        let sizes = self.sizes.iter().skip(usize::from(inuse));
        let step = if inuse { 2 } else { 1 };
        sizes.step_by(step).map(|&size| size as f64).sum()
    }

    /// Variances of the estimates of bytes and of objects.
    fn true_variances(&self) -> (f64, f64) {
        let (mut bytes, mut objects) = (0.0, 0.0);
        for &size in &self.sizes {
            let p = probability(size, self.interval);
            bytes += (size as f64).powi(2) * (1.0 - p) / p;
            objects += (1.0 - p) / p;
        }
        (bytes, objects)
    }

    /// What the books say after all of it has happened.
    fn run(&self, engine: Engine, random: &mut Random) -> StackCounters {
        let mut ledger = Ledger::new();
        let seed = u64::from(random.draw()) << 32 | u64::from(random.draw());
        let mut sampler = engine.start(seed);
        for (place, &size_bytes) in self.sizes.iter().enumerate() {
            let Some(sample_interval_bytes) = sampler.sample(size_bytes, self.interval) else {
                continue;
            };
            let sample = AllocSample {
                key: AllocKey {
                    image: ImageId { pid: 1, epoch: 0 },
                    addr: place as u64 + 1,
                },
                timestamp_ns: place as u64,
                size_bytes,
                sample_interval_bytes,
                stack: StackId::first(StackKey::UNKNOWN),
                function: Function::Malloc,
                restored: false,
            };
            ledger.alloc(&sample);
            if place % 2 == 0 {
                ledger.free(&FreeSample {
                    key: sample.key,
                    alloc_timestamp_ns: sample.timestamp_ns,
                });
            }
        }
        let images = ledger.snapshot(|_| true).images;
        images
            .first()
            .and_then(|image| image.stacks.first())
            .map_or_else(StackCounters::default, |(_, stack)| stack.counters)
    }
}

/// Power law with exponent `alpha`: from 16 bytes to 1 MiB, no mean to speak of.
fn power_law(alpha: f64) -> impl FnMut(usize) -> u64 {
    let mut random = Random::new(77);
    move |_| {
        let size = 16.0 * random.uniform().powf(-1.0 / alpha);
        size.min(1_048_576.0) as u64
    }
}

/// Blocks far below the interval, and `few` in a thousand far above it.
fn bimodal(few: usize) -> impl FnMut(usize) -> u64 {
    move |place| if place % 1000 < few { 1 << 20 } else { 64 }
}

/// The distributions, each with `samples` samples on average.
fn cases(samples: f64) -> Vec<Case> {
    vec![
        Case::new("1 byte", 64, samples, |_| 1),
        Case::new("constant, R / 40", INTERVAL, samples, |_| 100),
        Case::new("constant, R", INTERVAL, samples, |_| INTERVAL),
        Case::new("power law, exponent 1.2", INTERVAL, samples, power_law(1.2)),
        Case::new("power law, exponent 0.9", INTERVAL, samples, power_law(0.9)),
        Case::new("bimodal, R / 64 and 256 R", INTERVAL, samples, bimodal(2)),
        Case::new("mixed, 0 bytes to 300 R", INTERVAL, samples, |place| {
            [0, 1, 16, 48, 300, 4096, 10_000][place % 7] << (place % 500 / 498 * 7)
        }),
    ]
}

/// How many of many intervals hold the truth.
#[derive(Default)]
struct Coverage {
    all: u32,
    held: u32,
}

impl Coverage {
    fn count(&mut self, truth: f64, interval: Interval) {
        self.all += 1;
        // A sum of a million numbers is right to 10 digits.
        let slack = truth * 1e-9;
        if interval.low <= truth + slack && truth - slack <= interval.high {
            self.held += 1;
        }
    }

    fn percent(&self) -> f64 {
        f64::from(self.held) * 100.0 / f64::from(self.all)
    }
}

/// Coverages of bytes allocated, of bytes in use, and of bytes allocated where
/// there was a sample at all.
fn coverages(engine: Engine, case: &Case, seed: u64, repetitions: u32) -> [f64; 3] {
    let mut random = Random::new(seed);
    let mut coverages: [Coverage; 3] = Default::default();
    for _ in 0..repetitions {
        let counters = case.run(engine, &mut random);
        // A stack without samples is in no profile; its interval is the one of
        // a process without samples.
        let coarsest = counters.coarsest_interval_bytes.max(case.interval);
        let alloc = interval_95(counters.alloc_bytes, counters.alloc_variance, coarsest);
        let inuse = interval_95(counters.inuse_bytes(), counters.inuse_variance(), coarsest);
        coverages[0].count(case.true_bytes(false), alloc);
        coverages[1].count(case.true_bytes(true), inuse);
        if counters.samples > 0 {
            coverages[2].count(case.true_bytes(false), alloc);
        }
    }
    coverages.map(|coverage| coverage.percent())
}

/// Prints a row, and checks that the document has it.
#[track_caller]
fn row(cells: &[String]) {
    let row = format!("| {} |", cells.join(" | "));
    println!("{row}");
    assert!(
        SAMPLING_MD.contains(&row),
        "docs/sampling.md does not have this row: {row}"
    );
}

/// Check that bytes, objects and the variance of bytes are estimated without
/// bias, for every distribution.
#[test]
fn estimates_are_unbiased() {
    for engine in Engine::ALL {
        estimates_of(engine);
    }
}

fn estimates_of(engine: Engine) {
    for (number, case) in cases(30.0).iter().enumerate() {
        let mut random = Random::new(100 + number as u64);
        let repetitions = f64::from(REPETITIONS);
        let (mut bytes, mut objects, mut inuse) = (0.0, 0.0, 0.0);
        let (mut variance, mut variance_squared) = (0.0, 0.0);
        for _ in 0..REPETITIONS {
            let counters = case.run(engine, &mut random);
            bytes += counters.alloc_bytes / repetitions;
            objects += counters.alloc_objects / repetitions;
            inuse += counters.inuse_bytes() / repetitions;
            variance += counters.alloc_variance / repetitions;
            variance_squared += counters.alloc_variance.powi(2) / repetitions;
        }
        let (bytes_variance, objects_variance) = case.true_variances();
        let own_variance = variance_squared - variance.powi(2);
        for (what, mean, truth, its_variance) in [
            ("bytes", bytes, case.true_bytes(false), bytes_variance),
            (
                "objects",
                objects,
                case.sizes.len() as f64,
                objects_variance,
            ),
            // Half of the blocks: no more variance than all.
            ("bytes in use", inuse, case.true_bytes(true), bytes_variance),
            ("variance", variance, bytes_variance, own_variance),
        ] {
            let sigma = (its_variance / repetitions).sqrt();
            assert!(
                (mean - truth).abs() <= SIGMAS * sigma,
                "{engine:?}, {}: mean {what} {mean} is {:.1} sigmas from {truth}",
                case.name,
                (mean - truth) / sigma
            );
        }
    }
}

/// Check that the intervals hold the truth in 93% to 97% of the cases, for bytes
/// allocated and in use, for every distribution.
#[test]
fn intervals_cover() {
    for (number, case) in cases(50.0).iter().enumerate() {
        let mut cells = vec![case.name.to_owned()];
        for engine in Engine::ALL {
            let [alloc, inuse, _] = coverages(engine, case, 200 + number as u64, COVER_REPETITIONS);
            for (what, coverage) in [("allocated", alloc), ("in use", inuse)] {
                assert!(
                    (93.0..=97.0).contains(&coverage),
                    "{engine:?}, {}, {what}: {coverage}%",
                    case.name
                );
                cells.push(format!("{coverage:.1}%"));
            }
        }
        row(&cells);
    }
}

/// Check what the intervals hold where there are few samples: they never claim
/// much more than they hold, and where blocks are large they hold more.
#[test]
fn intervals_of_few_samples() {
    for (number, &samples) in [1.0, 3.0, 5.0, 10.0].iter().enumerate() {
        let mut low_high = [[100.0_f64, 0.0_f64]; 2];
        for (place, case) in cases(samples).iter().enumerate() {
            let seed = 300 + 10 * number as u64 + place as u64;
            let [alloc, _, seen] = coverages(Engine::Uprobe, case, seed, REPETITIONS);
            for (range, coverage) in low_high.iter_mut().zip([alloc, seen]) {
                *range = [range[0].min(coverage), range[1].max(coverage)];
            }
        }
        let cell = |[low, high]: [f64; 2]| format!("{low:.1}% to {high:.1}%");
        row(&[format!("{samples}"), cell(low_high[0]), cell(low_high[1])]);
        let least = if samples < 3.0 { 85.0 } else { 88.0 };
        assert!(low_high[0][0] >= least, "{samples} samples: {low_high:?}");
    }
}

/// Check that large blocks, which are nearly always sampled, are never missed by
/// an interval, and that at an interval of 1 it has no width.
#[test]
fn certain_and_exact() {
    let large = Case::new("64 R", INTERVAL, 5.0, |_| 64 * INTERVAL);
    let exact = Case::new("exact", 1, 100.0, |place| place as u64);
    for engine in Engine::ALL {
        assert_eq!(
            coverages(engine, &large, 400, REPETITIONS)[0],
            100.0,
            "{engine:?}"
        );
        let counters = exact.run(engine, &mut Random::new(1));
        let interval = interval_95(counters.alloc_bytes, counters.alloc_variance, 1);
        assert_eq!(
            (interval.low, interval.high),
            (5050.0, 5050.0),
            "{engine:?}"
        );
    }
}
