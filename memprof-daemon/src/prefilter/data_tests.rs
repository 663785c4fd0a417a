use std::{
    io::Write as _,
    os::unix::fs::MetadataExt as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use memprof_common::{
    prefilter::{
        ASLEEP, ASLEEP_LIMIT, DATA_MAGIC, HEADER_CREDIT, HEADER_GENERATION, HEADER_MAGIC,
        HEADER_RING_HEAD, HEADER_RING_TAIL, HEADER_STARVED, REDRAW, REDRAW_LIMIT, RING_ENTRIES,
        RING_ENTRY_BYTES, SHARD_COUNTDOWN, SHARD_GENERATION, SHARD_INTERVAL,
    },
    random::{Draws, Stream},
    sampler::should_sample,
    totals::size_class,
};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::weight::unbias;

const GEOMETRY: Geometry = Geometry {
    shards: 256,
    bucket_bits: 14,
};

/// How far a mean may be from what it estimates. Seeds are fixed.
const SIGMAS: f64 = 5.0;

fn memfd(flags: MemfdFlags, bytes: usize) -> File {
    let file = File::from(memfd_create("memprof-test", flags).unwrap());
    file.set_len(bytes as u64).unwrap();
    file
}

fn data_at(offset: usize) -> (File, SharedData) {
    let file = memfd(MemfdFlags::ALLOW_SEALING, offset + GEOMETRY.shared_bytes());
    let data = SharedData::new(&file, offset as u64, GEOMETRY).unwrap();
    (file, data)
}

fn data() -> (File, SharedData) {
    data_at(0)
}

/// A thread of the target, as far as decisions go: what the stubs do, step by step.
struct Thread<'a> {
    shared: &'a Shared,
    shard: usize,
    taken: u64,
    /// BPF's: bits for what is undecided.
    random: Bits,
}

/// Random bits that are not those of the gaps.
struct Bits(u64);

impl Bits {
    fn draw(&mut self) -> u32 {
        let stream = Stream {
            seed: 0x5eed,
            epoch: 0,
            cpu: 1,
            class: 1,
        };
        self.0 += 1;
        Draws::new(stream, self.0).draw()
    }
}

impl<'a> Thread<'a> {
    fn new(shared: &'a Shared, number: usize) -> Self {
        let shard = GEOMETRY.shard_offset(number);
        shared.store(shard + SHARD_COUNTDOWN, REDRAW.cast_unsigned());
        Self {
            shared,
            shard,
            taken: 0,
            random: Bits((number as u64) << 32),
        }
    }

    fn countdown(&self) -> i64 {
        self.shared.load(self.shard + SHARD_COUNTDOWN).cast_signed()
    }

    fn subtract(&self, bytes: u64) -> i64 {
        let left = self.countdown() - bytes.cast_signed();
        let place = self.shard + SHARD_COUNTDOWN;
        self.shared.store(place, left.cast_unsigned());
        left
    }

    fn take_gap(&mut self) {
        let shared = self.shared;
        let generation = shared.load(HEADER_GENERATION);
        shared.store(self.shard + SHARD_GENERATION, generation);
        let (gap, interval) = loop {
            let head = shared.load(HEADER_RING_HEAD);
            if head == shared.load(HEADER_RING_TAIL) {
                let credit = shared.word(HEADER_CREDIT).unwrap();
                if credit.fetch_sub(1, Ordering::AcqRel).cast_signed() > 0 {
                    break (0, 0);
                }
                let starved = shared.word(HEADER_STARVED).unwrap();
                starved.fetch_add(1, Ordering::AcqRel);
                break (ASLEEP.cast_unsigned(), 0);
            }
            let entry = GEOMETRY.ring_offset() + (head as usize % RING_ENTRIES) * RING_ENTRY_BYTES;
            let found = (shared.load(entry), shared.load(entry + 8));
            let word = shared.word(HEADER_RING_HEAD).unwrap();
            let taken = word.compare_exchange(head, head + 1, Ordering::AcqRel, Ordering::Relaxed);
            if taken.is_ok() {
                self.taken += 1;
                break found;
            }
        };
        shared.store(self.shard + SHARD_INTERVAL, interval);
        shared.store(self.shard + SHARD_COUNTDOWN, gap);
    }

    /// Allocates; the interval of the sample, if it is one. `in_force` is what BPF knows.
    fn call(&mut self, size_bytes: u64, in_force: u64) -> Option<u64> {
        if self.countdown() <= REDRAW_LIMIT {
            self.take_gap();
        }
        if self.subtract(size_bytes.max(1)) > 0 {
            return None;
        }
        let interval = self.shared.load(self.shard + SHARD_INTERVAL);
        self.take_gap();
        if interval != 0 {
            return Some(interval);
        }
        should_sample(size_bytes, in_force, || self.random.draw()).then_some(in_force)
    }
}

