//! Which calls are sampled.

use std::sync::atomic::Ordering::SeqCst;

use memprof_common::{
    function::Function,
    prefilter::{
        FRAME_SAMPLED, HEADER_GENERATION, HEADER_RING_HEAD, HEADER_RING_TAIL, REDRAW, SiteKind,
    },
};

use super::{
    fakes,
    rig::{Rig, call},
    sites::hits,
};

/// Check that gaps are used in their order, that the call which reaches the end of one is
/// sampled with that gap's interval, and no other.
#[test]
fn samples_where_a_gap_ends() {
    let rig = Rig::new(&fakes::all());
    rig.fill(&[(100, 1), (50, 2), (1, 3), (30, 4), (1 << 40, 5)]);
    // The first gap ends in byte 100, the second behind the call that holds it.
    let sizes: [(u64, Option<u64>); 9] = [
        (60, None),
        (39, None),
        (1, Some(1)),
        (49, None),
        (500, Some(2)),
        (7, Some(3)),
        (29, None),
        (0, Some(4)),
        (1000, None),
    ];
    for functions in [[Function::Malloc], [Function::Valloc]] {
        for (size, interval) in sizes {
            let address = call(rig.function(functions[0]), [size, 0, 0]);
            let hits = hits();
            let Some(interval) = interval else {
                assert_eq!(hits, [], "{size}");
                continue;
            };
            let [hit] = hits[..] else {
                panic!("{size}: {hits:?}");
            };
            assert_eq!(hit.kind, SiteKind::Alloc);
            assert_eq!(hit.frame.size_bytes, size);
            assert_eq!(hit.frame.interval_bytes, interval);
            assert_eq!(hit.frame.address, address);
            assert_eq!(hit.frame.function, functions[0] as u32);
            assert_eq!(hit.frame.flags & FRAME_SAMPLED, FRAME_SAMPLED);
            assert_eq!(hit.frame.out_pointer, 0);
            assert_eq!(hit.frame.old_pointer, 0);
            assert_ne!(hit.frame.shard, 0);
        }
        assert_eq!(rig.gaps(), 0);
        rig.fill(&[(100, 1), (50, 2), (1, 3), (30, 4), (1 << 40, 5)]);
        rig.countdown().store(REDRAW, SeqCst);
    }
    assert_eq!(rig.totals(), (18, 2 * 1685, 0));
}

/// Check that each function's call can be sampled, with its size and its address.
#[test]
fn samples_each_function() {
    let rig = fakes::rig_with_gaps(&[1; 10]);
    let mut out = 0_u64;
    let out_at = std::ptr::from_mut(&mut out).expose_provenance() as u64;
    for (function, arguments, size) in [
        (Function::Malloc, [100, 7, 7], 100),
        (Function::Calloc, [3, 50, 7], 150),
        (Function::Realloc, [0, 33, 7], 33),
        (Function::Reallocarray, [0, 5, 9], 45),
        (Function::PosixMemalign, [out_at, 64, 1000], 1000),
        (Function::AlignedAlloc, [64, 2000, 7], 2000),
        (Function::Memalign, [4096, 4, 7], 4),
        (Function::Valloc, [9, 7, 7], 9),
        (Function::Pvalloc, [17, 7, 7], 17),
    ] {
        let result = call(rig.function(function), arguments);
        let hits = hits();
        let [hit] = hits[..] else {
            panic!("{function:?}: {hits:?}");
        };
        let address = if function == Function::PosixMemalign {
            // SAFETY: the function has written it through a pointer that the compiler
            // cannot see.
            unsafe { std::ptr::with_exposed_provenance::<u64>(out_at as usize).read_volatile() }
        } else {
            result
        };
        assert_eq!(hit.frame.address, address, "{function:?}");
        assert_eq!(hit.frame.size_bytes, size, "{function:?}");
        assert_eq!(hit.frame.function, function as u32);
        assert_eq!(hit.frame.interval_bytes, 512);
        assert!(rig.set().contains(&address), "{function:?}");
    }
    assert_eq!(rig.set().len(), 9);
    assert_eq!(rig.occupied(), 9);
}

/// Check that a call that fails is no sample, though it has used up its gap.
#[test]
fn a_failed_call_is_no_sample() {
    let rig = fakes::rig_with_gaps(&[1, 1, 1, 1 << 40]);
    let mut out = 0_u64;
    let out_at = std::ptr::from_mut(&mut out).expose_provenance() as u64;
    fakes::fail(true);
    rig.malloc(8);
    rig.calloc(8, 8);
    call(rig.function(Function::PosixMemalign), [out_at, 64, 1000]);
    assert_eq!(hits(), []);
    assert!(rig.set().is_empty());
    assert_eq!(rig.occupied(), 0);
    assert_eq!(rig.gaps(), 0);
    assert_eq!(rig.call_frame(), None);
}

