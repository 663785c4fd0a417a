//! Finds the allocators of a process: the files it maps that define `malloc`
//! and `free`.

use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::RangeInclusive,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use memprof_common::function::Function;
use object::elf;

use super::point::ProbePoint;
use crate::{
    address::{FileOffset, VirtOffset},
    process::{
        elf::{ElfError, ElfLayout, Fields, SymbolTable},
        mapping::{MappedFile, MappingTable},
        state::FileState,
    },
};

mod flow;
mod flows;
mod linkage;
mod names;
mod points;
mod standalone;

use names::{Family, Name, find_names, known};
use points::Place;
use standalone::is_standalone;

/// Of a symbol table and of its names, what lies beyond is not read: the largest
/// programs have a tenth of it, and a sparse file can claim any size.
const MAX_TABLE_BYTES: u64 = 1 << 30;
/// Files are read in pieces of this size.
const CHUNK_BYTES: usize = 256 << 10;
const SYMBOL_BYTES: usize = 24;
/// A hostile file can define the same function over and over.
const MAX_MATCHES: usize = 1024;
/// Results kept; a host maps some thousand different files.
const MAX_CACHED: usize = 1 << 14;

/// Why a process cannot be probed.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// None of its files defines an allocator.
    #[error(
        "pid {pid} has no known allocator: no symbols malloc and free, nor others of those in \
         docs/allocators.md, in {}",
        list(searched)
    )]
    NoAllocator {
        /// The process.
        pid: u32,
        /// What was searched.
        searched: Vec<PathBuf>,
    },
}

fn list(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "any file (it maps none)".to_owned();
    }
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}

/// A place to probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundSite {
    /// The function that starts here, by the meaning of its arguments. A `malloc` that may call
    /// another function of the file is as `valloc`.
    pub function: Function,
    /// Its name.
    pub symbol: &'static str,
    /// Where in the file it starts.
    pub file_offset: FileOffset,
    /// Names of functions that start here too, such as `cfree` with `free`.
    pub aliases: Vec<&'static str>,
    /// How many bytes from there on are the function's, as far as is known: the first
    /// thousands.
    pub code_bytes: u64,
    /// The instruction to probe it on.
    pub point: ProbePoint,
    /// Of a function that may throw: the instructions at which it returns.
    pub returns: Vec<FileOffset>,
    /// A function of the file that does the same, and is counted itself or cannot throw: what
    /// one that may throw has beside it, and where one that gives blocks up passes them on to.
    pub twin: Option<FileOffset>,
    /// The instructions at which it passes a block on to another function that gives blocks up.
    pub passes_on: Vec<FileOffset>,
}

impl FoundSite {
    /// Whether this is where the function of that name starts.
    #[must_use]
    pub fn is_called(&self, symbol: &str) -> bool {
        self.symbol == symbol || self.aliases.contains(&symbol)
    }

    /// Where in the file the probe goes.
    #[must_use]
    pub fn probe_offset(&self) -> FileOffset {
        FileOffset(
            self.file_offset
                .0
                .saturating_add(u64::from(self.point.offset)),
        )
    }
}

/// A file that defines an allocator.
#[derive(Clone, Debug)]
pub struct AllocatorModule {
    /// The file.
    pub file: Arc<MappedFile>,
    /// A path that leads this process, and no other, to the file, for as long as
    /// `file` is held: it needs no target that still runs or still maps it.
    pub attach_path: PathBuf,
    /// Where its functions start, by offset: no two have the same.
    pub sites: Vec<FoundSite>,
    /// Functions it defines by choice at run time (`STT_GNU_IFUNC`), which the
    /// file alone cannot place.
    pub indirect: Vec<&'static str>,
}

impl AllocatorModule {
    /// The code of one of its functions, or how that begins, as the file has it.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub(crate) fn code(&self, site: &FoundSite) -> io::Result<Vec<u8>> {
        let file = self.file.file.as_ref();
        let file = file.ok_or(io::ErrorKind::NotFound)?;
        points::read_code(file, site.file_offset, site.code_bytes)
    }
}

/// Whether each call of the function at `address` in `file` comes by one of `others`, which are
/// addresses of functions there too.
pub(crate) fn always_leads_to(
    file: &File,
    layout: &ElfLayout,
    function: (Function, u64),
    others: &[u64],
) -> bool {
    let mut linkage = linkage::Linkage::new(file, layout);
    let depth = flow::Depth::Jumps;
    flow::follow(file, layout, &mut linkage, function, others, depth).always_leads_on()
}

/// Which of `ranges` of addresses have a symbol of `file` in them.
///
/// # Errors
///
/// The file cannot be read.
pub(crate) fn ranges_with_symbols(
    file: &File,
    layout: &ElfLayout,
    ranges: &[RangeInclusive<u64>],
) -> Result<Vec<bool>, ElfError> {
    let mut hit = vec![false; ranges.len()];
    for table in &layout.symbol_tables {
        for_each_symbol(file, table, |symbol| {
            // The values of thread-local symbols are no addresses.
            if (symbol.defined || symbol.is_local) && symbol.kind != elf::STT_TLS.0 {
                for (hit, range) in hit.iter_mut().zip(ranges) {
                    *hit |= range.contains(&symbol.address.0);
                }
            }
        })?;
    }
    Ok(hit)
}

