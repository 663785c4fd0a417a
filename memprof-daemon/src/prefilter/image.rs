//! The code image of an allocator module: a header, the stubs' common part, and a stub for
//! each function with the function's first instructions behind it.
//!
//! It is made for one address and one place of the data, and written before it is mapped.

use memprof_common::{
    function::Function,
    prefilter::{PRIVATE_CALL, PRIVATE_ENABLED, PRIVATE_OWNER, SHARD_BYTES, SiteKind},
};

pub use super::header::ImageHeader;
use super::{
    header,
    hooks::Hook,
    layout::Geometry,
    moves::Move,
    relocate::{JUMP_BYTES, MAX_RELOCATED_BYTES, Refusal, jump},
    stack_rows::{self, CALLED, Entered, Row},
    stubs::{self, Extent, PatchKind, Template},
};

/// Stubs begin at lines of the cache.
const LINE_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;
/// What undoes a first instruction that stays, and a jump.
const MAX_UNDO_BYTES: usize = 16;

/// Why an image cannot be made, or is none.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The geometry is not one that code can be made for.
    #[error("tables of {} shards and 2^{} buckets", .0.shards, .0.bucket_bits)]
    Geometry(Geometry),
    /// The address is not that of a page.
    #[error("{0:#x} is not the address of a page")]
    Unaligned(u64),
    /// The first instructions do not run there.
    #[error("{}: {source}", .symbol)]
    Relocation {
        /// Of which.
        symbol: &'static str,
        /// Why.
        source: Refusal,
    },
    /// The stub is more than 2 GiB away from the function.
    #[error("{} at {entry:#x} cannot jump to {stub:#x}", .symbol)]
    OutOfReach {
        /// Which.
        symbol: &'static str,
        /// Where it begins.
        entry: u64,
        /// Where its stub begins.
        stub: u64,
    },
    /// It needs another function to call, and there is none; a defect of this program.
    #[error("{0}: no other function that does the same")]
    NoTwin(&'static str),
    /// Too many functions for one image.
    #[error("an image for {0} functions")]
    TooMany(usize),
    /// The stubs do not fit what is known of them; a defect of this program.
    #[error("a note of the stubs at {0} is not understood")]
    Note(usize),
    /// The bytes are not an image of ours.
    #[error("no header of an image")]
    NotAnImage,
    /// Another program made it, whose images we do not know.
    #[error("an image of version {0}")]
    Version(u32),
}

/// A jump that leads from a function into the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Where it is written.
    pub address: u64,
    /// What is there otherwise.
    pub original: [u8; JUMP_BYTES],
    /// The jump.
    pub jump: [u8; JUMP_BYTES],
}

/// An image, ready to be mapped at its address.
#[derive(Clone, Debug)]
pub struct CodeImage {
    /// Whole pages.
    pub bytes: Vec<u8>,
    /// The jumps, in the order of the hooks.
    pub patches: Vec<Patch>,
    /// Where the uprobes go: offsets in `bytes`.
    pub sites: Vec<(SiteKind, u64)>,
    /// Places in the functions and in the image that mean the same.
    pub moves: Vec<Move>,
    /// How stacks are walked through it.
    pub rows: Vec<Row>,
}

/// Whether the allocator's `malloc` may call another function that has a hook: that of
/// another module, which it wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MallocNests {
    /// The process has one allocator.
    No,
    /// It has several: each call of `malloc` is followed to its return, so that what is
    /// called inside is not counted.
    Yes,
}

/// An upper bound of an image's length, to look for a place.
#[must_use]
pub fn code_bytes(hooks: usize) -> usize {
    let stub = stubs::code().len() + MAX_RELOCATED_BYTES + MAX_UNDO_BYTES + LINE_BYTES;
    (header::bytes(hooks) + stub + hooks * stub).next_multiple_of(PAGE_BYTES)
}

/// Makes an image to be mapped at `at` that works with the data at `data`, where the
/// shared part begins, for the functions of a module that is the only one.
///
/// # Errors
///
/// Why the image would not work.
pub fn assemble(
    at: u64,
    data: u64,
    geometry: Geometry,
    hooks: &[Hook],
) -> Result<CodeImage, ImageError> {
    assemble_for(at, data, geometry, hooks, MallocNests::No)
}

