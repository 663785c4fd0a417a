use memprof_common::function::Function;

use super::*;
use crate::{sample::StackId, weight::unbias};

const X: StackId = StackId::first(StackKey { high: 1, low: 1 });
const Y: StackId = StackId::first(StackKey { high: 2, low: 3 });
const SEVEN: ImageId = ImageId { pid: 7, epoch: 0 };
const EIGHT: ImageId = ImageId { pid: 8, epoch: 0 };

fn alloc(image: ImageId, addr: u64, timestamp_ns: u64, size_bytes: u64) -> AllocSample {
    AllocSample {
        key: AllocKey { image, addr },
        timestamp_ns,
        size_bytes,
        sample_interval_bytes: 1000,
        stack: X,
        function: Function::Malloc,
        restored: false,
    }
}

fn free(sample: &AllocSample) -> FreeSample {
    FreeSample {
        key: sample.key,
        alloc_timestamp_ns: sample.timestamp_ns,
    }
}

fn ledger() -> Ledger {
    let mut ledger = Ledger::new();
    ledger.add_stack(X.key, StackTrace::default());
    ledger.add_stack(Y.key, StackTrace::default());
    ledger
}

fn counters(ledger: &Ledger, image: ImageId) -> StackCounters {
    let mut sum = StackCounters::default();
    for (_, stack) in &ledger.snapshot(|i| i == image).images[0].stacks {
        sum += stack.counters;
    }
    sum
}

#[track_caller]
fn assert_conserved(ledger: &Ledger, image: ImageId) {
    let tally = ledger.tally(image);
    assert_eq!(
        tally.alloc_events,
        ledger.live(image) + tally.free_events + tally.purged,
        "{tally:?}"
    );
}

/// Check that the module documentation's two processes come out as drawn.
#[test]
fn two_processes_as_documented() {
    let mut ledger = ledger();
    let small = alloc(SEVEN, 0xa, 1, 500);
    let large = alloc(EIGHT, 0xa, 2, 4000);
    assert_eq!(ledger.alloc(&small), AllocOutcome::Recorded);
    assert_eq!(ledger.alloc(&large), AllocOutcome::Recorded);
    assert!((counters(&ledger, SEVEN).alloc_bytes - 1270.7).abs() < 0.1);
    assert!((counters(&ledger, EIGHT).inuse_bytes() - 4074.6).abs() < 0.1);
    assert_eq!(ledger.free(&free(&small)), FreeOutcome::Freed);
    assert_eq!(counters(&ledger, SEVEN).inuse_bytes(), 0.0);
    assert!((counters(&ledger, EIGHT).inuse_bytes() - 4074.6).abs() < 0.1);
    assert_conserved(&ledger, SEVEN);
    assert_conserved(&ledger, EIGHT);
    assert_eq!(ledger.close(EIGHT), 1);
    assert_eq!(ledger.tally(EIGHT).purged, 1);
    assert_conserved(&ledger, EIGHT);
    assert!((counters(&ledger, EIGHT).inuse_bytes() - 4074.6).abs() < 0.1);
}

/// Check invariant 3: a free subtracts what its allocation added, also when
/// allocations under other intervals came in between.
#[test]
fn a_free_subtracts_the_stored_weight() {
    let mut ledger = ledger();
    let coarse = alloc(SEVEN, 1, 1, 100);
    let fine = AllocSample {
        sample_interval_bytes: 1,
        ..alloc(SEVEN, 2, 2, 100)
    };
    ledger.alloc(&coarse);
    ledger.alloc(&fine);
    ledger.free(&free(&coarse));
    let left = counters(&ledger, SEVEN);
    assert!((left.inuse_bytes() - 100.0).abs() < 1e-9);
    assert!((left.free_bytes - unbias(100, 1000).weight_bytes).abs() < 1e-9);
    // What is left was counted exactly.
    assert_eq!(left.inuse_variance(), 0.0);
    assert!(left.alloc_variance > 0.0);
    assert_eq!(left.coarsest_interval_bytes, 1000);
}

