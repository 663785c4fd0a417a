//! What the stubs add to a call.

use std::{hint::black_box, time::Instant};

use memprof_common::{
    function::Function,
    prefilter::{REDRAW, home_shard},
};

use super::rig::{GEOMETRY, NEVER, Rig, call, thread_pointer};
use crate::prefilter::image::MallocNests;

const PAIRS: u32 = 2_000_000;
const ROUNDS: usize = 21;

/// `nopl; mov $0x1230,%eax; ret`.
fn trivial() -> Vec<u8> {
    vec![0x0f, 0x1f, 0x44, 0, 0, 0xb8, 0x30, 0x12, 0, 0, 0xc3]
}

fn rig() -> Rig {
    let functions = [Function::Malloc, Function::Calloc, Function::Free];
    let codes = functions.map(|function| (function, trivial()));
    let rig = Rig::with_code(GEOMETRY, MallocNests::No, &codes);
    rig.fill(&[(NEVER, 512); 3]);
    rig
}

/// Nanoseconds of an allocating call and a free.
fn pair(allocate: usize, free: usize) -> f64 {
    let start = Instant::now();
    for turn in 0..PAIRS {
        let size = u64::from(turn & 255) + 1;
        let block = call(black_box(allocate), [size, 1, 0]);
        call(black_box(free), [black_box(block), 0, 0]);
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(PAIRS)
}

/// Check that a pair of calls that is not sampled costs less than a trap by far, and print
/// what the stubs add to one of a trivial allocator: at home, away from home, and by
/// calloc, which is followed to its return. Rounds are interleaved, and the median counts.
#[test]
#[ignore = "measures: cargo test --release -p memprof-daemon --lib speed -- --ignored --nocapture"]
fn what_a_pair_costs() {
    let (home, away) = (rig(), rig());
    away.give_away(home_shard(thread_pointer(), GEOMETRY.shards) as usize);
    let plain = home.copy_of(Function::Malloc);
    let plain_free = home.copy_of(Function::Free);
    let cases = [
        ("without stubs", plain, plain_free),
        (
            "malloc and free at home",
            home.function(Function::Malloc),
            home.function(Function::Free),
        ),
        (
            "malloc and free away from home",
            away.function(Function::Malloc),
            away.function(Function::Free),
        ),
        (
            "calloc and free at home",
            home.function(Function::Calloc),
            home.function(Function::Free),
        ),
    ];
    let mut rounds = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        for ((_, allocate, free), round) in cases.iter().zip(&mut rounds) {
            round.push(pair(*allocate, *free));
        }
    }
    let medians = rounds.map(|mut round| {
        round.sort_by(f64::total_cmp);
        round[ROUNDS / 2]
    });
    for ((name, ..), median) in cases.iter().zip(medians) {
        println!("{name}: {median:.2} ns a pair, {:+.2}", median - medians[0]);
    }
    assert!(medians[1] - medians[0] < 100.0);
    let calls = (ROUNDS as u64) * u64::from(PAIRS);
    assert_eq!(home.totals().0, 2 * calls);
    assert_eq!(away.totals().0, calls);
    assert!(home.countdown().load(std::sync::atomic::Ordering::SeqCst) > REDRAW);
}
