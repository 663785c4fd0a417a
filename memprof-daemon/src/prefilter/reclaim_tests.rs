use super::*;

/// Check that a shard is given back if its owner is none of the threads, and only then.
#[test]
fn owners_without_a_thread() {
    let owners = [(0x1000, 11), (0x2000, 22), (0x3000, 33)];
    let living = |threads: &[u64]| threads.iter().copied().collect::<HashSet<u64>>();
    assert_eq!(of_none(&owners, &living(&[22, 44])), [0x1000, 0x3000]);
    assert!(of_none(&owners, &living(&[33, 22, 11])).is_empty());
    assert_eq!(of_none(&owners, &living(&[])), [0x1000, 0x2000, 0x3000]);
}

/// Check that the first uncounted call is acted on at once, that nothing happens without new
/// ones, that the waits double while a stop does not help for long, up to the longest, and are
/// the shortest again after a calm.
#[test]
fn stops_become_rare() {
    let begin = Instant::now();
    let mut pace = Pace::default();
    assert!(!pace.is_due(0, begin));
    let mut now = begin;
    let mut waits = Vec::new();
    let mut last: Option<Instant> = None;
    // A call that is not counted at each tick.
    for tick in 1..40_000 {
        now = begin + Duration::from_millis(100) * tick;
        if pace.is_due(tick.into(), now) {
            waits.extend(last.map(|last| (now - last).as_secs()));
            last = Some(now);
        }
    }
    assert_eq!(waits, [10, 20, 40, 80, 160, 320, 600, 600, 600, 600, 600]);
    let calls = 40_000;
    assert!(!pace.is_due(pace.seen, now + 3 * LONGEST_WAIT));
    assert!(pace.is_due(calls, now + 3 * LONGEST_WAIT));
    assert!(!pace.is_due(calls + 1, now + 3 * LONGEST_WAIT + SHORTEST_WAIT / 2));
    assert!(pace.is_due(calls + 1, now + 3 * LONGEST_WAIT + SHORTEST_WAIT));
}
