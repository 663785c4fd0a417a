use super::*;
use crate::probe::loader::{LoadOptions, load};

/// Needs root, as everything that loads BPF.
fn arena() -> Arena {
    load(&LoadOptions::default())
        .expect("run as root")
        .maps
        .arena
}

fn read(arena: &Arena, place: u32) -> u64 {
    let slab = arena.slabs_map.get(&(place / SLAB_WORDS), 0).unwrap();
    let map: Array<MapData, u64> = aya::maps::Map::Array(slab).try_into().unwrap();
    map.get(&(place % SLAB_WORDS), 0).unwrap()
}

/// Check that BPF's maps hold what was stored, also across slabs, and that nothing
/// overlaps.
#[test]
fn stores_across_slabs() {
    let mut arena = arena();
    let small = arena.store(&[1, 2, 3]).unwrap();
    let large: Vec<u64> = (0..u64::from(SLAB_WORDS) * 2).collect();
    let stored = arena.store(&large).unwrap();
    assert_eq!(arena.bytes(), 3 << 20);
    assert!(stored.first >= small.first + small.count);
    for (place, expected) in [
        (small.first, 1),
        (small.first + 2, 3),
        (stored.first, 0),
        (stored.first + SLAB_WORDS - 1, u64::from(SLAB_WORDS) - 1),
        (
            stored.first + SLAB_WORDS * 2 - 1,
            u64::from(SLAB_WORDS) * 2 - 1,
        ),
    ] {
        assert_eq!(read(&arena, place), expected);
    }
}

/// Check that words which were given back are not used at once, that later they are,
/// and that walks are told before.
#[test]
fn words_rest_before_they_are_used_again() {
    let mut arena = arena();
    let all = vec![7; SLAB_WORDS as usize];
    let first = arena.store(&all).unwrap();
    arena.give_back(first);
    let second = arena.store(&all).unwrap();
    assert_ne!(first, second);
    assert_eq!(arena.reuses_map.get(&0, 0).unwrap(), 0);
    arena.give_back(second);
    let long_ago = Instant::now().checked_sub(REST * 2).unwrap();
    for (since, _) in &mut arena.resting {
        *since = long_ago;
    }
    // Both together are one free range again.
    let both = arena.store(&vec![8; SLAB_WORDS as usize * 2]).unwrap();
    assert_eq!(both.first, 0);
    assert_eq!(arena.bytes(), 2 << 20);
    assert_eq!(arena.reuses_map.get(&0, 0).unwrap(), 1);
}