/// As [`assemble`], for a module that may be one of several.
///
/// # Errors
///
/// As [`assemble`].
pub fn assemble_for(
    at: u64,
    data: u64,
    geometry: Geometry,
    hooks: &[Hook],
    nests: MallocNests,
) -> Result<CodeImage, ImageError> {
    if !geometry.is_valid() {
        return Err(ImageError::Geometry(geometry));
    }
    if let Some(unaligned) = [at, data].into_iter().find(|a| a % PAGE_BYTES as u64 != 0) {
        return Err(ImageError::Unaligned(unaligned));
    }
    let header_bytes = header::bytes(hooks.len());
    let mut image = Assembly {
        at,
        data,
        geometry,
        common: header_bytes,
        bytes: vec![0; header_bytes],
        sites: Vec::new(),
        moves: Vec::new(),
        entered: Vec::new(),
    };
    image.copy(0..stubs::common_end() as usize, None)?;
    let mut patches = Vec::with_capacity(hooks.len());
    for hook in hooks {
        patches.push(image.stub(hook, nests)?);
    }
    let Assembly {
        mut bytes,
        sites,
        moves,
        entered,
        ..
    } = image;
    let rows = stack_rows::rows(&bytes, at, &entered);
    bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), INT3);
    let header = ImageHeader {
        code: at..at.wrapping_add(bytes.len() as u64),
        data: data..data.wrapping_add((geometry.shared_bytes() + geometry.private_bytes()) as u64),
        geometry,
        patches,
    };
    header.write(&mut bytes)?;
    Ok(CodeImage {
        bytes,
        patches: header.patches,
        sites,
        moves,
        rows,
    })
}

/// Reads the header of an image that a daemon has left in a process.
///
/// # Errors
///
/// The bytes do not begin with one.
pub fn read_header(bytes: &[u8]) -> Result<ImageHeader, ImageError> {
    ImageHeader::read(bytes)
}

/// Between stubs: nothing comes there.
const INT3: u8 = 0xcc;

/// An image in the making.
struct Assembly {
    at: u64,
    data: u64,
    geometry: Geometry,
    /// Where the common part is in `bytes`.
    common: usize,
    bytes: Vec<u8>,
    sites: Vec<(SiteKind, u64)>,
    moves: Vec<Move>,
    entered: Vec<Entered>,
}

impl Assembly {
    /// Adds the stub of a function.
    fn stub(&mut self, hook: &Hook, nests: MallocNests) -> Result<Patch, ImageError> {
        let symbol = hook.symbol;
        self.bytes
            .resize(self.bytes.len().next_multiple_of(LINE_BYTES), INT3);
        let template = template(hook, nests);
        if matches!(
            template,
            Template::New
                | Template::NewN
                | Template::HeapNew
                | Template::HeapNewN
                | Template::Passing
        ) && hook.twin.is_none()
        {
            return Err(ImageError::NoTwin(symbol));
        }
        let Extent { start, entry, end } = stubs::extent(template);
        let mut stub = self.at + (self.bytes.len() + (entry - start) as usize) as u64;
        self.copy(start as usize..end as usize, Some(hook))?;
        let real = self.at + self.bytes.len() as u64;
        let relocated = hook
            .displaced
            .relocate(real)
            .map_err(|source| ImageError::Relocation { symbol, source })?;
        self.bytes.extend(relocated.bytes);
        self.moves.extend(relocated.moves);
        self.entered.push(Entered {
            at: stub,
            depth: CALLED,
        });
        let start = hook.displaced.start();
        self.moves.push(Move {
            text: start,
            image: stub,
        });
        let entry = hook.entry;
        let out_of_reach = ImageError::OutOfReach {
            symbol,
            entry,
            stub,
        };
        let undo = hook.displaced.undo();
        if !undo.is_empty() {
            let begin = self.at + self.bytes.len() as u64;
            self.bytes.extend(&undo);
            self.moves.push(Move {
                text: entry,
                image: begin,
            });
            // It ends at the stub with what a call leaves.
            let depth = stack_rows::moves_stack_by(&undo)
                .and_then(|moved| CALLED.checked_add_signed(moved));
            self.entered
                .extend(depth.map(|depth| Entered { at: begin, depth }));
            let from = self.at + self.bytes.len() as u64;
            let Some(jump) = jump(from, stub) else {
                return Err(out_of_reach);
            };
            self.bytes.extend(jump);
            self.moves.push(Move {
                text: start,
                image: from,
            });
            stub = begin;
        }
        let Some(jump) = jump(entry, stub) else {
            return Err(out_of_reach);
        };
        let Some(&original) = hook.displaced.bytes.first_chunk() else {
            return Err(ImageError::Relocation {
                symbol,
                source: Refusal::TooShort {
                    bytes: hook.displaced.bytes.len(),
                },
            });
        };
        Ok(Patch {
            address: entry,
            original,
            jump,
        })
    }

