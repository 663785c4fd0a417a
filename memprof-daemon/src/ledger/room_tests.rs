use memprof_common::function::Function;

use super::*;
use crate::{
    address::{AbsAddr, FrameAddress},
    ledger::FreeOutcome,
    sample::{AllocKey, FreeSample},
};

const IMAGE: ImageId = ImageId { pid: 7, epoch: 0 };
const UNKNOWN: StackId = StackId::first(StackKey::UNKNOWN);

fn key(number: u64) -> StackKey {
    StackKey {
        high: number,
        low: number | 1,
    }
}

fn trace(depth: u64) -> StackTrace {
    StackTrace {
        frames: (0..depth).map(|n| FrameAddress(AbsAddr(n))).collect(),
        ..StackTrace::default()
    }
}

fn block(number: u64) -> AllocSample {
    AllocSample {
        key: AllocKey {
            image: IMAGE,
            addr: 16 * number,
        },
        timestamp_ns: number,
        size_bytes: 100,
        sample_interval_bytes: 1,
        stack: StackId::first(key(number)),
        function: Function::Malloc,
        restored: false,
    }
}

fn free(number: u64) -> FreeSample {
    FreeSample {
        key: block(number).key,
        alloc_timestamp_ns: number,
    }
}

/// As the pipeline does: a stack is told first, if there is room.
fn tell(ledger: &mut Ledger, number: u64) -> AllocOutcome {
    if ledger.has_room_for_stacks() {
        ledger.add_stack(key(number), trace(20));
    }
    ledger.alloc(&block(number))
}

/// Check that stacks beyond the limit are booked under the unknown stack and counted, that
/// sums are right all the same, and that the books do not grow beyond the limit by more than
/// one stack.
#[test]
fn stacks_beyond_the_limit() {
    let mut ledger = Ledger::new();
    ledger.limit_stacks(Some(50_000));
    for number in 1..=1000 {
        assert_eq!(tell(&mut ledger, number), AllocOutcome::Recorded);
    }
    let largest = TRACE_BYTES + COUNTERS_BYTES + 20 * 8;
    // The unknown stack of an image comes on top.
    assert!(ledger.stack_bytes() <= 50_000 + largest + COUNTERS_BYTES);
    let over = ledger.tally(IMAGE).stacks_full;
    assert!((900..920).contains(&over), "{over}");
    let sum = ledger.sum(IMAGE);
    assert_eq!((sum.alloc_bytes, sum.samples), (100_000.0, 1000));
    let snapshot = ledger.snapshot(|_| true);
    let stacks = &snapshot.images[0].stacks;
    let unknown = stacks.iter().find(|(stack, _)| *stack == UNKNOWN);
    assert_eq!(unknown.unwrap().1.counters.samples, over);
    assert_eq!(stacks.len() as u64, 1000 - over + 1);

    // Their frees are theirs, also when there is room again.
    ledger.limit_stacks(None);
    for number in 1..=1000 {
        assert_eq!(ledger.free(&free(number)), FreeOutcome::Freed);
    }
    for (_, stack) in &ledger.snapshot(|_| true).images[0].stacks {
        assert_eq!(stack.counters.inuse_bytes(), 0.0);
        assert_eq!(stack.counters.alloc_bytes, stack.counters.free_bytes);
    }
    let tally = ledger.tally(IMAGE);
    assert_eq!((tally.alloc_events, tally.free_events), (1000, 1000));
}

/// Check that stacks which are in an image's books are counted as ever while there is no room,
/// and that those of another image are not added to it.
#[test]
fn known_stacks_go_on() {
    let mut ledger = Ledger::new();
    tell(&mut ledger, 1);
    ledger.limit_stacks(Some(0));
    assert!(!ledger.has_room_for_stacks());
    let again = AllocSample {
        timestamp_ns: 5,
        key: AllocKey {
            image: IMAGE,
            addr: 8,
        },
        ..block(1)
    };
    ledger.alloc(&again);
    assert_eq!(ledger.tally(IMAGE).stacks_full, 0);
    let other = ImageId { pid: 8, epoch: 0 };
    ledger.alloc(&AllocSample {
        key: AllocKey {
            image: other,
            addr: 8,
        },
        ..block(1)
    });
    assert_eq!(ledger.tally(other).stacks_full, 1);
}

/// Check that what is counted while the books change is what they hold, and nothing at all
/// once all is forgotten.
#[test]
fn counted_as_it_is() {
    let mut ledger = Ledger::new();
    let empty = ledger.stack_bytes();
    for number in 1..=500 {
        tell(&mut ledger, number);
    }
    assert_eq!(ledger.blocks(), 500);
    let a_stack = TRACE_BYTES + COUNTERS_BYTES + 20 * 8;
    assert_eq!(ledger.stack_bytes(), empty + 500 * a_stack);
    for number in 1..=100 {
        ledger.free(&free(number));
    }
    assert_eq!(ledger.blocks(), 400);
    ledger.begin_sweep();
    ledger.finish_sweep(|key, _| key.addr > 16 * 200);
    assert_eq!(ledger.blocks(), 300);
    ledger.close(IMAGE);
    assert_eq!((ledger.blocks(), ledger.block_bytes()), (0, 0));
    ledger.forget(IMAGE.pid);
    assert_eq!(ledger.stack_bytes(), empty + 500 * (TRACE_BYTES + 20 * 8));
    let unused = ledger.unused_stacks();
    ledger.forget_unused_stacks(&unused);
    assert_eq!(ledger.stack_bytes(), empty);
}

/// Check what docs/limits.md says that blocks and stacks take.
#[test]
fn as_documented() {
    assert_eq!((BLOCK_BYTES, TRACE_BYTES, COUNTERS_BYTES), (167, 138, 240));
}

/// Check that a table which once held many blocks does not stay as large, and that what is
/// said of a full one is what is reserved for it at most.
#[test]
fn tables_shrink() {
    let mut ledger = Ledger::new();
    ledger.add_stack(key(1), trace(1));
    let one = |number| AllocSample {
        stack: StackId::first(key(1)),
        ..block(number)
    };
    for number in 0..100_000 {
        ledger.alloc(&one(number));
        if number > 10_000 {
            let most = BLOCK_BYTES * ledger.blocks();
            assert!(ledger.block_bytes() <= most, "{number}");
        }
    }
    let full = ledger.block_bytes();
    for number in 10..100_000 {
        ledger.free(&free(number));
    }
    // Places of what was removed count as taken or as free, as the table sees fit.
    assert!(ledger.block_bytes() > full / 4);
    ledger.shrink();
    assert!(ledger.block_bytes() < full / 16);
    assert_eq!(ledger.free(&free(5)), FreeOutcome::Freed);
}
