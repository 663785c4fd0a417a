//! Shards of threads that have ended.

use std::cell::Cell;

use memprof_common::{function::Function, prefilter::SHARD_PROBES};

use super::{
    fakes,
    rig::{NEVER, Rig, call, thread_pointer},
    signals::interrupt_and_give_back,
    sites::hits,
};

fn owned(rig: &Rig) -> Vec<usize> {
    (0..rig.geometry.shards as usize)
        .filter(|&shard| rig.owner(shard) == thread_pointer())
        .collect()
}

/// One after the other, from this thread's home on.
fn from_home(rig: &Rig, number: usize) -> usize {
    (rig.home() + number) % rig.geometry.shards as usize
}

/// Check that a thread takes the first shard from its home on that was given back, before one
/// that nobody has had, and none that has an owner.
#[test]
fn one_that_was_given_back_is_taken() {
    for first in [0, 1, 5, SHARD_PROBES - 1] {
        let rig = fakes::rig();
        let home = rig.home();
        for shard in 0..SHARD_PROBES {
            rig.give_away(home + shard);
        }
        for later in (first..SHARD_PROBES).step_by(7) {
            rig.give_back(home + later);
        }
        for n in 1..4_u64 {
            let block = rig.malloc(10);
            rig.free(block);
            assert_eq!(rig.totals(), (n, 10 * n, n.cast_signed()));
            assert_eq!(owned(&rig), [from_home(&rig, first)]);
        }
        assert_eq!(rig.unsharded(), 0);
    }
}

/// Check that a thread finds its own behind one that was given back, in calls of each way, also
/// inside of a call.
#[test]
fn own_shard_is_found_behind_one_that_was_given_back() {
    let rig = fakes::rig();
    fakes::nest(&rig);
    let home = rig.home();
    rig.give_away(home);
    rig.give_away(home + 1);
    rig.give_away(home + 2);
    rig.malloc(10);
    let own = [from_home(&rig, 3)];
    assert_eq!(owned(&rig), own);
    for shard in [1, 0, 2] {
        rig.give_back(home + shard);
        let before = rig.totals();
        let block = rig.malloc(10);
        // Each calls what is inside of it, which is not counted.
        let block = rig.realloc(block, 20);
        rig.free(block);
        rig.calloc(1, 5);
        let expected = (before.0 + 3, before.1 + 35, before.2 + 2);
        assert_eq!(rig.totals(), expected, "{shard}");
        assert_eq!(owned(&rig), own);
        assert_eq!(rig.call_frame(), None);
    }
}

thread_local! {
    static RIG: Cell<*const Rig> = const { Cell::new(std::ptr::null()) };
}

/// A `calloc` inside of which all shards but the thread's own are given back.
extern "C" fn calls_inside() -> u64 {
    // SAFETY: the test that has set it holds the rig, on this very thread.
    let rig = unsafe { &*RIG.get() };
    let own = owned(rig);
    for shard in (0..rig.geometry.shards as usize).filter(|shard| !own.contains(shard)) {
        rig.give_back(shard);
    }
    let block = rig.malloc(16);
    rig.free(block);
    block
}

/// Check that a call which is being followed stays the outermost while shards before that of its
/// thread are given back.
#[test]
fn given_back_inside_of_a_call() {
    let functions = [
        (Function::Calloc, calls_inside as *const ()),
        (Function::Malloc, given as *const ()),
        (Function::Free, nothing as *const ()),
    ];
    let rig = Rig::new(&functions.map(|(function, code)| (function, code.expose_provenance())));
    rig.fill(&[(NEVER, 512)]);
    let home = rig.home();
    rig.give_away(home);
    rig.give_away(home + 1);
    RIG.set(&raw const rig);
    rig.calloc(1, 100);
    assert_eq!(rig.totals(), (1, 100, 0));
    assert_eq!(owned(&rig), [from_home(&rig, 2)]);
    assert_eq!(rig.call_frame(), None);
}

extern "C" fn given() -> u64 {
    0x5550
}

extern "C" fn nothing() {}