/// Check that an impossible size uses up the gap in force, and that one only.
#[test]
fn an_impossible_size_takes_one_gap() {
    for size in [1 << 47, 1 << 62, u64::MAX] {
        let rig = fakes::rig_with_gaps(&[100, 1 << 40, 1 << 40]);
        rig.malloc(1);
        fakes::fail(true);
        rig.malloc(size);
        fakes::fail(false);
        assert_eq!(rig.gaps(), 1, "{size:x}");
        assert_eq!(rig.countdown().load(SeqCst), 1 << 40, "{size:x}");
    }
}

/// Check that an empty ring leaves the decision to BPF as long as there is credit, call by
/// call, and that gaps are taken as soon as there are some.
#[test]
fn undecided_without_gaps() {
    let rig = Rig::new(&fakes::all());
    rig.set_credit(4);
    for turn in 0..3 {
        rig.malloc(8);
        let hits = hits();
        assert_eq!(hits.len(), 1, "{turn}");
        assert_eq!(hits[0].frame.interval_bytes, 0, "{turn}");
    }
    assert_eq!(rig.starved(), 0);
    rig.fill(&[(100, 7), (100, 8)]);
    rig.malloc(8);
    assert_eq!(hits()[0].frame.interval_bytes, 0, "of the last credit");
    rig.malloc(99);
    assert_eq!(hits(), []);
    rig.malloc(1);
    assert_eq!(hits()[0].frame.interval_bytes, 7);
}

/// Check that a thread that finds neither gap nor credit is not sampled any more, is
/// counted as starved and still counts, until the daemon asks it to draw anew.
#[test]
fn asleep_without_credit() {
    let rig = Rig::new(&fakes::all());
    for _ in 0..100 {
        rig.malloc(1 << 30);
    }
    assert_eq!(hits(), []);
    assert!(rig.is_asleep());
    assert_eq!(rig.starved(), 1);
    assert_eq!(rig.totals(), (100, 100 << 30, 0));

    rig.fill(&[(100, 7), (1 << 40, 7)]);
    rig.malloc(100);
    assert_eq!(hits(), []);
    rig.countdown().store(REDRAW, SeqCst);
    rig.malloc(100);
    assert_eq!(hits().len(), 1);
    assert!(!rig.is_asleep());
}

/// Check that a change of interval reaches the thread: the old gap is dropped, the next
/// one comes from the new ring, and the thread shows the new generation.
#[test]
fn draws_anew() {
    let rig = Rig::new(&fakes::all());
    rig.fill(&[(1000, 7), (2000, 7), (3000, 7)]);
    rig.malloc(10);
    assert_eq!((rig.generation(), rig.interval()), (1, 7));

    rig.word(HEADER_RING_HEAD)
        .store(rig.word(HEADER_RING_TAIL).load(SeqCst), SeqCst);
    rig.word(HEADER_GENERATION).store(2, SeqCst);
    rig.fill(&[(50, 9), (60, 9)]);
    rig.malloc(10);
    assert_eq!((rig.generation(), rig.interval()), (1, 7), "not asked yet");
    rig.countdown().store(REDRAW, SeqCst);
    rig.malloc(10);
    assert_eq!((rig.generation(), rig.interval()), (2, 9));
    assert_eq!(rig.countdown().load(SeqCst), 40);
    assert_eq!(hits(), []);
    // Asked once more: some other is as good.
    rig.countdown().store(REDRAW, SeqCst);
    rig.malloc(60);
    assert_eq!(hits()[0].frame.interval_bytes, 9);
}

/// Check that the estimate of the bytes is unbiased, with gaps drawn as the daemon does:
/// over sizes far below, near and far above the interval, within 5 deviations, seed fixed.
#[test]
fn estimates_are_unbiased() {
    let interval = 4096_f64;
    let mut state = 0x5eed_u64;
    let mut uniform = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    };
    let rig = Rig::new(&fakes::all());
    let sizes = [1_u64, 16, 100, 1000, 5000, 40_000];
    let (mut truth, mut estimate, mut variance) = (0.0, 0.0, 0.0);
    for turn in 0..60_000 {
        while rig.gaps() < 16 {
            let gap = (-interval * (1.0 - uniform()).ln()).ceil().max(1.0);
            rig.fill(&[(gap as u64, 4096)]);
        }
        let size = sizes[turn % sizes.len()];
        let function = [Function::Malloc, Function::Valloc][turn / sizes.len() % 2];
        call(rig.function(function), [size, 0, 0]);
        let weight = size as f64 / -(-(size as f64) / interval).exp_m1();
        truth += size as f64;
        variance += size as f64 * (weight - size as f64);
        for hit in hits() {
            assert_eq!(hit.frame.size_bytes, size);
            estimate += weight;
        }
    }
    let deviations = (estimate - truth) / f64::sqrt(variance);
    assert!(
        deviations.abs() < 5.0,
        "{estimate} for {truth}: {deviations}"
    );
}
