//! What is to be put into a process, prepared while it runs: where it goes, and its bytes. So
//! a stop is for calls and writes alone.
//!
//! A plan is of the program that was there when it was made. That may have been replaced since,
//! or have mapped something where the plan puts its own. So with all threads stopped it is
//! looked whether the code to be changed is still that; and memory is only taken where none is.

use std::ops::Range;

use memprof_common::prefilter::SiteKind;

use super::{
    attach::{DataPlace, Image, ModuleHooks, Order},
    error::PrefilterError,
    halt::living_thread,
    hooks::Hook,
    image::{MallocNests, Patch, assemble_for, code_bytes},
    layout::Geometry,
    map::{FILE_NAME, pages},
    moves::Move,
    place::free_places,
    stack_rows::{CodeRows, Row},
    stop::Stopped,
    stop_error::StopError,
    within::mapping_at,
};
use crate::{
    address::{AbsAddr, FileOffset},
    process::maps::{MapsEntry, read_maps},
};

/// The stubs of a module.
#[derive(Debug)]
pub(super) struct PlannedCode {
    /// Where they go.
    pub(super) range: Range<u64>,
    /// Where in the memory file.
    pub(super) offset: u64,
    /// Whole pages, or less.
    pub(super) bytes: Vec<u8>,
    /// How stacks are walked through it.
    rows: Vec<Row>,
}

/// What is to be mapped and written.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) place: DataPlace,
    /// The data is part of it, and not there already.
    pub(super) owns_data: bool,
    pub(super) file_bytes: u64,
    pub(super) code: Vec<PlannedCode>,
    /// Where to probe, in the file.
    pub(super) sites: Vec<(SiteKind, FileOffset)>,
    patches: Vec<Patch>,
    moves: Vec<Move>,
    text: Vec<Text>,
}

/// First instructions as they were.
#[derive(Debug)]
struct Text {
    address: u64,
    bytes: Vec<u8>,
    of: Option<Mapped>,
}

/// What is mapped at an address: device, inode, and where the file would begin.
type Mapped = (u32, u32, u64, u64);

fn mapped_at(maps: &[MapsEntry], address: u64) -> Option<Mapped> {
    let entry = mapping_at(maps, address)?;
    let begin = entry.start.0.wrapping_sub(entry.file_offset.0);
    Some((entry.device_major, entry.device_minor, entry.inode, begin))
}

/// Plans stubs for `modules`, and data if there is none.
///
/// # Errors
///
/// [`PrefilterError`]: there is no room, or they cannot be made.
pub(super) fn plan(order: &Order<'_>, modules: &[ModuleHooks]) -> Result<Plan, PrefilterError> {
    let mut maps = read_maps(living_thread(order.process.pid())?)?;
    let text = text(&maps, modules);
    let (place, owns_data) = match &order.image {
        Some(place) => (place.clone(), false),
        None => (data_place(&mut maps, modules, order.geometry)?, true),
    };
    // One module's functions may call another's.
    let nests = if modules.len() > 1 || !owns_data {
        MallocNests::Yes
    } else {
        MallocNests::No
    };
    let mut offset = if owns_data {
        place.geometry.shared_bytes() as u64
    } else {
        0
    };
    let (mut code, mut patches) = (Vec::new(), Vec::new());
    let (mut sites, mut moves) = (Vec::new(), Vec::new());
    for module in modules {
        let length = pages(code_bytes(module.hooks.len()) as u64);
        let range = code_place(&mut maps, module, length)?;
        let (at, data) = (range.start, place.range.start);
        let image = assemble_for(at, data, place.geometry, &module.hooks, nests)?;
        if image.bytes.len() as u64 > length {
            return Err(PrefilterError::NotMapped);
        }
        code.push(PlannedCode {
            range,
            offset,
            bytes: image.bytes,
            rows: image.rows,
        });
        let in_file = |&(kind, within): &(SiteKind, u64)| (kind, FileOffset(offset + within));
        sites.extend(image.sites.iter().map(in_file));
        patches.extend(in_order(image.patches, &module.hooks));
        moves.extend(image.moves);
        offset += length;
    }
    // Over all modules: no block is to be freed unseen.
    patches.sort_by_key(|&(is_free, _)| !is_free);
    Ok(Plan {
        place,
        owns_data,
        file_bytes: offset,
        code,
        sites,
        patches: patches.into_iter().map(|(_, patch)| patch).collect(),
        moves,
        text,
    })
}

