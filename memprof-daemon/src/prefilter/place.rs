//! Where there is room in an address space.

use std::ops::Range;

use crate::process::maps::MapsEntry;

const PAGE: u64 = 4096;
/// Nobody may map below (`vm.mmap_min_addr`, 64 KiB at the most usual).
const LOWEST: u64 = 0x1_0000;
/// The end of what a process can map, with four levels of page tables; the kernel goes
/// beyond with five only if asked (Documentation/arch/x86/x86_64/5level-paging.rst).
const HIGHEST: u64 = 0x7fff_ffff_f000;
/// How far a signed 32-bit displacement reaches, less a page for what lies between the
/// ends of instructions and of ranges.
const REACH: u64 = (1 << 31) - PAGE;
/// Kept free above the heap of brk(2), and below the first thread's stack: what the
/// kernel keeps there at least for the latter (arch/x86/mm/mmap.c, `mmap_base`).
const TO_GROW: u64 = 128 << 20;
/// Kept free beside other mappings where there is plenty: they may grow, by mremap(2) or
/// because allocators like one mapping after another.
const APART: u64 = 64 << 20;

/// Addresses at which `bytes` are free, best first, each in a gap of its own. All of it
/// is within reach of all of each range. Another thread may take a place at any time: map
/// there with `MAP_FIXED_NOREPLACE`, and try the next if it fails.
///
/// `maps` is as the kernel sorts it.
#[must_use]
pub fn free_places(maps: &[MapsEntry], within_reach_of: &[Range<u64>], bytes: u64) -> Vec<u64> {
    let bytes = bytes.max(1).next_multiple_of(PAGE);
    let lowest_end = within_reach_of.iter().map(|range| range.end).max();
    let highest_start = within_reach_of.iter().map(|range| range.start).min();
    // The first and the last address to begin at.
    let from = lowest_end.map_or(LOWEST, |end| end.saturating_sub(REACH).max(LOWEST));
    let from = from.next_multiple_of(PAGE);
    let to = highest_start.map_or(HIGHEST, |start| start.saturating_add(REACH).min(HIGHEST));
    let Some(to) = to.checked_sub(bytes) else {
        return Vec::new();
    };
    let near = within_reach_of.first().map(|range| range.start);
    let mut places: Vec<(bool, u64, u64)> = gaps(maps)
        .filter_map(|gap| {
            let (place, is_apart) = place_in(&gap, from, to & !(PAGE - 1), bytes)?;
            // With nothing to be near to, where the gap is largest.
            let rank = match near {
                Some(near) => place.abs_diff(near),
                None => u64::MAX - (gap.end - gap.start),
            };
            Some((!is_apart, rank, place))
        })
        .collect();
    places.sort_unstable();
    places.into_iter().map(|(_, _, place)| place).collect()
}

/// What is free, less what the heap and the stack grow into.
fn gaps(maps: &[MapsEntry]) -> impl Iterator<Item = Range<u64>> {
    let ends = maps.iter().map(|entry| {
        let grows = entry.path.as_os_str() == "[heap]";
        entry.end.0.saturating_add(if grows { TO_GROW } else { 0 })
    });
    let starts = maps.iter().map(|entry| {
        let grows = entry.path.as_os_str() == "[stack]";
        entry
            .start
            .0
            .saturating_sub(if grows { TO_GROW } else { 0 })
    });
    std::iter::once(LOWEST)
        .chain(ends)
        .zip(starts.chain([HIGHEST]))
        .map(|(start, end)| start..end.min(HIGHEST))
        .filter(|gap| gap.start < gap.end)
}

