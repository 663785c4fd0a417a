//! Many threads at once.

use std::{
    collections::HashSet,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use memprof_common::prefilter::{RING_ENTRIES, SiteKind};

use super::{
    fakes,
    rig::{Rig, call},
    sites::hits,
};

const THREADS: u64 = 8;

/// What threads have seen at sites: allocated minus freed blocks.
#[derive(Default)]
struct Told {
    live: HashSet<u64>,
    samples: u64,
}

impl Told {
    /// In the order of a thread's hits; a block's free may be another thread's, and told
    /// here before its allocation, so they are settled at the end.
    fn add(&mut self, frees: &mut Vec<u64>) {
        for hit in hits() {
            match hit.kind {
                SiteKind::Alloc => {
                    assert!(self.live.insert(hit.frame.address), "told twice");
                    self.samples += 1;
                }
                SiteKind::Restore => panic!("nothing fails"),
                SiteKind::Free | SiteKind::Take => frees.push(hit.rdi),
            }
        }
    }
}

/// Runs threads that allocate and free, also what others have allocated, while the ring is
/// kept filled with short gaps. Operations: calls, bytes, frees.
fn hammer(rig: &Rig, turns: u64) -> (u64, u64, i64) {
    let done = AtomicBool::new(false);
    let handed = Mutex::new(Vec::new());
    let told = Mutex::new((Told::default(), Vec::new()));
    let [calls, bytes, frees] = [const { AtomicU64::new(0) }; 3];
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (handed, told) = (&handed, &told);
                let (calls, bytes, frees) = (&calls, &bytes, &frees);
                scope.spawn(move || {
                    let mut own = Vec::new();
                    let (mut n, mut sum, mut freed) = (0, 0, 0);
                    for turn in 0..turns {
                        let size = 1 + (turn * 37 + thread * 101) % 500;
                        own.push(rig.malloc(size));
                        n += 1;
                        sum += size;
                        if turn % 7 == 0 {
                            own.push(rig.calloc(1, size));
                            n += 1;
                            sum += size;
                        }
                        if turn % 5 == 0 {
                            let old = own.pop().unwrap();
                            own.push(rig.realloc(old, size));
                            n += 1;
                            sum += size;
                            freed += 1;
                        }
                        if own.len() > 50 {
                            // Half of them by another thread.
                            let mut blocks = own.split_off(25);
                            std::mem::swap(&mut *handed.lock().unwrap(), &mut blocks);
                            for block in blocks.into_iter().chain(own.drain(..)) {
                                rig.free(block);
                                freed += 1;
                            }
                        }
                    }
                    for block in own {
                        rig.free(block);
                        freed += 1;
                    }
                    let mut told = told.lock().unwrap();
                    let (told, told_frees) = &mut *told;
                    told.add(told_frees);
                    calls.fetch_add(n, SeqCst);
                    bytes.fetch_add(sum, SeqCst);
                    frees.fetch_add(freed, SeqCst);
                })
            })
            .collect();
        let filler = scope.spawn(|| {
            let mut gap = 1;
            while !done.load(SeqCst) {
                while rig.gaps() < RING_ENTRIES as u64 / 2 {
                    gap = gap * 5 % 4093;
                    rig.fill(&[(gap, 2048)]);
                }
                std::thread::yield_now();
            }
        });
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, SeqCst);
        filler.join().unwrap();
        assert!(ended.iter().all(Result::is_ok));
    });
    let mut freed = frees.load(SeqCst);
    for block in handed.into_inner().unwrap() {
        rig.free(block);
        freed += 1;
    }
    let (mut told, mut told_frees) = told.into_inner().unwrap();
    told.add(&mut told_frees);
    assert!(told.samples > turns / 100, "{} samples", told.samples);
    for block in told_frees {
        assert!(
            told.live.remove(&block),
            "{block:x} was not told, or freed twice"
        );
    }
    assert_eq!(told.live.len(), 0, "each sampled block's free is told");
    assert!(rig.set().is_empty());
    assert_eq!(rig.occupied(), 0);
    (calls.load(SeqCst), bytes.load(SeqCst), freed.cast_signed())
}

/// Check that eight threads on few processors, with blocks freed by others, leave exact
/// totals, that every sampled block's free is told, and that the set is empty at the end.
#[test]
fn totals_are_exact() {
    let rig = Rig::new(&fakes::all());
    rig.set_credit(1 << 40);
    let expected = hammer(&rig, 30_000);
    assert_eq!(rig.totals(), expected);
    assert_eq!(rig.unsharded(), 0);
    assert_eq!(rig.starved(), 0);
}

/// Check that with fewer shards than threads each call is counted, or told as not counted.
#[test]
fn calls_are_counted_or_told() {
    let rig = Rig::new(&fakes::all());
    rig.set_credit(1 << 40);
    for shard in 0..256 {
        if shard % 32 != 0 {
            rig.give_away(shard);
        }
    }
    // Every thread's probes lead over two of the eight free shards. Of more threads than
    // shards some have none.
    let (started, turns) = (std::sync::Barrier::new(12), 1000);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                started.wait();
                for _ in 0..turns {
                    let block = rig.malloc(10);
                    rig.free(block);
                }
                // The next thread must not get this one's thread pointer.
                started.wait();
                hits();
            });
        }
    });
    let (calls, bytes, frees) = rig.totals();
    assert_eq!(
        calls + frees.cast_unsigned() + rig.unsharded(),
        12 * 2 * turns
    );
    assert_eq!(bytes, 10 * calls);
    assert!(rig.unsharded() >= 4 * 2 * turns);
    assert!(calls >= 2 * turns);
}

/// Check that threads which share a home each have a shard of their own.
#[test]
fn a_shard_has_one_owner() {
    let rig = Rig::new(&fakes::all());
    rig.fill(&[(super::rig::NEVER, 512); 40]);
    let started = std::sync::Barrier::new(40);
    let shards = Mutex::new(HashSet::new());
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                started.wait();
                call(
                    rig.function(memprof_common::function::Function::Malloc),
                    [8, 0, 0],
                );
                assert!(shards.lock().unwrap().insert(rig.own_shard().unwrap()));
                started.wait();
            });
        }
    });
    assert_eq!(rig.totals(), (40, 320, 0));
}