/// Check that an address allocated again counts the block before as freed, once.
#[test]
fn replaced_allocation_is_a_missed_free() {
    let mut ledger = ledger();
    let first = alloc(SEVEN, 1, 1, 100);
    let second = AllocSample {
        stack: Y,
        ..alloc(SEVEN, 1, 2, 300)
    };
    ledger.alloc(&first);
    assert_eq!(ledger.alloc(&second), AllocOutcome::Replaced);
    assert_eq!(ledger.tally(SEVEN).replaced_allocations, 1);
    assert_eq!(ledger.live(SEVEN), 1);
    // The late free of the first must not free the second.
    assert_eq!(ledger.free(&free(&first)), FreeOutcome::Unmatched);
    assert_eq!(ledger.live(SEVEN), 1);
    assert_conserved(&ledger, SEVEN);
    let in_use = counters(&ledger, SEVEN).inuse_bytes();
    assert!((in_use - unbias(300, 1000).weight_bytes).abs() < 1e-9);
}

/// Check that the same allocation told twice counts once.
#[test]
fn duplicate_counts_once() {
    let mut ledger = ledger();
    let sample = alloc(SEVEN, 1, 1, 100);
    ledger.alloc(&sample);
    assert_eq!(ledger.alloc(&sample), AllocOutcome::Duplicate);
    assert_eq!(ledger.tally(SEVEN).alloc_events, 1);
    assert_eq!(counters(&ledger, SEVEN).samples, 1);
}

/// Check that a failed realloc leaves no trace in the books, whichever of its
/// two events arrived.
#[test]
fn failed_realloc_leaves_the_books_as_they_were() {
    for free_event_lost in [false, true] {
        let mut ledger = ledger();
        let old = alloc(SEVEN, 1, 1, 100);
        ledger.alloc(&old);
        let before = counters(&ledger, SEVEN);
        if !free_event_lost {
            ledger.free(&free(&old));
        }
        let restored = AllocSample {
            restored: true,
            ..old
        };
        let outcome = ledger.alloc(&restored);
        assert_eq!(
            outcome,
            if free_event_lost {
                AllocOutcome::Duplicate
            } else {
                AllocOutcome::Restored
            }
        );
        assert_eq!(counters(&ledger, SEVEN), before);
        assert_conserved(&ledger, SEVEN);
    }
}

/// Check that a sweep frees what the map does not hold, keeps what it holds,
/// and leaves alone what came after it began.
#[test]
fn sweep_finds_lost_frees() {
    let mut ledger = ledger();
    let kept = alloc(SEVEN, 1, 1, 100);
    let lost = alloc(SEVEN, 2, 2, 100);
    let reused = alloc(SEVEN, 3, 3, 100);
    ledger.alloc(&kept);
    ledger.alloc(&lost);
    ledger.alloc(&reused);
    ledger.begin_sweep();
    let newer = alloc(SEVEN, 4, 4, 100);
    ledger.alloc(&newer);
    // The map: `kept`, and another allocation at the address of `reused`.
    let found = ledger.finish_sweep(|key, timestamp_ns| {
        (key.addr, timestamp_ns) == (1, 1) || (key.addr, timestamp_ns) == (3, 9)
    });
    assert_eq!(found, 2);
    assert_eq!(ledger.live(SEVEN), 2);
    assert_eq!(ledger.tally(SEVEN).swept_frees, 2);
    assert_conserved(&ledger, SEVEN);
    // The free that was in the ring all along changes nothing.
    assert_eq!(ledger.free(&free(&lost)), FreeOutcome::Unmatched);
    assert_conserved(&ledger, SEVEN);
}