/// Check that a new target gets its gaps, credits and generation, and that what a former
/// daemon has left is gone on with.
#[test]
fn starts() {
    let (file, mut first) = data_at(3 * 4096);
    first.start(4096, 1);
    assert_eq!(first.shared.load(HEADER_MAGIC), DATA_MAGIC);
    for (generation, tail) in [(1, RING_ENTRIES), (2, 2 * RING_ENTRIES)] {
        let shared = &first.shared;
        assert_eq!(shared.load(HEADER_GENERATION), generation);
        assert_eq!(shared.load(HEADER_RING_TAIL), tail as u64);
        assert_eq!(shared.load(HEADER_RING_HEAD), (tail - RING_ENTRIES) as u64);
        assert!(shared.load(HEADER_CREDIT) > 0);
        for entry in 0..RING_ENTRIES {
            let place = GEOMETRY.ring_offset() + entry * RING_ENTRY_BYTES;
            assert!(shared.load(place) >= 1);
            assert_eq!(shared.load(place + 8), 4096);
        }
        first = SharedData::new(&file, 3 * 4096, GEOMETRY).unwrap();
        first.start(4096, 2);
    }
    assert_eq!(first.stats(), SharedStats::default());
}

/// Check that the file must be long enough, and can and must be sealed against becoming
/// shorter: or the target could kill the daemon.
#[test]
fn file_stays() {
    let (file, data) = data();
    assert!(file.set_len(4096).is_err());
    // To grow it may, and to be mapped twice.
    let longer = 2 * GEOMETRY.shared_bytes() as u64;
    file.set_len(longer).unwrap();
    SharedData::new(&file, GEOMETRY.shared_bytes() as u64, GEOMETRY).unwrap();
    assert!(SharedData::new(&file, 4096 + longer / 2, GEOMETRY).is_err());
    assert!(SharedData::new(&file, u64::MAX, GEOMETRY).is_err());
    drop(data);
    let unsealed = memfd(MemfdFlags::empty(), GEOMETRY.shared_bytes());
    assert!(SharedData::new(&unsealed, 0, GEOMETRY).is_err());
}

/// Check that totals are summed over the shards, each size in its class, when frees of one
/// are below zero, and that a reader reads them when all else is gone.
#[test]
fn totals_are_sums() {
    let (file, data) = data();
    assert_eq!(data.totals(), TargetTotals::default());
    let mut expected = TargetTotals::default();
    for (shard, frees) in [(0, 5_i64), (77, -3), (255, 40)] {
        let place = GEOMETRY.shard_offset(shard);
        let add = |at: usize, amount: u64| {
            let old = data.shared.load(place + at);
            data.shared.store(place + at, old.wrapping_add(amount));
        };
        add(SHARD_FREES, frees.cast_unsigned());
        for bits in 0..=64_u32 {
            let size = u64::MAX.checked_shr(64 - bits).unwrap_or(0);
            let calls = 1 + u64::from(bits);
            let zeros = size.leading_zeros() as usize;
            add(SHARD_CALLS + 8 * zeros, calls);
            add(SHARD_BYTES_ASKED, size >> 20);
            expected.alloc_calls[size_class(size)] += calls;
            expected.alloc_bytes = expected.alloc_bytes.wrapping_add(size >> 20);
        }
    }
    expected.free_calls = 42;
    assert_eq!(data.totals(), expected);
    let reader = data.reader();
    drop((file, data));
    assert_eq!(reader.read(), expected);
}

/// Check that looking at shards and buckets that no thread has used takes no memory.
#[test]
fn looks_take_no_memory() {
    let (file, mut data) = data();
    data.start(524_288, 1);
    let before = file.metadata().unwrap().blocks();
    data.tick();
    data.set_interval(4096);
    data.tick();
    let _ = (data.totals(), data.stats());
    assert_eq!(file.metadata().unwrap().blocks(), before);
    // Header and ring.
    assert_eq!(
        before * 512,
        4096 + (RING_ENTRIES * RING_ENTRY_BYTES) as u64
    );
}

