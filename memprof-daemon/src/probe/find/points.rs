//! The instructions to probe in one file: for each function that it defines, what
//! its own code and the jumps in the rest of the file allow.

use std::{fs::File, io, ops::RangeInclusive, os::unix::fs::FileExt as _};

use super::{
    FoundSite, Symbol, flows,
    linkage::{Goal, Linkage, passes_on_to},
    names::{Family, Known},
};
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

/// An `endbr64` and a jump.
const THUNK_BYTES: u64 = 16;

/// Where a function is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    file_offset: FileOffset,
    /// In the catalog.
    order: usize,
    address: u64,
    /// 0 if it is not known.
    size: u64,
    /// What is there.
    pub(super) known: Known,
}

impl Place {
    /// The place of a function that has this place in the catalog.
    pub(super) fn of(
        layout: &ElfLayout,
        symbol: &Symbol,
        (order, known): (usize, Known),
    ) -> Option<Self> {
        Some(Self {
            file_offset: layout.code_offset(symbol.address)?,
            order,
            address: symbol.address.0,
            size: symbol.size,
            known,
        })
    }
}

/// Adds those functions that have no place yet, and one in `local`. Those that have several
/// there are left out and returned: which of them the program allocates by is not known. A
/// pool's are all that have the name: what is static in a header is in each part of a program
/// that has made no inline code of it.
pub(super) fn add_local(places: &mut Vec<Place>, local: Vec<Place>) -> Vec<&'static str> {
    let (pools, mut local): (Vec<Place>, Vec<Place>) = local
        .into_iter()
        .partition(|place| place.known.family == Family::Pool);
    local.retain(|place| !places.iter().any(|known| known.order == place.order));
    places.extend(pools);
    local.sort_unstable_by_key(|place| place.order);
    let mut ambiguous = Vec::new();
    for of_it in local.chunk_by(|a, b| a.order == b.order) {
        let Some(first) = of_it.first() else {
            continue;
        };
        if of_it
            .iter()
            .all(|other| other.file_offset == first.file_offset)
        {
            places.push(*first);
        } else {
            ambiguous.push(first.known.symbol);
        }
    }
    ambiguous
}

/// A place where a function starts, or several.
pub(super) struct Start {
    place: Place,
    aliases: Vec<&'static str>,
}

/// The places without repetition, each with all functions that start there; in
/// order.
pub(super) fn starts(mut places: Vec<Place>) -> Vec<Start> {
    places.sort_unstable_by_key(|place| (place.file_offset, place.order));
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
                start.aliases.push(place.known.symbol);
            }
            _ => starts.push(Start {
                place,
                aliases: Vec::new(),
            }),
        }
    }
    starts
}

/// The functions that are nothing but a jump to another of them are names of that one: each
/// call of them is seen there, with the arguments that it has, and would count twice.
fn without_thunks(
    file: &File,
    layout: &ElfLayout,
    starts: Vec<Start>,
) -> Result<Vec<Start>, ElfError> {
    let mut linkage = Linkage::new(file, layout);
    let mut goals = Vec::with_capacity(starts.len());
    for Start { place, .. } in &starts {
        let code = read_code(file, place.file_offset, THUNK_BYTES)?;
        let goal = passes_on_to(&code, place.address);
        goals.push(match goal {
            Some(Goal::Code(address))
                if starts.iter().any(|start| start.place.address == address) =>
            {
                Some(address)
            }
            Some(goal) => linkage.resolve(goal),
            None => None,
        });
    }
    let number = |address: Option<u64>| {
        let is_there = |start: &Start| Some(start.place.address) == address;
        address.and_then(|_| starts.iter().position(is_there))
    };
    // Each leads to one that is no such jump, or is one of a hostile file's circle.
    let ends: Vec<usize> = (0..starts.len())
        .map(|start| {
            let mut end = start;
            for _ in 0..starts.len() {
                match number(goals.get(end).copied().flatten()) {
                    Some(next) => end = next,
                    None => return end,
                }
            }
            start
        })
        .collect();
    let mut aliases: Vec<Vec<&'static str>> = starts.iter().map(|_| Vec::new()).collect();
    let mut kept = Vec::with_capacity(starts.len());
    for (number, (start, end)) in starts.into_iter().zip(ends).enumerate() {
        if number == end {
            kept.push((number, start));
        } else if let Some(aliases) = aliases.get_mut(end) {
            aliases.push(start.place.known.symbol);
            aliases.extend(start.aliases);
        }
    }
    Ok(kept
        .into_iter()
        .map(|(number, mut start)| {
            let more = aliases.get_mut(number).map(std::mem::take);
            start.aliases.extend(more.unwrap_or_default());
            start
        })
        .collect())
}

/// Chooses the instruction to probe for each of `starts`, which are in order.
pub(super) fn choose_all(
    file: &File,
    layout: &ElfLayout,
    starts: Vec<Start>,
) -> Result<Vec<FoundSite>, ElfError> {
    let starts = without_thunks(file, layout, starts)?;
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
        let Known {
            symbol,
            function,
            places,
            ..
        } = place.known;
        sites.push(FoundSite {
            function,
            symbol,
            file_offset: place.file_offset,
            aliases,
            code_bytes,
            places,
            point: point::choose(function, places, code),
            returns: Vec::new(),
            twin: None,
            passes_on: Vec::new(),
        });
        codes.push((place.address, bytes));
    }

    flows::look_into(file, layout, &mut sites, &mut codes);

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
