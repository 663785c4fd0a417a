//! What one file defines of what is looked for, by its symbols.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use object::elf;

use super::{
    CHUNK_BYTES, FoundSite, PoolRefusal,
    catalog::{Catalog, Name},
    names::{self, Family, known},
    points::{self, Place},
    standalone::is_standalone,
};
use crate::{
    address::{FileOffset, VirtOffset},
    process::elf::{ElfError, ElfLayout, Fields, SymbolTable},
};

/// Of a symbol table and of its names, what lies beyond is not read: the largest
/// programs have a tenth of it, and a sparse file can claim any size.
const MAX_TABLE_BYTES: u64 = 1 << 30;
const SYMBOL_BYTES: usize = 24;
/// A hostile file can define the same function over and over.
const MAX_MATCHES: usize = 1024;

/// The functions that a file defines.
#[derive(Debug, Default)]
pub(super) struct Definitions {
    pub(super) sites: Vec<FoundSite>,
    pub(super) indirect: Vec<&'static str>,
    /// Functions that several of its parts define, each for itself.
    pub(super) ambiguous: Vec<&'static str>,
    /// Functions of pools that are not probed.
    pub(super) refused: Vec<(&'static str, PoolRefusal)>,
}

impl Definitions {
    /// Why a function of a pool is not probed.
    pub(super) fn refusal(&self, symbol: &str) -> Option<PoolRefusal> {
        let is_it = |refused: &&(&str, PoolRefusal)| refused.0 == symbol;
        let indirect = self.indirect.contains(&symbol);
        let refused = self.refused.iter().find(is_it).map(|refused| refused.1);
        refused.or(indirect.then_some(PoolRefusal::Indirect))
    }

    pub(super) fn is_allocator(&self) -> bool {
        !self.sites.is_empty()
    }