/// Check that the blocks of the sampled set are counted, and that it can be emptied.
#[test]
fn sampled_set() {
    let (_file, mut data) = data();
    data.start(4096, 1);
    for (byte, value) in [(0, 3_u64), (9, 0x88), (GEOMETRY.buckets() - 1, 0x80)] {
        let place = GEOMETRY.occupancy_offset() + byte;
        let old = data.shared.load(place & !7);
        data.shared
            .store(place & !7, old | value << (8 * (place & 7)));
    }
    let bucket = GEOMETRY.buckets_offset();
    data.shared.store(bucket, 0x1234);
    let stats = data.stats();
    assert_eq!((stats.sampled_blocks, stats.overflowed_buckets), (11, 2));
    data.clear_sampled_set().unwrap();
    assert_eq!(data.stats(), SharedStats::default());
    assert_eq!(data.shared.load(bucket), 0);
    assert_eq!(data.shared.load(HEADER_MAGIC), DATA_MAGIC);
}

/// Sizes that are asked for, in turn.
const SIZES: [(&str, &[u64]); 5] = [
    ("1 byte", &[1]),
    ("R / 40", &[100]),
    ("R", &[4096]),
    ("mixed", &[0, 1, 16, 48, 300, 4096, 10_000, 300, 300, 64]),
    ("R / 64 and 20 R", &[64, 64, 64, 64, 64, 64, 64, 64, 81_920]),
];

/// Check that the weights of samples add up to what was asked for, over sizes far below and
/// far above the interval, while the ring runs dry, credits end, threads are woken and the
/// interval changes: in bytes and in objects.
#[test]
fn weights_add_up() {
    for (number, (name, sizes)) in SIZES.into_iter().enumerate() {
        let (_file, mut data) = data();
        let mut interval = 4096;
        data.start(interval, number as u64);
        let shared = Arc::clone(&data.shared);
        let mut threads = [Thread::new(&shared, 1), Thread::new(&shared, 200)];
        let (mut bytes, mut objects) = (0.0, 0.0);
        let (mut true_bytes, mut true_objects) = (0.0, 0.0);
        let (mut variance, mut objects_variance) = (0.0, 0.0);
        let mut by_bpf = 0_u64;
        for call in 0..400_000_usize {
            // Every so often the daemon is late, and the ring is nearly empty.
            match call % 10_000 {
                0 => data.tick(),
                5000 => shared.store(HEADER_RING_HEAD, shared.load(HEADER_RING_TAIL) - 2),
                7000 => {
                    interval = [4096, 1024, 16_384][call / 10_000 % 3];
                    data.set_interval(interval);
                    shared.store(HEADER_CREDIT, 300);
                }
                _ => {}
            }
            let size = sizes[call % sizes.len()];
            let thread = &mut threads[call % 3 % 2];
            let was_undecided = shared.load(thread.shard + SHARD_INTERVAL) == 0;
            let found = thread.call(size, interval);
            assert!(thread.countdown() < ASLEEP_LIMIT, "{name}: starved");
            // As good as sampled with the interval that the gap had.
            let p_of = |interval| -(-(size.max(1) as f64) / interval as f64).exp_m1();
            let p = p_of(found.unwrap_or(interval));
            true_bytes += size as f64;
            true_objects += 1.0;
            variance += (size as f64).powi(2) * (1.0 - p) / p;
            objects_variance += (1.0 - p) / p;
            if let Some(interval) = found {
                let weight = unbias(size, interval);
                bytes += weight.weight_bytes;
                objects += weight.weight_objects;
                by_bpf += u64::from(was_undecided);
            }
        }
        assert!(by_bpf > 0, "{name}: BPF has decided nothing");
        for (what, got, truth, variance) in [
            ("bytes", bytes, true_bytes, variance),
            ("objects", objects, true_objects, objects_variance),
        ] {
            let sigmas = (got - truth) / f64::sqrt(variance);
            println!("{name}: {what} {got} of {truth}: {sigmas:.2} sigmas");
            assert!(sigmas.abs() < SIGMAS, "{name}: {what} {got} of {truth}");
        }
    }
}

/// Check that with an interval of 1 every block is a sample of its own, with 0 none is, and
/// that threads which sleep then are not said to be starved.
#[test]
fn all_or_none() {
    let (_file, mut data) = data();
    data.start(1, 1);
    let shared = Arc::clone(&data.shared);
    let mut thread = Thread::new(&shared, 3);
    for size in 0..1000 {
        assert_eq!(thread.call(size, 1), Some(1), "{size}");
    }
    data.set_interval(0);
    for size in 0..1000 {
        assert_eq!(thread.call(size, 0), None, "{size}");
        data.tick();
    }
    assert!(shared.load(HEADER_STARVED) > 0);
    assert_eq!(data.stats().starved, 0);
    data.set_interval(1);
    for size in 0..1000 {
        assert_eq!(thread.call(size, 1), Some(1), "{size}");
    }
    assert_eq!(data.stats().starved, 0);
}

