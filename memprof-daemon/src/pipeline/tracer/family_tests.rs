use super::*;

const NAMED: u32 = 10;

fn family() -> (Family, Instant) {
    let mut family = Family::new();
    family.name(NAMED);
    (family, Instant::now())
}

const fn birth(pid: u32, parent: u32, at_ns: u64) -> Birth {
    Birth { pid, parent, at_ns }
}

/// Takes all that are due in the end.
fn take_all(family: &mut Family, now: Instant) -> Vec<u32> {
    let then = now + Duration::from_secs(1);
    std::iter::from_fn(|| family.take_due(then))
        .map(|(pid, _)| pid)
        .collect()
}

/// Check that children and theirs are taken on, and nobody else's.
#[test]
fn descendants() {
    let (mut family, now) = family();
    family.fork(birth(11, NAMED, 1), now);
    family.fork(birth(12, 11, 2), now);
    family.fork(birth(21, 20, 3), now);
    assert_eq!(family.take_due(now), None, "they may run another program");
    assert_eq!(take_all(&mut family, now), [11, 12]);
    assert_eq!((family.tally.found, family.waiting()), (2, 0));
    assert!(family.is_copy(12));
}

/// Check that a child which runs a program is due at once, and is no copy.
#[test]
fn program() {
    let (mut family, now) = family();
    family.fork(birth(11, NAMED, 1), now);
    family.exec(11, now);
    family.exec(21, now);
    let (pid, member) = family.take_due(now).expect("it is due");
    assert_eq!(
        (pid, member.is_copy, member.parent),
        (11, false, Some(NAMED))
    );
    // Its next program is BPF's to tell.
    family.exec(11, now);
    assert_eq!(family.next_due(), None);
}

/// Check that one which ends in between is counted as missed, and its child is followed.
#[test]
fn short_lives() {
    let (mut family, now) = family();
    family.fork(birth(11, NAMED, 1), now);
    family.fork(birth(12, 11, 2), now);
    family.exit(11);
    assert_eq!(family.tally.missed, 1);
    assert_eq!(take_all(&mut family, now), [12]);
    family.gone(12);
    assert_eq!((family.tally.found, family.tally.missed), (2, 2));
    // What its end is told of later changes nothing.
    family.exit(12);
    assert_eq!(family.tally.missed, 2);
}

/// Check that the order of records of several processors does not matter.
#[test]
fn grandchild_is_told_of_first() {
    let (mut family, now) = family();
    family.fork(birth(13, 12, 30), now);
    family.fork(birth(12, 11, 20), now);
    // Of another process, which had the pid before.
    family.fork(birth(14, 11, 5), now);
    family.fork(birth(11, NAMED, 10), now);
    let mut taken = take_all(&mut family, now);
    taken.sort_unstable();
    assert_eq!(taken, [11, 12, 13]);
}

/// Check that a process which has the pid of one that ended is nobody's child for that.
#[test]
fn pid_of_another() {
    let (mut family, now) = family();
    family.fork(birth(11, NAMED, 1), now);
    assert_eq!(take_all(&mut family, now), [11]);
    family.fork(birth(11, 20, 5), now);
    family.fork(birth(12, 11, 6), now);
    assert_eq!(take_all(&mut family, now), [0; 0]);
    // Word of the first one's end comes late.
    family.end_taken(11);
    family.fork(birth(11, NAMED, 7), now);
    family.end_taken(11);
    assert_eq!(take_all(&mut family, now), [11]);
}

/// Check that one which somebody has let go is not taken on again, nor its children, until it
/// is named.
#[test]
fn let_go() {
    let (mut family, now) = family();
    family.fork(birth(11, NAMED, 1), now);
    assert_eq!(take_all(&mut family, now), [11]);
    family.let_go(11);
    family.end_taken(11);
    family.exec(11, now);
    family.fork(birth(12, 11, 2), now);
    family.look(&HashMap::from([(11, NAMED), (13, 11)]), now, |_| true);
    family.try_failed(now);
    assert_eq!(take_all(&mut family, now), [0; 0]);
    family.name(11);
    family.fork(birth(14, 11, 3), now);
    assert_eq!(take_all(&mut family, now), [14]);
}

/// Check that a look finds what was there before, at any depth, but neither what has ended
/// meanwhile nor this process.
#[test]
fn look() {
    let (mut family, now) = family();
    let own = std::process::id();
    let parents = HashMap::from([
        (11, NAMED),
        (12, 11),
        (13, 12),
        (14, 12),
        (own, NAMED),
        (21, 20),
    ]);
    let is_there = |pid| pid != 14;
    assert!(family.look(&parents, now, is_there));
    let mut taken: Vec<(u32, Member)> = std::iter::from_fn(|| family.take_due(now)).collect();
    taken.sort_by_key(|(pid, _)| *pid);
    let pids: Vec<u32> = taken.iter().map(|(pid, _)| *pid).collect();
    assert_eq!(pids, [11, 12, 13]);
    assert!(
        taken
            .iter()
            .all(|(_, member)| member.born_ns.is_none() && !member.is_copy)
    );
    assert!(!family.look(&parents, now, is_there));
    // One of which no end was told.
    family.fork(birth(15, 11, 3), now);
    assert!(!family.look(&parents, now, is_there), "it was forked since");
    assert_eq!((family.tally.missed, family.waiting()), (0, 1));
    family.look(&parents, now, |pid| pid != 14 && pid != 15);
    assert_eq!((family.tally.missed, family.waiting()), (1, 0));
}

/// Check how one fares that cannot be traced: it is tried again, then left alone until it runs
/// another program or all are tried again.
#[test]
fn failures() {
    let (mut family, now) = family();
    family.fork(birth(11, NAMED, 1), now);
    for _ in 0..TRIES {
        assert_eq!(take_all(&mut family, now), [11]);
        assert!(family.try_again(11, now));
    }
    assert_eq!(take_all(&mut family, now), [11]);
    assert!(!family.try_again(11, now));
    assert_eq!(family.next_due(), None);
    family.exec(11, now);
    assert_eq!(take_all(&mut family, now), [11]);
    family.refuse(11);
    family.try_failed(now);
    assert_eq!(take_all(&mut family, now), [11]);
    family.refuse(11);
    family.exit(11);
    assert_eq!((family.tally.missed, family.tally.refused), (0, 1));
}

/// Check that one with its parent's memory is due again with its program.
#[test]
fn shared_memory() {
    let (mut family, now) = family();
    family.fork(birth(11, NAMED, 1), now);
    assert_eq!(take_all(&mut family, now), [11]);
    family.is_sharing(11);
    assert_eq!(family.next_due(), None);
    family.exec(11, now);
    assert_eq!(take_all(&mut family, now), [11]);
}

/// Check that it is bounded, that what found no room is counted, and that a member's end makes
/// room.
#[test]
fn bounded() {
    let (mut family, now) = family();
    for pid in 0..2 * MAX_MEMBERS as u32 {
        family.fork(birth(100 + pid, NAMED, 1), now);
        family.fork(birth(100_000 + pid, 99_999, 1), now);
    }
    assert_eq!(family.members.len(), MAX_MEMBERS);
    assert_eq!(family.queue.len(), MAX_MEMBERS - 1);
    assert_eq!(family.tally.refused, MAX_MEMBERS as u64 + 1);
    assert_eq!(family.strangers.len(), MAX_STRANGERS);
    family.exit(100);
    assert_eq!(family.members.len(), MAX_MEMBERS - 1);
}