/// A place in `gap` that begins in `from..=to`, and whether it is apart from both ends.
fn place_in(gap: &Range<u64>, from: u64, to: u64, bytes: u64) -> Option<(u64, bool)> {
    let last = gap.end.checked_sub(bytes)?;
    let (from, to) = (from.max(gap.start), to.min(last));
    if from > to {
        return None;
    }
    let apart = (gap.start.saturating_add(APART), last.saturating_sub(APART));
    let (inner_from, inner_to) = (from.max(apart.0), to.min(apart.1));
    if inner_from <= inner_to {
        // Towards what it is to be near to: that is beyond the end that limits least.
        let place = if gap.end - to <= from - gap.start {
            inner_to
        } else {
            inner_from
        };
        return Some((place, true));
    }
    // As far from both as it can be.
    let middle = gap.start + (last - gap.start) / 2;
    Some((middle.clamp(from, to) & !(PAGE - 1), false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::maps::{parse_maps, read_maps};

    const GIB: u64 = 1 << 30;

    fn reaches(place: u64, bytes: u64, range: &Range<u64>) -> bool {
        (place + bytes).abs_diff(range.start) < 1 << 31 && range.end.abs_diff(place) < 1 << 31
    }

    fn is_free(maps: &[MapsEntry], place: u64, bytes: u64) -> bool {
        maps.iter()
            .all(|entry| entry.end.0 <= place || place + bytes <= entry.start.0)
    }

    /// Check the places in a program at a fixed address, with its heap behind it, as in
    /// one that is loaded anywhere: free, within reach, on whole pages, and out of the
    /// ways in which heap and stack grow.
    #[test]
    fn usual_programs() {
        let fixed = b"00400000-00500000 r-xp 00000000 fe:00 1 /p\n\
            00600000-00800000 rw-p 00000000 00:00 0 [heap]\n\
            7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]\n";
        let anywhere = b"555555554000-555555600000 r-xp 00000000 fe:00 1 /p\n\
            555555700000-555556000000 rw-p 00000000 00:00 0 [heap]\n\
            7ffff7c00000-7ffff7dd0000 r-xp 00000000 fe:00 2 /libc.so.6\n\
            7ffff7dd1000-7ffff7ff0000 rw-p 00000000 00:00 0\n\
            7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]\n";
        for (text, range) in [
            (&fixed[..], 0x40_0000..0x50_0000),
            (&anywhere[..], 0x5555_5555_4000..0x5555_5560_0000),
            (&anywhere[..], 0x7fff_f7c0_0000..0x7fff_f7dd_0000),
        ] {
            let maps = parse_maps(text).unwrap();
            let heap = maps.iter().find(|e| e.path.ends_with("[heap]")).unwrap();
            let stack = maps.last().unwrap();
            let places = free_places(&maps, std::slice::from_ref(&range), 0x3001);
            assert!(!places.is_empty());
            for place in places {
                assert_eq!(place % PAGE, 0);
                assert!(is_free(&maps, place, 0x4000), "{place:#x}");
                assert!(reaches(place, 0x4000, &range), "{place:#x}");
                let clear_of_heap = place + 0x4000 <= heap.start.0 || place >= heap.end.0 + TO_GROW;
                assert!(clear_of_heap, "{place:#x}");
                assert!(place + 0x4000 <= stack.start.0 - TO_GROW, "{place:#x}");
            }
        }
    }

    /// Check that the best place for code is apart from other mappings if any is, that
    /// ranges too far from each other have none, and that data may go anywhere.
    #[test]
    fn best_first() {
        let maps = read_maps(std::process::id()).unwrap();
        let libc = maps
            .iter()
            .find(|entry| entry.executable && entry.is_file())
            .unwrap();
        let range = libc.start.0..libc.end.0;
        let best = free_places(&maps, std::slice::from_ref(&range), 1 << 20)[0];
        assert!(is_free(&maps, best - APART / 2, APART), "{best:#x}");
        let far = range.start.wrapping_sub(5 * GIB)..range.start.wrapping_sub(5 * GIB) + 1;
        assert!(free_places(&maps, &[range, far], PAGE).is_empty());
        let anywhere = free_places(&maps, &[], 16 * GIB);
        assert!(is_free(&maps, anywhere[0], 16 * GIB));
    }

    /// Check places against a plain search: wherever one exists in a small address space
    /// of mappings at random (2,000 from a fixed seed), one is found, and it is right.
    #[test]
    fn agrees_with_a_plain_search() {
        let mut state = 5_u64;
        let mut next = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % bound
        };
        for _ in 0..2000 {
            let base = 0x7000_0000_0000;
            let unit = GIB / 4;
            let mut text = String::new();
            let mut at = base;
            for _ in 0..8 {
                let start = at + next(3) * unit;
                let end = start + (1 + next(4)) * unit;
                text += &format!("{start:x}-{end:x} r-xp 00000000 00:00 0\n");
                at = end;
            }
            let maps = parse_maps(text.as_bytes()).unwrap();
            let pick = &maps[next(8) as usize];
            let range = pick.start.0..pick.start.0 + PAGE;
            let bytes = (1 + next(3)) * unit;
            let found = free_places(&maps, std::slice::from_ref(&range), bytes);
            for &place in &found {
                assert!(is_free(&maps, place, bytes) && reaches(place, bytes, &range));
            }
            let exists = (0..64).map(|n| base - 16 * unit + n * unit).any(|place| {
                is_free(&maps, place, bytes)
                    && place + bytes <= range.start + REACH
                    && range.end <= place + REACH
            });
            assert!(!exists || !found.is_empty(), "{text} {range:x?} {bytes:#x}");
        }
    }
}
