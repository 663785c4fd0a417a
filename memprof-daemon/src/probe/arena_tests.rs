use super::*;
use crate::probe::loader::{LoadOptions, load};

/// Needs root, as everything that loads BPF.
fn arena() -> (Arena, SlabMaker) {
    load(&LoadOptions::default())
        .expect("run as root")
        .maps
        .arena
}

fn store((arena, maker): &mut (Arena, SlabMaker), words: &[u64]) -> Words {
    loop {
        if let Some(stored) = arena.store(words).unwrap() {
            assert!(arena.slabs.len() as u32 == maker.made);
            return stored;
        }
        arena.add(maker.make().unwrap());
    }
}

fn read(maker: &SlabMaker, place: u32) -> u64 {
    let slab = maker.slabs_map.get(&(place / SLAB_WORDS), 0).unwrap();
    let map: Array<MapData, u64> = aya::maps::Map::Array(slab).try_into().unwrap();
    map.get(&(place % SLAB_WORDS), 0).unwrap()
}

/// Check that BPF's maps hold what was stored, also across slabs, and that nothing
/// overlaps.
#[test]
fn stores_across_slabs() {
    let mut arena = arena();
    assert_eq!(arena.0.store(&[1]).unwrap(), None);
    let small = store(&mut arena, &[1, 2, 3]);
    let large: Vec<u64> = (0..u64::from(SLAB_WORDS) * 2).collect();
    let stored = store(&mut arena, &large);
    assert_eq!(arena.0.bytes(), 3 << 20);
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
        assert_eq!(read(&arena.1, place), expected);
    }
}

/// Check that words which were given back are not used at once, that later they are,
/// and that walks are told before.
#[test]
fn words_rest_before_they_are_used_again() {
    let mut arena = arena();
    let all = vec![7; SLAB_WORDS as usize];
    let first = store(&mut arena, &all);
    arena.0.give_back(first);
    let second = store(&mut arena, &all);
    assert_ne!(first, second);
    assert_eq!(arena.0.reuses_map.get(&0, 0).unwrap(), 0);
    arena.0.give_back(second);
    let long_ago = Instant::now().checked_sub(REST * 2).unwrap();
    for (since, _) in &mut arena.0.resting {
        *since = long_ago;
    }
    // Both together are one free range again.
    let both = store(&mut arena, &vec![8; SLAB_WORDS as usize * 2]);
    assert_eq!(both.first, 0);
    assert_eq!(arena.0.bytes(), 2 << 20);
    assert_eq!(arena.0.reuses_map.get(&0, 0).unwrap(), 1);
}