fn text(maps: &[MapsEntry], modules: &[ModuleHooks]) -> Vec<Text> {
    let hooks = modules.iter().flat_map(|module| &module.hooks);
    hooks
        .map(|hook| Text {
            address: hook.displaced.address,
            bytes: hook.displaced.bytes.clone(),
            of: mapped_at(maps, hook.displaced.address),
        })
        .collect()
}

/// Room for the data, which may be anywhere: near the code it is out of the way of what large
/// memory is mapped for.
fn data_place(
    maps: &mut Vec<MapsEntry>,
    modules: &[ModuleHooks],
    geometry: Geometry,
) -> Result<DataPlace, PrefilterError> {
    let no_place = || PrefilterError::NoPlace {
        module: modules
            .first()
            .map(|module| module.path.clone())
            .unwrap_or_default(),
    };
    let shared = geometry.shared_bytes() as u64;
    let bytes = shared + geometry.private_bytes() as u64;
    let near: Vec<Range<u64>> = modules
        .iter()
        .flat_map(|module| module.hooks.first())
        .map(|hook| hook.displaced.range())
        .take(1)
        .collect();
    let anywhere = || free_places(maps, &[], bytes).first().copied();
    let start = free_places(maps, &near, bytes).first().copied();
    let start = start.or_else(anywhere).ok_or_else(no_place)?;
    let range = start..start + bytes;
    take(maps, &range);
    Ok(DataPlace {
        private: start + shared,
        geometry,
        range,
    })
}

/// Room for a module's stubs, near its code.
fn code_place(
    maps: &mut Vec<MapsEntry>,
    module: &ModuleHooks,
    length: u64,
) -> Result<Range<u64>, PrefilterError> {
    let reach: Vec<Range<u64>> = module
        .hooks
        .iter()
        .flat_map(|hook| {
            let references = hook.displaced.references();
            references
                .map(|address| address..address.saturating_add(1))
                .chain([hook.displaced.range()])
        })
        .collect();
    let places = free_places(maps, &reach, length);
    let place = places.first().ok_or_else(|| PrefilterError::NoPlace {
        module: module.path.clone(),
    })?;
    let range = *place..place + length;
    take(maps, &range);
    Ok(range)
}

/// Has `range` be free no more.
fn take(maps: &mut Vec<MapsEntry>, range: &Range<u64>) {
    let at = maps.partition_point(|entry| entry.start.0 < range.start);
    let taken = MapsEntry {
        start: AbsAddr(range.start),
        end: AbsAddr(range.end),
        executable: false,
        file_offset: FileOffset(0),
        device_major: 0,
        device_minor: 0,
        inode: 0,
        path: FILE_NAME.into(),
        deleted: false,
    };
    maps.insert(at, taken);
}

/// Each patch, and whether its function gives blocks up.
fn in_order(patches: Vec<Patch>, hooks: &[Hook]) -> impl Iterator<Item = (bool, Patch)> + '_ {
    patches.into_iter().map(|patch| {
        let is_free = hooks
            .iter()
            .any(|hook| hook.entry == patch.address && hook.function.is_free());
        (is_free, patch)
    })
}

impl Plan {
    /// Whether the code that it changes is there as it was, and the data that it relies on.
    ///
    /// # Errors
    ///
    /// The process was killed.
    pub(super) fn is_right_for(&self, stopped: &Stopped) -> Result<bool, StopError> {
        let maps = stopped.maps()?;
        let has_data = self.owns_data
            || maps.iter().any(|entry| {
                entry.start.0 == self.place.range.start
                    && entry.end.0 == self.place.private
                    && entry.path.as_os_str() == FILE_NAME
            });
        let is_same = |text: &Text| {
            let mut bytes = vec![0; text.bytes.len()];
            mapped_at(&maps, text.address) == text.of
                && stopped.read(text.address, &mut bytes).is_ok()
                && bytes == text.bytes
        };
        Ok(has_data && self.text.iter().all(is_same))
    }

    /// How stacks are walked through it, by where it is in its file.
    pub(super) fn rows(&mut self) -> Vec<CodeRows> {
        let codes = self.code.iter_mut();
        codes
            .map(|code| CodeRows {
                offset: FileOffset(code.offset),
                bytes: code.range.end - code.range.start,
                rows: std::mem::take(&mut code.rows),
            })
            .collect()
    }

    /// What it puts into the process.
    pub(super) fn image(&self) -> Image {
        let code = self.code.iter().map(|code| code.range.clone()).collect();
        let image = Image::new(
            self.place.clone(),
            self.owns_data,
            code,
            self.patches.clone(),
        );
        image.with_moves(self.moves.clone())
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
