//! What is counted.

use memprof_common::{function::Function, prefilter::SHARD_PROBES};

use super::{
    fakes,
    rig::{GEOMETRY, NEVER, Rig, call, thread_pointer},
    sites::hits,
};
use crate::prefilter::image::MallocNests;

/// Arguments of a call, and the bytes that it asks for.
fn calls() -> Vec<(Function, [u64; 3], u64)> {
    let out = Box::leak(Box::new(0_u64));
    let out = std::ptr::from_mut(out).expose_provenance() as u64;
    vec![
        (Function::Malloc, [100, 7, 7], 100),
        (Function::Calloc, [3, 50, 7], 150),
        (Function::Realloc, [0, 33, 7], 33),
        (Function::Reallocarray, [0, 5, 9], 45),
        (Function::PosixMemalign, [out, 64, 1000], 1000),
        (Function::AlignedAlloc, [64, 2000, 7], 2000),
        (Function::Memalign, [4096, 4, 7], 4),
        (Function::Valloc, [9, 7, 7], 9),
        (Function::Pvalloc, [17, 7, 7], 17),
        (Function::Mallocx, [100, 7, 7], 100),
        (Function::Reallocf, [0, 33, 7], 33),
        (Function::HeapCalloc, [7, 3, 50], 150),
        (Function::HeapRealloc, [7, 0, 33], 33),
        (Function::HeapReallocf, [7, 0, 33], 33),
        (Function::New, [100, 7, 7], 100),
        (Function::NewN, [3, 50, 7], 150),
        (Function::HeapNew, [7, 33, 7], 33),
        (Function::HeapNewN, [7, 3, 50], 150),
    ]
}

/// Check that each function's call is counted once, in the class of its size, with its
/// bytes, and that its result comes back.
#[test]
fn counts_each_function() {
    for nests in [MallocNests::No, MallocNests::Yes] {
        let rig = Rig::with(GEOMETRY, nests, &fakes::all());
        rig.fill(&[(NEVER, 512)]);
        let mut expected = (0, 0, 0);
        for (function, arguments, size) in calls() {
            for _ in 0..3 {
                let result = call(rig.function(function), arguments);
                match function {
                    Function::PosixMemalign => assert_eq!(result, 0xdead_beef_0000_0000),
                    _ => assert_ne!(result, 0, "{function:?}"),
                }
                expected.0 += 1;
                expected.1 += size;
                assert_eq!(rig.totals(), expected, "{function:?}");
                assert_ne!(rig.calls(size.leading_zeros() as usize), 0);
                assert_eq!(rig.call_frame(), None, "{function:?}");
            }
        }
        assert_eq!(hits(), []);
        assert_eq!(rig.unsharded(), 0);
        assert_eq!(
            NEVER - expected.1,
            rig.countdown()
                .load(std::sync::atomic::Ordering::SeqCst)
                .cast_unsigned()
        );
    }
}

/// Check that each kind of free is counted, and that of NULL is not.
#[test]
fn counts_frees() {
    let rig = fakes::rig();
    let frees = [
        Function::Free,
        Function::Cfree,
        Function::FreeSized,
        Function::FreeAlignedSized,
    ];
    for (n, function) in (1..).zip(frees) {
        call(rig.function(function), [0x1230, 64, 64]);
        call(rig.function(function), [0, 64, 64]);
        assert_eq!(rig.totals(), (0, 0, n), "{function:?}");
    }
}