    pub(super) fn read(file: &File, catalog: &Catalog) -> Result<Self, ElfError> {
        let layout = ElfLayout::read(file)?;
        let mut found = Self::default();
        let mut is_loader = false;
        let mut throws = false;
        // All, then in order of place and of names.
        let mut places: Vec<Place> = Vec::new();
        // Of symbols that no other file can see.
        let mut local: Vec<Place> = Vec::new();
        let is_standalone = is_standalone(file)?;
        for table in &layout.symbol_tables {
            let names = catalog.find_names(file, table)?;
            throws |= names.values().any(|name| *name == Name::ThrowingMark);
            if names.is_empty() {
                continue;
            }
            for_each_symbol(file, table, |symbol| {
                let order = match names.get(&symbol.name) {
                    Some(Name::LoaderMark) => {
                        is_loader |= symbol.defined;
                        return;
                    }
                    Some(Name::Function(order)) => *order,
                    Some(Name::ThrowingMark) | None => return,
                };
                let Some(known) = catalog.get(order) else {
                    return;
                };
                let is_function = symbol.kind == elf::STT_FUNC.0;
                if symbol.defined && is_function && places.len() <= MAX_MATCHES {
                    places.extend(Place::of(&layout, symbol, (order, known)));
                }
                let counts_locally = is_standalone || known.family.is_distinct();
                if symbol.is_local && is_function && counts_locally && local.len() <= MAX_MATCHES {
                    local.extend(Place::of(&layout, symbol, (order, known)));
                }
                if symbol.defined
                    && symbol.kind == elf::STT_GNU_IFUNC.0
                    && !found.indirect.contains(&known.symbol)
                {
                    found.indirect.push(known.symbol);
                }
            })?;
        }
        if places.len().max(local.len()) > MAX_MATCHES {
            return Err(ElfError::Malformed("the same functions too often"));
        }
        let ambiguous = points::add_local(&mut places, local);
        let families = whole_families(&places, is_loader);
        places.retain(|place| families.contains(&place.known.family));
        let starts = points::starts(places);
        found.sites = points::choose_all(file, &layout, starts)?;
        let refused = found.sites.extract_if(.., |site| {
            let is_unknown = site.function.is_pool() && site.returns.is_empty();
            is_unknown && (throws || is_mangled(site.symbol))
        });
        found.refused = refused
            .map(|site| (site.symbol, PoolRefusal::MayThrow))
            .collect();
        let is_whole = |symbol: &&str| {
            let known = known().iter().find(|known| known.symbol == *symbol);
            // Others are pools'.
            known.is_none_or(|known| families.contains(&known.family))
        };
        found.indirect.retain(is_whole);
        found.ambiguous = ambiguous;
        Ok(found)
    }
}

/// Whether a name is one that compilers for C++ or Rust have made.
fn is_mangled(symbol: &str) -> bool {
    symbol.starts_with("_Z") || symbol.starts_with("_R")
}

/// Of which families `places` has an allocator; a pool is what the user says.
///
/// Before glibc 2.31 its loader exports a `malloc` of its own, for use until the C library's
/// is there: without memalign's kin, unlike musl's loader, which is the C library.
fn whole_families(places: &[Place], is_loader: bool) -> Vec<Family> {
    let defines = |family: Family, is_it: &dyn Fn(&names::Known) -> bool| {
        let mut known = places.iter().map(|place| &place.known);
        known.any(|known| known.family == family && is_it(known))
    };
    let is_whole = |family: &Family| match family {
        // Beside it, one that no wrapper of `malloc` has.
        Family::Cxx => {
            let extended = |known: &names::Known| known.symbol == "mallocx";
            defines(Family::Plain, &extended)
                || Family::ALL
                    .iter()
                    .any(|family| family.is_distinct() && defines(*family, &|_| true))
        }
        Family::Plain => {
            let named = |symbol| move |known: &names::Known| known.symbol == symbol;
            defines(*family, &named("malloc"))
                && defines(*family, &named("free"))
                && (!is_loader || defines(*family, &named("posix_memalign")))
        }
        // Linkers leave out what a program does not call.
        _ => {
            defines(*family, &|known| known.function.is_free())
                && defines(*family, &|known| !known.function.is_free())
        }
    };
    let whole = Family::ALL.into_iter().filter(is_whole);
    whole.chain([Family::Pool]).collect()
}

/// What is used of a symbol.
pub(super) struct Symbol {
    name: u32,
    pub(super) kind: u8,
    pub(super) address: VirtOffset,
    pub(super) size: u64,
    /// Visible to other files, and has a place in this one. The entry of an
    /// imported function in an executable can have a value too, its PLT stub's,
    /// but has no section.
    pub(super) defined: bool,
    /// Visible in this file alone, and has a place in it.
    pub(super) is_local: bool,
}

pub(super) fn for_each_symbol(
    file: &File,
    table: &SymbolTable,
    mut on_symbol: impl FnMut(&Symbol),
) -> Result<(), ElfError> {
    let chunk_bytes = CHUNK_BYTES / SYMBOL_BYTES * SYMBOL_BYTES;
    for_each_chunk(file, table.offset, table.size, chunk_bytes, |chunk| {
        for symbol in chunk.chunks_exact(SYMBOL_BYTES).map(Fields) {
            let (info, section, value) = (symbol.u8(4), symbol.u16(6), symbol.u64(8));
            let binding = info >> 4;
            let has_place = section != elf::SHN_UNDEF.0 && value != 0;
            on_symbol(&Symbol {
                name: symbol.u32(0),
                kind: info & 0xf,
                address: VirtOffset(value),
                size: symbol.u64(16),
                defined: (binding == elf::STB_GLOBAL.0 || binding == elf::STB_WEAK.0) && has_place,
                is_local: binding == elf::STB_LOCAL.0 && has_place,
            });
        }
    })
}

/// Reads a part of a file piece by piece. The part may end before it says it
/// does.
pub(super) fn for_each_chunk(
    file: &File,
    start: FileOffset,
    size: u64,
    chunk_bytes: usize,
    mut on_chunk: impl FnMut(&[u8]),
) -> Result<(), ElfError> {
    let mut buffer = vec![0; chunk_bytes];
    let mut at = start.0;
    let mut left = size.min(MAX_TABLE_BYTES);
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(chunk_bytes);
        let Some(chunk) = buffer.get_mut(..wanted) else {
            break;
        };
        match file.read_exact_at(chunk, at) {
            Ok(()) => on_chunk(chunk),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ElfError::Malformed("a symbol table beyond the file's end"));
            }
            Err(error) => return Err(error.into()),
        }
        at = at.saturating_add(wanted as u64);
        left -= wanted as u64;
    }
    Ok(())
}