/// Finds allocators, and remembers what it found in each file.
#[derive(Debug, Default)]
pub struct Finder {
    cache: Mutex<HashMap<FileState, Arc<Definitions>>>,
}

impl Finder {
    /// The allocators among the files of `mappings`, which are those of `pid`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn find_all(
        &self,
        pid: u32,
        mappings: &MappingTable,
    ) -> Result<Vec<AllocatorModule>, FindError> {
        let files = mappings.files();
        let found: Vec<_> = files.iter().filter_map(|file| self.find(file)).collect();
        if found.is_empty() {
            let searched = files.iter().map(|file| file.path.clone()).collect();
            return Err(FindError::NoAllocator { pid, searched });
        }
        Ok(found)
    }

    /// The allocator that `file` defines. A file that cannot be read as an
    /// x86-64 ELF file defines none.
    #[must_use]
    pub fn find(&self, file: &Arc<MappedFile>) -> Option<AllocatorModule> {
        let open = file.file.as_ref()?;
        let definitions = match self.definitions(file, open) {
            Ok(definitions) => definitions,
            Err(error) => {
                tracing::debug!(path = %file.path.display(), %error, "cannot search for an allocator");
                return None;
            }
        };
        definitions.is_allocator().then(|| AllocatorModule {
            file: Arc::clone(file),
            attach_path: PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd())),
            sites: definitions.sites.clone(),
            indirect: definitions.indirect.clone(),
        })
    }

    fn definitions(&self, file: &MappedFile, open: &File) -> Result<Arc<Definitions>, ElfError> {
        let key = FileState::of(file)?;
        let lock = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&key) {
            return Ok(Arc::clone(known));
        }
        let read = Arc::new(Definitions::read(open)?);
        if !read.indirect.is_empty() {
            let (path, functions) = (file.path.display(), &read.indirect);
            tracing::warn!(%path, ?functions, "not probed: the file chooses them at run time");
        }
        if !read.ambiguous.is_empty() {
            let (path, functions) = (file.path.display(), &read.ambiguous);
            tracing::warn!(%path, ?functions, "not probed: the file has several of that name");
        }
        let mut cache = lock();
        if cache.len() >= MAX_CACHED {
            cache.clear();
        }
        cache.insert(key, Arc::clone(&read));
        Ok(read)
    }
}

/// The functions that a file defines.
#[derive(Debug, Default)]
struct Definitions {
    sites: Vec<FoundSite>,
    indirect: Vec<&'static str>,
    /// Functions that several of its parts define, each for itself.
    ambiguous: Vec<&'static str>,
}

impl Definitions {
    fn is_allocator(&self) -> bool {
        !self.sites.is_empty()
    }

    fn read(file: &File) -> Result<Self, ElfError> {
        let layout = ElfLayout::read(file)?;
        let mut found = Self::default();
        let mut is_loader = false;
        // All, then in order of place and of names.
        let mut places: Vec<Place> = Vec::new();
        // Of symbols that no other file can see.
        let mut local: Vec<Place> = Vec::new();
        let is_standalone = is_standalone(file)?;
        for table in &layout.symbol_tables {
            let names = find_names(file, table)?;
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
                    None => return,
                };
                let Some(known) = known().get(order) else {
                    return;
                };
                let is_function = symbol.kind == elf::STT_FUNC.0;
                if symbol.defined && is_function && places.len() <= MAX_MATCHES {
                    places.extend(Place::of(&layout, symbol, order));
                }
                let counts_locally = is_standalone || known.family.is_distinct();
                if symbol.is_local && is_function && counts_locally && local.len() <= MAX_MATCHES {
                    local.extend(Place::of(&layout, symbol, order));
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
        places.retain(|place| families.contains(&place.known().family));
        let starts = points::starts(places);
        found.sites = points::choose_all(file, &layout, starts)?;
        let is_whole = |symbol: &&str| {
            let known = known().iter().find(|known| known.symbol == *symbol);
            known.is_some_and(|known| families.contains(&known.family))
        };
        found.indirect.retain(is_whole);
        found.ambiguous = ambiguous;
        Ok(found)
    }
}

/// Of which families `places` has an allocator.
///
/// Before glibc 2.31 its loader exports a `malloc` of its own, for use until the C library's
/// is there: without memalign's kin, unlike musl's loader, which is the C library.
fn whole_families(places: &[Place], is_loader: bool) -> Vec<Family> {
    let defines = |family: Family, is_it: &dyn Fn(&names::Known) -> bool| {
        let mut known = places.iter().map(Place::known);
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
    Family::ALL.into_iter().filter(is_whole).collect()
}

/// What is used of a symbol.
struct Symbol {
    name: u32,
    kind: u8,
    address: VirtOffset,
    size: u64,
    /// Visible to other files, and has a place in this one. The entry of an
    /// imported function in an executable can have a value too, its PLT stub's,
    /// but has no section.
    defined: bool,
    /// Visible in this file alone, and has a place in it.
    is_local: bool,
}

fn for_each_symbol(
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
fn for_each_chunk(
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

#[cfg(test)]
#[path = "find_tests.rs"]
pub(crate) mod tests;