/// Check that a thread which takes its first shard may be stopped at any instruction, a shard be
/// given back then, and a signal handler take that: the calls are counted once each, and the
/// thread knows one shard as its own.
#[test]
fn given_back_at_each_step_of_a_first_call() {
    for function in [Function::Malloc, Function::Free, Function::Calloc] {
        for given_back in [0, 2] {
            for step in 0.. {
                let rig = fakes::small_rig_with_gaps(&[1 << 40]);
                fakes::nest(&rig);
                let home = rig.home();
                for shard in [0, 1, 2] {
                    rig.give_away(home + shard);
                }
                let shard = Some(home + given_back);
                let (arguments, allocs) = match function {
                    Function::Free => ([0x1230, 0, 0], 0),
                    _ => ([100, 1, 0], 1),
                };
                let interrupted = interrupt_and_give_back(&rig, function, arguments, step, shard);
                let context = format!("{function:?}, {given_back}, step {step}, {interrupted:?}");
                let by_handler = u64::from(interrupted == Some(false));
                let frees = by_handler + 1 - allocs;
                let expected = (
                    allocs + by_handler,
                    100 * allocs + 16 * by_handler,
                    frees.cast_signed(),
                );
                assert_eq!(rig.totals(), expected, "{context}");
                assert_eq!(rig.unsharded(), 0, "{context}");
                assert_eq!(rig.call_frame(), None, "{context}");
                // Two, if the handler has taken the one that was given back.
                let first = rig.own_shard();
                assert!((1..=2).contains(&owned(&rig).len()), "{context}");
                let before = rig.totals();
                let block = call(rig.function(Function::Calloc), [1, 7, 0]);
                rig.free(block);
                let expected = (before.0 + 1, before.1 + 7, before.2 + 1);
                assert_eq!(rig.totals(), expected, "{context}");
                assert_eq!(rig.own_shard(), first, "{context}");
                assert_eq!(rig.call_frame(), None, "{context}");
                hits();
                if interrupted.is_none() {
                    break;
                }
            }
        }
    }
}

/// Check that threads which come one after the other have room without end if the shards of those
/// before are given back, and that their calls are counted as often as they were made.
#[test]
fn more_threads_than_shards() {
    let rig = fakes::rig_with_gaps(&[NEVER; 4096]);
    let (threads, at_a_time) = (4096_u64, 32);
    for round in 0..threads / at_a_time {
        let together = std::sync::Barrier::new(at_a_time as usize);
        std::thread::scope(|scope| {
            for _ in 0..at_a_time {
                scope.spawn(|| {
                    for _ in 0..10 {
                        let block = rig.malloc(10);
                        rig.free(block);
                    }
                    // Each has a thread pointer of its own.
                    together.wait();
                });
            }
        });
        // As if other threads were to come, which have none of these pointers.
        for shard in 0..rig.geometry.shards as usize {
            if rig.owner(shard) > 1 {
                rig.give_back(shard);
            }
        }
        let calls = 10 * at_a_time * (round + 1);
        assert_eq!(rig.totals(), (calls, 10 * calls, calls.cast_signed()));
    }
    assert_eq!(rig.unsharded(), 0);
}

thread_local! {
    static UNMARKED: Cell<u64> = const { Cell::new(0) };
}

extern "C" fn looks() -> u64 {
    // SAFETY: as in `calls_inside`.
    UNMARKED.set(unsafe { &*RIG.get() }.unmarked());
    0x6660
}

/// Check that a call which is followed though its thread has no shard is counted while it lasts,
/// and others are not.
#[test]
fn calls_without_a_mark() {
    let functions = [
        (Function::Realloc, looks as *const ()),
        (Function::Malloc, given as *const ()),
        (Function::Free, nothing as *const ()),
    ];
    let rig = Rig::new(&functions.map(|(function, code)| (function, code.expose_provenance())));
    rig.fill(&[(1, 512), (NEVER, 512)]);
    let sampled = rig.malloc(10);
    assert_eq!(rig.set(), [sampled]);
    let rig = &rig;
    let during = |old: u64| {
        RIG.set(&raw const *rig);
        UNMARKED.set(u64::MAX);
        rig.realloc(old, 20);
        assert_eq!(rig.unmarked(), 0);
        UNMARKED.get()
    };
    assert_eq!(during(0x1230), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for shard in 0..SHARD_PROBES {
                rig.give_away(rig.home() + shard);
            }
            assert_eq!(during(0x1230), 0, "it is not followed");
            assert_eq!(during(sampled), 1);
            hits();
        });
    });
    assert_eq!(rig.unsharded(), 2);
    hits();
}
