use super::*;

const HOST: Host = Host {
    cpus: 2,
    traces_all: true,
};

const MIB: u64 = 1 << 20;

fn budget(max: MaxMemory, wanted: WantedSizes) -> Result<Budget, TooLittle> {
    Budget::new(max, &wanted, HOST)
}

fn of(bytes: u64) -> Budget {
    budget(MaxMemory::Bytes(bytes), WantedSizes::default()).unwrap()
}

fn least_bytes() -> u64 {
    budget(MaxMemory::Bytes(0), WantedSizes::default())
        .unwrap_err()
        .least_bytes
}

/// Check that what is given out, with the least room, is never more than the limit, for
/// limits from the least on, and that more memory makes nothing smaller.
#[test]
fn parts_fit_the_limit() {
    let least = least_bytes();
    let mut before = Sizes {
        ring_bytes: 0,
        live_entries: 0,
        stack_entries: 0,
        in_flight_entries: 0,
    };
    for max in (least..4096 * MIB).step_by(7_654_321) {
        let budget = of(max);
        let room = budget.limits.unwrap().room_bytes;
        assert!(room >= LEAST_ROOM_BYTES, "{max}: {budget:?}");
        assert_eq!(of_all(&budget.sizes, HOST) + room, max);
        let sizes = budget.sizes;
        assert!(sizes.ring_bytes.is_power_of_two());
        assert!(sizes.ring_bytes >= before.ring_bytes);
        assert!(sizes.live_entries >= before.live_entries);
        assert!(sizes.stack_entries >= before.stack_entries);
        assert!(sizes.in_flight_entries >= before.in_flight_entries);
        before = sizes;
    }
}

/// Check that the limit that is in force by itself leaves all maps as they are without one,
/// and that a host whose processors take more gets more.
#[test]
fn default_shrinks_nothing() {
    let default = budget(MaxMemory::Default, WantedSizes::default()).unwrap();
    let unlimited = budget(MaxMemory::Unlimited, WantedSizes::default()).unwrap();
    assert_eq!(default.max_bytes(), Some(DEFAULT_BYTES));
    assert_eq!(unlimited.max_bytes(), None);
    assert_eq!(default.sizes, unlimited.sizes);
    assert_eq!(default.sizes, Sizes::default());
    assert!(default.limits.unwrap().room_bytes > 200 * MIB);
    let host = Host { cpus: 2048, ..HOST };
    let large = Budget::new(MaxMemory::Default, &WantedSizes::default(), host).unwrap();
    assert!(large.max_bytes() > Some(DEFAULT_BYTES), "{large:?}");
}

/// Check that the least is named, that it does, and that it is as little as promised.
#[test]
fn too_little_names_the_least() {
    let refused = budget(MaxMemory::Bytes(MIB), WantedSizes::default()).unwrap_err();
    let least = refused.least_bytes;
    assert!((24 * MIB..64 * MIB).contains(&least), "{least}");
    assert!(budget(MaxMemory::Bytes(least - 1), WantedSizes::default()).is_err());
    assert_eq!(of(least).sizes, self::least(&WantedSizes::default()));
    let words = refused.to_string();
    assert!(words.contains(&format!(": {}MiB is the least", least.div_ceil(MIB))));
    // What is named is enough.
    of(least.div_ceil(MIB) * MIB);
}

/// Check that sizes that were asked for are kept, and the others make room for them; and that
/// such as do not fit are refused with what they need.
#[test]
fn wanted_sizes_are_kept() {
    let wanted = WantedSizes {
        ring_bytes: Some(64 << 20),
        stack_entries: Some(8),
        ..WantedSizes::default()
    };
    let kept = budget(MaxMemory::Bytes(256 * MIB), wanted).unwrap();
    assert_eq!(
        (kept.sizes.ring_bytes, kept.sizes.stack_entries),
        (64 << 20, 8)
    );
    assert!(kept.sizes.live_entries < of(256 * MIB).sizes.live_entries);
    let refused = budget(MaxMemory::Bytes(64 * MIB), wanted).unwrap_err();
    assert!(refused.sizes_wanted_too && refused.least_bytes > 64 * MIB);
    assert!(refused.to_string().contains("sizes of maps that are asked"));
    assert!(budget(MaxMemory::Bytes(refused.least_bytes), wanted).is_ok());
}

/// Check the order of what is done while more and more is taken: first what can be
/// is given back, then stacks and tables stop growing, and no process is taken on.
#[test]
fn orders_follow_what_is_spent() {
    let budget = of(256 * MIB);
    let room = budget.limits.unwrap().room_bytes;
    let at = |share: u64| {
        let usage = Usage {
            stack_bytes: MIB,
            table_bytes: 2 * MIB,
            resident_bytes: BASE_BYTES + room / 100 * share - 2 * MIB,
            ..Usage::default()
        };
        assert!(usage.spent().abs_diff(room / 100 * share) < 10);
        (usage, budget.orders(&usage, &Orders::default()))
    };
    let (_, low) = at(10);
    assert!(!low.gives_back && !low.refuses_targets);
    assert_eq!(low.max_stack_bytes, Some(room / 6));
    assert!(low.max_table_bytes.unwrap() > room / 2);
    assert!(!at(74).1.gives_back);
    let (usage, high) = at(80);
    assert!(high.gives_back && !high.refuses_targets);
    assert!(high.max_stack_bytes > Some(MIB) && high.max_stack_bytes < low.max_stack_bytes);
    let (_, top) = at(95);
    assert_eq!(top.max_stack_bytes, Some(MIB));
    assert!(top.gives_back && top.refuses_targets);
    // One can always be made.
    assert!(low.max_profiles > 8 && top.max_profiles == 1);
    assert_eq!(top.max_table_bytes, Some(2 * MIB));
    // Refused until there is room again.
    assert!(budget.orders(&usage, &top).refuses_targets);
    assert!(!budget.orders(&at(60).0, &top).refuses_targets);
}

/// Check that ended processes are forgotten before their stacks leave no room for others'.
#[test]
fn stacks_of_ended_processes_make_room() {
    let budget = of(256 * MIB);
    let most = budget.limits.unwrap().room_bytes / 6;
    let orders = |stack_bytes| {
        let usage = Usage {
            stack_bytes,
            resident_bytes: BASE_BYTES + stack_bytes,
            ..Usage::default()
        };
        budget.orders(&usage, &Orders::default())
    };
    assert!(!orders(most / 4 * 3).forgets_ended);
    let full = orders(most / 10 * 9);
    assert!(full.forgets_ended && !full.gives_back);
    assert!(full.max_stack_bytes > Some(most / 10 * 9));
}

/// Check that blocks, which have room of their own, take none of the others'.
#[test]
fn blocks_have_their_reserve() {
    let budget = of(256 * MIB);
    let usage = Usage {
        block_bytes: 60 * MIB,
        resident_bytes: BASE_BYTES + 61 * MIB,
        ..Usage::default()
    };
    assert_eq!(usage.spent(), MIB);
    assert!(!budget.orders(&usage, &Orders::default()).gives_back);
    assert_eq!(usage.other_bytes(), BASE_BYTES + MIB);
}

/// Check that nothing is ordered without a limit.
#[test]
fn no_orders_without_a_limit() {
    let unlimited = budget(MaxMemory::Unlimited, WantedSizes::default()).unwrap();
    let usage = Usage {
        resident_bytes: u64::MAX / 2,
        ..Usage::default()
    };
    let orders = unlimited.orders(&usage, &Orders::default());
    assert_eq!(orders, Orders::default());
}