/// Check that a block whose event was dropped is booked by a sweep, and its
/// late event does not count it again.
#[test]
fn sweep_recovers_unsent_allocations() {
    let mut ledger = ledger();
    let unsent = alloc(SEVEN, 1, 1, 100);
    ledger.begin_sweep();
    assert_eq!(ledger.recover(&unsent), AllocOutcome::Recorded);
    assert_eq!(ledger.finish_sweep(|_, _| true), 0);
    assert_eq!(ledger.alloc(&unsent), AllocOutcome::Duplicate);
    assert_eq!(ledger.free(&free(&unsent)), FreeOutcome::Freed);
    let tally = ledger.tally(SEVEN);
    assert_eq!((tally.alloc_events, tally.recovered_allocations), (1, 1));
    assert_conserved(&ledger, SEVEN);
}

/// Check that a block that was recovered and freed without a word counts as one
/// that BPF wrongly takes for unreported, and one that was told later does not,
/// however often a sweep meets it.
#[test]
fn recovered_blocks_are_not_unreported() {
    let mut ledger = ledger();
    let silent = alloc(SEVEN, 1, 1, 100);
    let told = alloc(SEVEN, 2, 2, 100);
    for _ in 0..3 {
        ledger.begin_sweep();
        ledger.recover(&silent);
        ledger.recover(&told);
        ledger.finish_sweep(|_, _| true);
    }
    assert_eq!(ledger.alloc(&told), AllocOutcome::Duplicate);
    ledger.free(&free(&told));
    assert_eq!(ledger.tally(SEVEN).recovered_unreported, 0);
    ledger.begin_sweep();
    assert_eq!(ledger.finish_sweep(|_, _| false), 1);
    let tally = ledger.tally(SEVEN);
    assert_eq!(tally.recovered_unreported, 1);
    assert_eq!((tally.alloc_events, tally.recovered_allocations), (2, 2));
    assert_conserved(&ledger, SEVEN);
}

/// Check that the event of a recovered block counts it once, also if it comes
/// after the block was booked as freed: found missing, or its address taken.
#[test]
fn late_event_of_a_ghost_counts_nothing() {
    for taken in [false, true] {
        let mut ledger = ledger();
        let ghost = alloc(SEVEN, 1, 1, 100);
        ledger.begin_sweep();
        ledger.recover(&ghost);
        ledger.finish_sweep(|_, _| true);
        ledger.begin_sweep();
        if taken {
            ledger.recover(&alloc(SEVEN, 1, 2, 300));
        }
        ledger.finish_sweep(|_, timestamp_ns| timestamp_ns == 2);
        let before = counters(&ledger, SEVEN);
        assert_eq!(ledger.alloc(&ghost), AllocOutcome::Duplicate);
        assert_eq!(counters(&ledger, SEVEN), before);
        assert_eq!(ledger.tally(SEVEN).recovered_unreported, 0);
        assert_conserved(&ledger, SEVEN);
    }
}

/// Check that an event that comes after a sweep has booked a newer block at its
/// address counts as allocated and freed, and leaves the newer block alone.
#[test]
fn stale_event_does_not_replace_a_newer_block() {
    let mut ledger = ledger();
    let stale = alloc(SEVEN, 1, 1, 100);
    let newer = AllocSample {
        stack: Y,
        ..alloc(SEVEN, 1, 2, 300)
    };
    ledger.begin_sweep();
    assert_eq!(ledger.recover(&newer), AllocOutcome::Recorded);
    assert_eq!(ledger.alloc(&stale), AllocOutcome::Stale);
    assert_eq!(ledger.recover(&newer), AllocOutcome::Duplicate);
    let sum = counters(&ledger, SEVEN);
    assert_eq!(sum.samples, 2);
    assert_eq!(sum.live_samples, 1);
    assert!((sum.inuse_bytes() - unbias(300, 1000).weight_bytes).abs() < 1e-9);
    assert_conserved(&ledger, SEVEN);
}

/// Check that nothing is booked on an image that has ended.
#[test]
fn late_events_change_nothing() {
    let mut ledger = ledger();
    let sample = alloc(SEVEN, 1, 1, 100);
    ledger.alloc(&sample);
    ledger.close(SEVEN);
    let before = counters(&ledger, SEVEN);
    assert_eq!(ledger.alloc(&alloc(SEVEN, 2, 2, 100)), AllocOutcome::Late);
    assert_eq!(ledger.free(&free(&sample)), FreeOutcome::Unmatched);
    assert_eq!(counters(&ledger, SEVEN), before);
    assert!(ledger.is_closed(SEVEN));
}

