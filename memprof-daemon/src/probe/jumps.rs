//! Jumps to behind the entries of functions, from anywhere in a file's code.

use std::{fs::File, io, ops::RangeInclusive, os::unix::fs::FileExt as _};

use crate::process::elf::{ElfError, Segment};

/// Code is read in pieces of this size.
const CHUNK_BYTES: usize = 256 << 10;
/// Code beyond this is not searched: the largest programs have half of it, and a
/// file can claim any size.
const MAX_CODE_BYTES: u64 = 1 << 30;
/// Opcode and displacement of the longest of the branches: `0f 8x` and 4 bytes.
const BRANCH_BYTES: usize = 6;
const DISPLACEMENT_BYTES: usize = 4;

/// Which of `ranges` of addresses are led to by branches with a 32-bit distance;
/// none if the file has more code than is searched.
///
/// Shorter branches reach only 128 bytes: those are within one function, whose
/// code tells. Instructions are not decoded, since where they start is not known
/// everywhere: every byte that could be such a branch's opcode counts as one. By
/// chance that hits a range of some bytes once in 2^30 places or less.
///
/// # Errors
///
/// The file cannot be read.
pub(crate) fn targets(
    file: &File,
    segments: &[Segment],
    ranges: &[RangeInclusive<u64>],
) -> Result<Option<Vec<bool>>, ElfError> {
    let mut hit = vec![false; ranges.len()];
    let first = ranges.iter().map(|range| *range.start()).min();
    let last = ranges.iter().map(|range| *range.end()).max();
    let (Some(first), Some(last)) = (first, last) else {
        return Ok(Some(hit));
    };
    let mut left = MAX_CODE_BYTES;
    for segment in segments.iter().filter(|segment| segment.executable) {
        let Some(rest) = left.checked_sub(segment.file_size) else {
            return Ok(None);
        };
        left = rest;
        for_each_target(file, segment, |target| {
            if (first..=last).contains(&target) {
                for (hit, range) in hit.iter_mut().zip(ranges) {
                    *hit |= range.contains(&target);
                }
            }
        })?;
    }
    Ok(Some(hit))
}

fn for_each_target(
    file: &File,
    segment: &Segment,
    mut on_target: impl FnMut(u64),
) -> Result<(), ElfError> {
    let mut buffer = vec![0; CHUNK_BYTES];
    // What is kept of the piece before: a branch may go on in the next.
    let mut kept = 0_usize;
    let mut read = 0_u64;
    loop {
        let left = usize::try_from(segment.file_size - read).unwrap_or(usize::MAX);
        let end = buffer.len().min(kept.saturating_add(left));
        let Some(space) = buffer.get_mut(kept..end).filter(|space| !space.is_empty()) else {
            return Ok(());
        };
        let at = segment.file_offset.0.saturating_add(read);
        let length = match file.read_at(space, at) {
            // A segment can claim more than the file has.
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        let window = buffer.get(..kept + length).unwrap_or_default();
        let start = segment
            .address
            .0
            .wrapping_add(read)
            .wrapping_sub(kept as u64);
        targets_in(window, start, &mut on_target);
        read += length as u64;
        // One less than a branch, or the last would count again; that does no
        // harm, but a shorter one at the very end does not.
        let keep = (BRANCH_BYTES - 1).min(kept + length);
        buffer.copy_within(kept + length - keep..kept + length, 0);
        kept = keep;
    }
}

/// `window` begins at `address`.
fn targets_in(window: &[u8], address: u64, on_target: &mut impl FnMut(u64)) {
    let mut before = 0;
    for (at, bytes) in window.windows(1 + DISPLACEMENT_BYTES).enumerate() {
        let &[opcode, a, b, c, d] = bytes else {
            continue;
        };
        // call, jmp; jcc
        if matches!(opcode, 0xe8 | 0xe9) || (before == 0x0f && matches!(opcode, 0x80..=0x8f)) {
            let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
            let behind = address.wrapping_add((at + bytes.len()) as u64);
            on_target(behind.wrapping_add_signed(distance));
        }
        before = opcode;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{FileOffset, VirtOffset};
    use std::io::Write as _;

    const ADDRESS: u64 = 0x40_0000;

    fn segment(file_size: u64) -> Segment {
        Segment {
            file_offset: FileOffset(0),
            address: VirtOffset(ADDRESS),
            file_size,
            executable: true,
        }
    }

    fn search(code: &[u8], ranges: &[RangeInclusive<u64>]) -> Vec<bool> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(code).unwrap();
        targets(&file, &[segment(code.len() as u64)], ranges)
            .unwrap()
            .unwrap()
    }

    /// Check that each kind of branch is found wherever it stands, also across
    /// the pieces in which code is read, and only where it leads.
    #[test]
    fn every_branch_everywhere() {
        let opcodes: [&[u8]; 4] = [&[0xe8], &[0xe9], &[0x0f, 0x80], &[0x0f, 0x8f]];
        let goal = ADDRESS + 0x1002;
        for opcode in opcodes {
            let length = opcode.len() + 4;
            for at in (0..8).chain(CHUNK_BYTES - 8..CHUNK_BYTES + 2) {
                let mut code = vec![0x90; CHUNK_BYTES + 8];
                let distance = goal as i64 - (ADDRESS as i64 + (at + length) as i64);
                code[at..at + opcode.len()].copy_from_slice(opcode);
                code[at + opcode.len()..at + length]
                    .copy_from_slice(&(distance as i32).to_le_bytes());
                let found = search(
                    &code,
                    &[goal..=goal, goal - 9..=goal - 1, goal + 1..=goal + 9],
                );
                assert_eq!(found, [true, false, false], "{opcode:x?} at {at:#x}");
            }
        }
    }

    /// Check that other instructions with a displacement are no jumps, that a
    /// branch whose displacement the file does not have is none, and that no
    /// ranges need no search.
    #[test]
    fn no_branches() {
        let goal = ADDRESS + 5;
        assert_eq!(search(&[0x05, 0, 0, 0, 0], &[goal..=goal]), [false]);
        assert_eq!(
            search(&[0x1f, 0x84, 0, 0, 0, 0], &[goal + 1..=goal + 1]),
            [false]
        );
        assert_eq!(search(&[0xe8, 0, 0, 0], &[goal..=goal]), [false]);
        assert_eq!(search(&[0xe8, 0, 0, 0, 0], &[goal..=goal]), [true]);
        assert!(search(&[0xe8, 0, 0, 0, 0], &[]).is_empty());
    }

    /// Check that a file that claims more code than it has is read to its end,
    /// and that one that claims more than is searched is not read.
    #[test]
    fn claimed_sizes() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xe8, 0, 0, 0, 0]).unwrap();
        let goal = ADDRESS + 5;
        let search = |size| targets(&file, &[segment(size)], &[goal..=goal]).unwrap();
        assert_eq!(search(MAX_CODE_BYTES), Some(vec![true]));
        assert_eq!(search(MAX_CODE_BYTES + 1), None);
        assert_eq!(search(u64::MAX), None);
    }
}