/// Check that sizes that no allocator grants are counted, by class, without their bytes,
/// and that the largest possible one is counted with them.
#[test]
fn counts_impossible_sizes() {
    let rig = fakes::rig();
    for (zeros, size) in [(16, 1 << 47), (1, 1 << 62), (0, 1 << 63), (0, u64::MAX)] {
        let before = (
            rig.totals(),
            rig.own_shard().map_or(0, |_| rig.calls(zeros)),
        );
        rig.malloc(size);
        assert_eq!(rig.totals(), (before.0.0 + 1, before.0.1, 0), "{size:x}");
        assert_eq!(rig.calls(zeros), before.1 + 1, "{size:x}");
    }
    rig.calloc(1 << 32, 1 << 32);
    rig.calloc(u64::MAX, 2);
    call(rig.function(Function::Reallocarray), [0, 1 << 40, 1 << 40]);
    assert_eq!(
        rig.calls(0),
        5,
        "products that overflow are the largest size"
    );
    assert_eq!(rig.totals().1, 0);
    rig.malloc((1 << 47) - 1);
    assert_eq!(rig.totals().1, (1 << 47) - 1);
    // All others have taken a gap, of which there was one: they were for BPF to decide.
    hits();
}

/// Check that a realloc frees its block, if it has one, unless it fails; that one to 0
/// bytes which returns NULL has freed; and that each is an allocating call.
#[test]
fn counts_realloc() {
    let rig = fakes::rig();
    rig.realloc(0x1000, 10);
    assert_eq!(rig.totals(), (1, 10, 1));
    rig.realloc(0, 10);
    assert_eq!(rig.totals(), (2, 20, 1));
    fakes::fail(true);
    rig.realloc(0x1000, 10);
    assert_eq!(rig.totals(), (3, 30, 1), "the block is as it was");
    call(rig.function(Function::Reallocarray), [0x1000, 1, 10]);
    assert_eq!(rig.totals(), (4, 40, 1));
    fakes::fail(false);
    rig.realloc(0x1000, 0);
    assert_eq!(rig.totals(), (5, 40, 2));
    assert_eq!(rig.calls(64), 1);
}

/// Check that a reallocf that fails has freed all the same, and that an xallocx which has
/// less than was asked for has not.
#[test]
fn counts_kin_of_realloc() {
    let rig = fakes::rig();
    let function = |function, arguments| call(rig.function(function), arguments);
    function(Function::Xallocx, [0x1000, 10, 0]);
    assert_eq!(rig.totals(), (1, 10, 1));
    function(Function::HeapRealloc, [7, 0x1000, 10]);
    assert_eq!(rig.totals(), (2, 20, 2));
    fakes::fail(true);
    function(Function::Xallocx, [0x1000, 10, 0]);
    assert_eq!(rig.totals(), (3, 30, 2), "the block is as it was");
    function(Function::HeapRealloc, [7, 0x1000, 10]);
    assert_eq!(rig.totals(), (4, 40, 2), "the block is as it was");
    function(Function::Reallocf, [0x1000, 10, 0]);
    assert_eq!(rig.totals(), (5, 50, 3));
    fakes::fail(false);
}

/// Check that a sampled block is another after an xallocx that has moved nothing.
#[test]
fn resized_in_place() {
    let rig = fakes::rig_with_gaps(&[1, 1, 1, 1 << 40]);
    let block = rig.malloc(10);
    assert_eq!(rig.set(), [block]);
    assert_eq!(call(rig.function(Function::Xallocx), [block, 100, 0]), 107);
    assert_eq!(rig.set(), [block]);
    fakes::fail(true);
    assert_eq!(call(rig.function(Function::Xallocx), [block, 100, 0]), 50);
    fakes::fail(false);
    assert_eq!(rig.set(), [block], "it is back");
    rig.free(block);
    assert_eq!(rig.set(), [0; 0]);
    hits();
}