/// Check the books against a model over random operations with random loss of
/// events: after a sweep, the live blocks are the model's, in-use bytes are the
/// model's, and events are conserved. Seed fixed.
#[test]
fn random_operations_with_loss_end_in_the_truth() {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    let mut ledger = ledger();
    // The map: address to (sample, unsent).
    let mut map: HashMap<u64, (AllocSample, bool)> = HashMap::new();
    for now in 1..20_000_u64 {
        let addr = random(50);
        if let Some((sample, unsent)) = map.remove(&addr) {
            if unsent && random(2) == 0 {
                ledger.alloc(&sample);
            }
            if random(4) != 0 {
                ledger.free(&free(&sample));
            }
        } else {
            let sample = alloc(SEVEN, addr, now, random(5000));
            let unsent = random(4) == 0;
            if !unsent {
                ledger.alloc(&sample);
            }
            map.insert(addr, (sample, unsent));
        }
        if now % 1000 == 999 {
            ledger.begin_sweep();
            for (sample, unsent) in map.values() {
                if *unsent {
                    ledger.recover(sample);
                }
            }
            ledger.finish_sweep(|key, timestamp_ns| {
                map.get(&key.addr)
                    .is_some_and(|(s, _)| s.timestamp_ns == timestamp_ns)
            });
            let truth: f64 = map
                .values()
                .map(|(s, _)| unbias(s.size_bytes, 1000).weight_bytes)
                .sum();
            let in_use = counters(&ledger, SEVEN).inuse_bytes();
            assert!((in_use - truth).abs() < 1e-3, "{in_use} is not {truth}");
            assert_eq!(ledger.live(SEVEN), map.len() as u64);
            assert_conserved(&ledger, SEVEN);
        }
    }
}

/// Check that frames are forgotten of those stacks alone that are in nobody's books, and that
/// what is in them is still shown.
#[test]
fn unused_stacks_are_forgotten() {
    let mut ledger = ledger();
    ledger.alloc(&alloc(SEVEN, 0xa, 1, 500));
    let unused = ledger.unused_stacks();
    assert_eq!(unused, [Y.key].into());
    assert!(ledger.forget_unused_stacks(&unused).is_empty());
    assert!(ledger.knows_stack(X.key) && !ledger.knows_stack(Y.key));
    assert!(ledger.knows_stack(StackKey::UNKNOWN));
    ledger.close(SEVEN);
    assert!(ledger.unused_stacks().is_empty());
    assert_eq!(ledger.snapshot(|_| true).images[0].stacks.len(), 1);
    ledger.forget(SEVEN.pid);
    let unused = ledger.unused_stacks();
    assert_eq!(unused, [X.key].into());
    // It is captured again before it is forgotten.
    ledger.alloc(&alloc(EIGHT, 0xb, 2, 500));
    assert_eq!(ledger.forget_unused_stacks(&unused), [X.key]);
    assert!(ledger.knows_stack(X.key));
}

/// Check that the books of one program of a process are forgotten, and the next one's are
/// not; and that nothing is left of a process that has gone.
#[test]
fn replaced_programs_are_forgotten() {
    let mut ledger = ledger();
    let next = ImageId { pid: 7, epoch: 1 };
    ledger.alloc(&alloc(SEVEN, 0xa, 1, 500));
    ledger.alloc(&alloc(next, 0xa, 2, 500));
    ledger.close(SEVEN);
    ledger.forget_image(SEVEN);
    assert_eq!(ledger.tally(SEVEN), EventTally::default());
    assert_eq!(ledger.live(next), 1);
    ledger.forget(7);
    assert_eq!(ledger.images().count(), 0);
    assert_eq!(ledger.unused_stacks(), [X.key, Y.key].into());
}
