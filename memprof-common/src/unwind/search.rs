//! Searching the arena.

use core::hint::black_box;

use super::walk::Memory;

/// Of `count` values from word `first` on, `stride` words apart and ascending: the number
/// of the last that is not above `key`, or 0. Of each word `mask` is the value; neither it
/// nor the key has the highest bit set. None if a word is not there.
///
/// Without a branch that depends on what is found: the verifier would follow both of
/// each, and of each of the next. That it may be over early is one such branch, but of what
/// follows it the verifier has seen all by then.
#[inline(always)]
pub(super) fn search(
    memory: &impl Memory,
    first: u32,
    stride: u32,
    count: u32,
    steps: u32,
    key: u64,
    mask: u64,
) -> Option<u32> {
    let mut found = 0_u32;
    let mut length = count;
    let mut step = 0;
    while step < steps {
        // Most pages have far fewer rows than they may have.
        if black_box(length) <= 1 {
            break;
        }
        let half = length >> 1;
        let middle = found.wrapping_add(half);
        let value = memory.word(first.wrapping_add(middle.wrapping_mul(stride)))? & mask;
        let above = black_box((key.wrapping_sub(value) as i64 >> 63) as u32);
        found = found.wrapping_add(half & !above);
        length -= half;
        step += 1;
    }
    Some(found)
}