/// Check that an allocator calling itself is one call: calloc by malloc, realloc by
/// malloc and free; and malloc by another module's malloc where that is to be expected.
#[test]
fn nested_calls_are_not_counted() {
    let rig = fakes::rig();
    fakes::nest(&rig);
    rig.calloc(3, 5);
    assert_eq!(rig.totals(), (1, 15, 0));
    rig.realloc(0x1000, 20);
    assert_eq!(rig.totals(), (2, 35, 1));
    rig.malloc(1);
    rig.free(0x1000);
    assert_eq!(rig.totals(), (3, 36, 2), "behind them, calls are counted");

    let outer = Rig::with(
        GEOMETRY,
        MallocNests::Yes,
        &[(Function::Malloc, rig.function(Function::Calloc))],
    );
    outer.fill(&[(NEVER, 512)]);
    outer.malloc(3);
    assert_eq!(outer.totals(), (1, 3, 0));
}

/// Check that a call which is left by `longjmp` does not make calls behind it look as if
/// they were inside: the next as far up the stack is counted, and so are those behind.
#[test]
fn a_call_left_by_longjmp_is_forgotten() {
    // `nopl; add $64,%rsp; ret`: past the return into the stub, to the caller.
    let leaves = vec![0x0f, 0x1f, 0x44, 0, 0, 0x48, 0x83, 0xc4, 64, 0xc3];
    let returns = vec![0x0f, 0x1f, 0x44, 0, 0, 0xc3];
    // By the stub's way for threads at home, too.
    for at_home in [false, true] {
        let rig = Rig::with_code(
            GEOMETRY,
            MallocNests::No,
            &[
                (Function::Calloc, leaves.clone()),
                (Function::Malloc, returns.clone()),
                (Function::Free, returns.clone()),
                (Function::Valloc, returns.clone()),
            ],
        );
        rig.fill(&[(NEVER, 512)]);
        let mut before = (0, 0, 0);
        if at_home {
            call(rig.function(Function::Malloc), [8, 0, 0]);
            before = (1, 8, 0);
        }
        // All from one place, so that their frames are at the same one.
        let expected = [
            (Function::Calloc, (1, 8, 0)),
            (Function::Malloc, (2, 16, 0)),
            (Function::Free, (2, 16, 1)),
            (Function::Valloc, (3, 24, 1)),
            (Function::Malloc, (4, 32, 1)),
        ];
        for (function, totals) in expected {
            let arguments = if function == Function::Calloc {
                [1, 8, 0]
            } else {
                [8, 0, 0]
            };
            call(rig.function(function), arguments);
            let totals = (before.0 + totals.0, before.1 + totals.1, totals.2);
            assert_eq!(rig.totals(), totals, "{function:?}, {at_home}");
            if function == Function::Calloc {
                assert!(rig.call_frame().is_some(), "it has not returned");
            }
        }
        assert_eq!(rig.call_frame(), None, "valloc took its place");
    }
}

/// Check that a thread whose home is taken finds another shard, and is counted there.
#[test]
fn counts_away_from_home() {
    let rig = Rig::new(&fakes::all());
    rig.fill(&[(NEVER, 512)]);
    let home = memprof_common::prefilter::home_shard(thread_pointer(), GEOMETRY.shards) as usize;
    for shard in home..home + SHARD_PROBES - 1 {
        rig.give_away(shard);
    }
    for n in 1..10_u64 {
        let block = rig.malloc(10);
        rig.calloc(1, 5);
        rig.free(block);
        assert_eq!(rig.totals(), (2 * n, 15 * n, n.cast_signed()));
    }
    let last = (home + SHARD_PROBES - 1) % GEOMETRY.shards as usize;
    assert_eq!(rig.own_shard(), Some(GEOMETRY.shard_offset(last)));
    assert_eq!(rig.unsharded(), 0);
}

/// Check that calls of a thread without a shard are told as not counted, each once, and
/// that the functions work.
#[test]
fn tells_calls_without_a_shard() {
    let rig = Rig::new(&fakes::all());
    let home = memprof_common::prefilter::home_shard(thread_pointer(), GEOMETRY.shards) as usize;
    for shard in home..home + SHARD_PROBES {
        rig.give_away(shard);
    }
    let mut told = 0;
    for (function, arguments, _) in calls() {
        call(rig.function(function), arguments);
        told += 1;
        assert_eq!(rig.unsharded(), told, "{function:?}");
    }
    rig.free(0x1000);
    rig.free(0);
    assert_eq!(rig.unsharded(), told + 1);
    assert_eq!(rig.totals(), (0, 0, 0));
    assert_eq!(rig.own_shard(), None);
    assert_eq!(hits(), []);
}