    /// Copies a range of the stubs to the end of the image, and patches the copy.
    fn copy(
        &mut self,
        range: std::ops::Range<usize>,
        hook: Option<&Hook>,
    ) -> Result<(), ImageError> {
        let copied_to = self.bytes.len();
        let code = stubs::code().get(range.clone());
        self.bytes
            .extend_from_slice(code.ok_or(ImageError::Note(range.start))?);
        for note in stubs::notes() {
            let offset = note.offset as usize;
            if !range.contains(&offset) {
                continue;
            }
            let place = copied_to + (offset - range.start);
            let misunderstood = ImageError::Note(offset);
            let Ok(code) = u8::try_from(note.kind) else {
                return Err(misunderstood);
            };
            if let Some(site) = SiteKind::from_code(code) {
                self.sites.push((site, place as u64));
                continue;
            }
            let kind = PatchKind::from_code(code).ok_or(misunderstood)?;
            self.patch(kind, place, offset, hook)
                .ok_or(ImageError::Note(offset))?;
        }
        Ok(())
    }

    /// Writes over a number at `place`, which is at `offset` in the stubs. `None`: the
    /// value has no meaning there.
    fn patch(
        &mut self,
        kind: PatchKind,
        place: usize,
        offset: usize,
        hook: Option<&Hook>,
    ) -> Option<()> {
        let (data, geometry) = (self.data, self.geometry);
        let long = |distance: usize| Some((data + distance as u64).to_le_bytes());
        let address = match kind {
            PatchKind::HeaderAddress => long(0),
            PatchKind::ShardsAddress => long(geometry.shards_offset()),
            PatchKind::OccupancyAddress => long(geometry.occupancy_offset()),
            PatchKind::BucketsAddress => long(geometry.buckets_offset()),
            PatchKind::EnabledAddress => long(geometry.shared_bytes() + PRIVATE_ENABLED),
            _ => None,
        };
        if let Some(address) = address {
            *self.bytes.get_mut(place..)?.first_chunk_mut()? = address;
            return Some(());
        }
        let at = self.at;
        let operand: &mut [u8; 4] = self.bytes.get_mut(place..)?.first_chunk_mut()?;
        let value = match kind {
            PatchKind::ShardMask => (geometry.shards as usize - 1) * SHARD_BYTES,
            PatchKind::BucketMask => geometry.buckets() - 1,
            PatchKind::OwnerDistance => geometry.p_delta() + PRIVATE_OWNER,
            PatchKind::CallDistance => geometry.p_delta() + PRIVATE_CALL,
            PatchKind::Function => hook?.function as usize,
            PatchKind::Twin => {
                // The number is the end of its instruction.
                let behind = at + place as u64 + 4;
                let distance = hook?.twin?.wrapping_sub(behind).cast_signed();
                *operand = i32::try_from(distance).ok()?.to_le_bytes();
                return Some(());
            }
            PatchKind::ToCommon => {
                // Stub and common part are at another distance than in the stubs.
                let target =
                    (offset as i64 + i64::from(i32::from_le_bytes(*operand))) + self.common as i64;
                *operand = i32::try_from(target - place as i64).ok()?.to_le_bytes();
                return Some(());
            }
            _ => return None,
        };
        *operand = i32::try_from(value).ok()?.to_le_bytes();
        Some(())
    }
}

const fn template(hook: &Hook, nests: MallocNests) -> Template {
    match (hook.function, nests) {
        (Function::Malloc, MallocNests::No) | (Function::Mallocx, _) => Template::Malloc,
        (Function::Malloc, MallocNests::Yes) | (Function::Valloc | Function::Pvalloc, _) => {
            Template::Sized
        }
        (Function::Calloc, _) => Template::Calloc,
        (Function::Realloc, _) => Template::Realloc,
        (Function::Reallocarray, _) => Template::Reallocarray,
        (Function::PosixMemalign, _) => Template::PosixMemalign,
        (Function::AlignedAlloc | Function::Memalign, _) => Template::Aligned,
        (Function::Xallocx, _) => Template::Xallocx,
        (Function::Reallocf, _) => Template::Reallocf,
        (Function::HeapCalloc, _) => Template::HeapCalloc,
        (Function::HeapRealloc, _) => Template::HeapRealloc,
        (Function::HeapReallocn, _) => Template::HeapReallocn,
        (Function::HeapReallocf, _) => Template::HeapReallocf,
        (Function::New, _) => Template::New,
        (Function::NewN, _) => Template::NewN,
        (Function::HeapNew, _) => Template::HeapNew,
        (Function::HeapNewN, _) => Template::HeapNewN,
        (
            Function::Free | Function::Cfree | Function::FreeSized | Function::FreeAlignedSized,
            _,
        ) if hook.twin.is_some() => Template::Passing,
        (
            Function::Free | Function::Cfree | Function::FreeSized | Function::FreeAlignedSized,
            _,
        ) => Template::Free,
        // They are never hooked.
        (Function::Pool | Function::PoolFree, _) => Template::Free,
    }
}

#[cfg(test)]
mod tests;
