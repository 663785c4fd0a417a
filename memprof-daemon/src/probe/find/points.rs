//! The instructions to probe in one file: for each function that it defines, what
//! its own code and the jumps in the rest of the file allow.

use std::{fs::File, io, ops::RangeInclusive, os::unix::fs::FileExt as _};

use memprof_common::function::Function;

use super::{FoundSite, Symbol};
use crate::{
    address::{FileOffset, VirtOffset},
    probe::{
        jumps,
        point::{self, Code, ProbePoint, Refusal},
    },
    process::elf::{ElfError, ElfLayout},
};

/// Code of a function that is read: its first instructions, and those that could
/// jump back to them over a short distance.
const MAX_CODE_BYTES: u64 = 4096;

/// Where a function is. Compares by place, then by `Function::ALL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    file_offset: FileOffset,
    order: usize,
    function: Function,
    address: u64,
    /// 0 if it is not known.
    size: u64,
}

impl Place {
    pub(super) fn of(layout: &ElfLayout, symbol: &Symbol, function: Function) -> Option<Self> {
        Some(Self {
            file_offset: layout.code_offset(symbol.address)?,
            order: Function::ALL.iter().position(|&each| each == function)?,
            function,
            address: symbol.address.0,
            size: symbol.size,
        })
    }
}

/// Adds those functions that have no place yet, and one in `local`. Those that have several
/// there are left out and returned: which of them the program allocates by is not known.
pub(super) fn add_local(places: &mut Vec<Place>, mut local: Vec<Place>) -> Vec<Function> {
    local.retain(|place| !places.iter().any(|known| known.function == place.function));
    let mut ambiguous = Vec::new();
    for &function in Function::ALL {
        let mut of_it = local.iter().filter(|place| place.function == function);
        let Some(first) = of_it.next() else {
            continue;
        };
        if of_it.all(|other| other.file_offset == first.file_offset) {
            places.push(*first);
        } else {
            ambiguous.push(function);
        }
    }
    ambiguous
}

/// A place where a function starts, or several.
pub(super) struct Start {
    place: Place,
    aliases: Vec<Function>,
}

/// The places without repetition, each with all functions that start there; in
/// order.
pub(super) fn starts(mut places: Vec<Place>) -> Vec<Start> {
    places.sort_unstable();
    places.dedup_by(|next, kept| {
        let same = (next.file_offset, next.order) == (kept.file_offset, kept.order);
        if same {
            kept.size = kept.size.max(next.size);
        }
        same
    });
    let mut starts: Vec<Start> = Vec::new();
    for place in places {
        match starts.last_mut() {
            Some(start) if start.place.file_offset == place.file_offset => {
                start.place.size = start.place.size.max(place.size);
                start.aliases.push(place.function);
            }
            _ => starts.push(Start {
                place,
                aliases: Vec::new(),
            }),
        }
    }
    starts
}

/// Chooses the instruction to probe for each of `starts`, which are in order.
pub(super) fn choose_all(
    file: &File,
    layout: &ElfLayout,
    starts: Vec<Start>,
) -> Result<Vec<FoundSite>, ElfError> {
    let mut sites = Vec::with_capacity(starts.len());
    let mut codes = Vec::with_capacity(starts.len());
    let mut rest = starts.into_iter().peekable();
    while let Some(Start { place, aliases }) = rest.next() {
        // No function reaches into the next one: a place there is a call of that.
        let to_next = rest.peek().map_or(MAX_CODE_BYTES, |next| {
            next.place.file_offset.0.saturating_sub(place.file_offset.0)
        });
        let size = if place.size == 0 {
            MAX_CODE_BYTES
        } else {
            place.size
        };
        let code_bytes = size
            .min(to_next)
            .min(MAX_CODE_BYTES)
            .min(layout.code_bytes_from(VirtOffset(place.address)));
        let bytes = read_code(file, place.file_offset, code_bytes)?;
        let code = Code {
            bytes: &bytes,
            address: place.address,
        };
        sites.push(FoundSite {
            function: place.function,
            file_offset: place.file_offset,
            aliases,
            code_bytes,
            point: point::choose(place.function, code),
        });
        codes.push((place.address, bytes));
    }

    // All in one go: the file can be large.
    let (moved, ranges): (Vec<usize>, Vec<RangeInclusive<u64>>) = sites
        .iter()
        .zip(&codes)
        .enumerate()
        .filter(|(_, (site, _))| site.point.offset > 0)
        .map(|(number, (site, (address, _)))| {
            let last = address.saturating_add(u64::from(site.point.offset));
            (number, address.saturating_add(1)..=last)
        })
        .unzip();
    let hits = jumps::targets(file, &layout.segments, &ranges)?;
    for (order, number) in moved.into_iter().enumerate() {
        let refusal = match hits.as_ref().map(|hits| hits.get(order)) {
            Some(Some(false)) => continue,
            Some(_) => Refusal::JumpTarget,
            None => Refusal::FileTooLarge,
        };
        if let (Some(site), Some((address, bytes))) = (sites.get_mut(number), codes.get(number)) {
            let code = Code {
                bytes,
                address: *address,
            };
            site.point = ProbePoint::entry(code, refusal);
        }
    }
    Ok(sites)
}

/// The first bytes of a function as the file has them, `size` at most: memory
/// may hold breakpoints of others.
pub(super) fn read_code(file: &File, start: FileOffset, size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(size.min(MAX_CODE_BYTES)).unwrap_or(0)];
    let mut length = 0;
    while let Some(space) = bytes.get_mut(length..).filter(|space| !space.is_empty()) {
        match file.read_at(space, start.0.saturating_add(length as u64)) {
            // A segment can claim more than the file has.
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(length);
    Ok(bytes)
}