/// Check that stubs that are switched off do nothing, also for a thread without a shard.
#[test]
fn switched_off() {
    let rig = fakes::rig();
    rig.enable(false);
    let before = rig.shared();
    for (function, arguments, _) in calls() {
        call(rig.function(function), arguments);
    }
    rig.free(0x1000);
    assert_eq!(rig.shared(), before);
}

/// Check that a forked child, whose private part is zero, leaves the shared part as it
/// is and gets its memory all the same, with sampled blocks about.
#[test]
fn a_forked_child_is_not_counted() {
    let rig = fakes::rig_with_gaps(&[1, 1 << 40]);
    let sampled = rig.malloc(10);
    assert_eq!(hits().len(), 1);
    let calls = calls();
    let before = rig.shared();
    // SAFETY: the child calls nothing but the fake functions, and leaves.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut works = true;
        for &(function, arguments, _) in &calls {
            let result = call(rig.function(function), arguments);
            works &= (result != 0) != function.is_free();
        }
        rig.free(sampled);
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!works)) };
    }
    let mut status = -1;
    // SAFETY: waits for the child that was just made.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    assert!(rig.shared() == before, "the child has written");
    rig.malloc(10);
    assert_eq!(rig.totals().0, 2, "the parent goes on");
}

/// Check that a child that is forked inside a followed call, as by a signal handler there,
/// returns from it without writing, and the parent with all that is due.
#[test]
fn a_call_that_forks_is_the_parents() {
    extern "C" fn forks() -> u64 {
        // SAFETY: the child returns through the stub, and leaves.
        u64::from(unsafe { libc::fork() }.unsigned_abs()) << 4
    }
    let forks = (forks as *const ()).expose_provenance();
    let mut functions = fakes::all();
    functions.retain(|(function, _)| *function == Function::Malloc);
    functions.extend([(Function::Realloc, forks), (Function::Calloc, forks)]);
    // Sampled, the first of the thread and not sampled, and that at home.
    for (gaps, at_home) in [
        (&[(1, 512), (1 << 40, 512)][..], false),
        (&[(1 << 40, 512)], false),
        (&[(1 << 40, 512)], true),
    ] {
        for function in [Function::Realloc, Function::Calloc] {
            let context = format!("{function:?}, {gaps:?}, {at_home}");
            let rig = Rig::new(&functions);
            rig.fill(gaps);
            let mut before = (0, 0, 0);
            if at_home {
                // Takes a shard, and the gap.
                rig.malloc(7);
                before = rig.totals();
                assert_eq!(before, (1, 7, 0));
            }
            let frees = i64::from(function == Function::Realloc);
            let (arguments, size) = match function {
                Function::Realloc => ([0x1000, 10, 0], 10),
                _ => ([2, 5, 0], 10),
            };
            let counted = (before.0 + 1, before.1 + size, frees);
            let result = call(rig.function(function), arguments);
            if result == 0 {
                // To the child the call has failed.
                let is_same = hits().is_empty() && rig.totals() == counted;
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(!is_same)) };
            }
            let mut status = -1;
            let child = (result >> 4) as i32;
            // SAFETY: waits for the child that was just made.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0, "the child has written: {context}");
            let sampled = usize::from(gaps.len() > 1);
            assert_eq!(hits().len(), sampled, "{context}");
            assert_eq!(rig.totals(), counted, "{context}");
            assert_eq!(rig.set(), vec![result; sampled], "{context}");
            assert_eq!(rig.call_frame(), None, "{context}");
        }
    }
}