/// Check that a change of interval reaches a thread at its next call, though its gap was
/// long and its own subtraction has undone the first request; and that the daemon then looks
/// no more.
#[test]
fn interval_changes_at_once() {
    let (_file, mut data) = data();
    data.start(1 << 30, 1);
    let shared = Arc::clone(&data.shared);
    let mut thread = Thread::new(&shared, 3);
    assert_eq!(thread.call(1, 1 << 30), None);
    let long = thread.countdown();
    assert!(long > 1000);
    data.set_interval(64);
    assert_eq!(thread.countdown(), REDRAW);
    // It was in the middle of it.
    let place = thread.shard + SHARD_COUNTDOWN;
    shared.store(place, (long - 1).cast_unsigned());
    assert!(data.supply.looks_at_shards());
    data.tick();
    assert_eq!(thread.countdown(), REDRAW);
    data.tick();
    assert!(!data.supply.looks_at_shards());
    let samples: Vec<u64> = (0..64).filter_map(|_| thread.call(64, 64)).collect();
    assert!(samples.len() > 20);
    assert!(samples.iter().all(|&interval| interval == 64));
}

/// Check that a thread that has found nothing is counted, sleeps, and is woken by the next
/// tick.
#[test]
fn sleepers_wake() {
    let (_file, mut data) = data();
    data.start(64, 1);
    let shared = Arc::clone(&data.shared);
    shared.store(HEADER_RING_HEAD, shared.load(HEADER_RING_TAIL));
    shared.store(HEADER_CREDIT, 2);
    let mut thread = Thread::new(&shared, 3);
    let samples = (0..100).filter_map(|_| thread.call(1 << 20, 64)).count();
    assert_eq!(samples, 2, "as many as there were credits");
    assert!(thread.countdown() > ASLEEP_LIMIT);
    assert_eq!(data.stats().starved, 1);
    data.tick();
    assert_eq!(thread.call(1 << 20, 64), Some(64));
    data.tick();
    assert_eq!(data.stats().starved, 1);
    assert!(!data.supply.looks_at_shards());
}

/// Check that threads which take gaps at the same time, while the daemon fills, empties and
/// fills the ring, take each gap once at most, and none that was not there.
#[test]
fn gaps_are_taken_once() {
    const THREADS: usize = 4;
    let (_file, mut data) = data();
    data.start(2, 1);
    let shared = Arc::clone(&data.shared);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let (shared, done) = (&shared, &done);
                scope.spawn(move || {
                    let mut thread = Thread::new(shared, number);
                    while !done.load(Ordering::Relaxed) {
                        if let Some(interval) = thread.call(1000, 3) {
                            assert!([2, 3, 4].contains(&interval), "{interval}");
                        }
                    }
                    thread.taken
                })
            })
            .collect();
        let mut thrown_away = 0;
        for round in 0..300_u64 {
            data.tick();
            thread::yield_now();
            if round % 10 == 9 {
                let before = shared.load(HEADER_RING_HEAD);
                data.set_interval(2 + round / 10 % 3);
                thrown_away += shared.load(HEADER_RING_TAIL).saturating_sub(before);
            }
        }
        done.store(true, Ordering::Relaxed);
        let taken: u64 = threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum();
        let (head, tail) = (shared.load(HEADER_RING_HEAD), shared.load(HEADER_RING_TAIL));
        assert!(
            taken > 0 && taken <= head && head <= tail,
            "{taken} {head} {tail}"
        );
        // What was there when the ring was emptied, at most, and what was put there then.
        assert!(head - taken <= thrown_away, "{taken} {head} {thrown_away}");
    });
}

/// Check that a target which writes what it likes harms itself alone: every look comes back.
#[test]
fn any_bytes() {
    let mut random = Bits(1 << 60);
    let (file, mut data) = data();
    data.start(4096, 1);
    for round in 0..20 {
        for at in (0..GEOMETRY.shared_bytes()).step_by(8) {
            let word = u64::from(random.draw()) << 32 | u64::from(random.draw());
            // Small numbers, large ones, and those of both signs.
            let word = word >> (random.draw() % 64);
            let word = if round % 2 == 0 { word } else { !word };
            data.shared.store(at, word);
        }
        data.tick();
        let _ = (data.totals(), data.stats());
        data.set_interval(u64::from(random.draw() % 3) * 512);
        data.tick();
        let mut other = SharedData::new(&file, 0, GEOMETRY).unwrap();
        other.start(512, 1);
        other.tick();
        data = other;
    }
    // And makes holes meanwhile.
    data.clear_sampled_set().unwrap();
    (&file).write_all(&[0xff; 8192]).unwrap();
    data.tick();
    let _ = data.stats();
}
