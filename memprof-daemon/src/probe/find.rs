//! Finds the allocators of a process: the files it maps that define `malloc`
//! and `free`.

use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::RangeInclusive,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use memprof_common::{config::Places, function::Function};
use object::elf;

use super::{point::ProbePoint, pools::Pools};
use crate::{
    address::FileOffset,
    process::{
        elf::{ElfError, ElfLayout},
        mapping::{MappedFile, MappingTable},
        state::FileState,
    },
};

mod catalog;
mod definitions;
mod flow;
mod flows;
mod linkage;
mod names;
mod points;
mod standalone;

use catalog::Catalog;
use definitions::{Definitions, Symbol, for_each_chunk, for_each_symbol};

/// Files are read in pieces of this size.
const CHUNK_BYTES: usize = 256 << 10;
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
    /// None of its files has a function that the user has named.
    #[error(
        "pid {pid} has no function `{symbol}`, which --function or --free-function names: no \
         such symbol in {}",
        list(searched)
    )]
    NoFunction {
        /// The process.
        pid: u32,
        /// The function.
        symbol: &'static str,
        /// What was searched.
        searched: Vec<PathBuf>,
    },
    /// Such a function is there, and cannot be probed.
    #[error("pid {pid}: `{symbol}` in {}: {refusal}", path.display())]
    Refused {
        /// The process.
        pid: u32,
        /// The function.
        symbol: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        refusal: PoolRefusal,
    },
}

/// Why a function that the user has named is not probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolRefusal {
    /// Its returns are not known, and it may throw.
    #[error(
        "not all instructions at which it returns are known, and it may throw: with a return \
         probe that would end the process"
    )]
    MayThrow,
    /// The loader chooses it.
    #[error("the file chooses it at run time")]
    Indirect,
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
    /// Where its arguments are, if it is probed by that.
    pub places: Option<Places>,
    /// The instruction to probe it on.
    pub point: ProbePoint,
    /// Of a function that may throw, and of a pool's: the instructions at which it returns. If a
    /// pool's has none, it has a return probe.
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
    catalog: Catalog,
    cache: Mutex<HashMap<FileState, Arc<Definitions>>>,
}

/// Whether memprof knows a function of an allocator by that name.
pub(super) fn is_known(symbol: &str) -> bool {
    names::is_known(symbol)
}

impl Finder {
    /// One that finds functions of pools, too.
    #[must_use]
    pub fn new(pools: &Pools) -> Self {
        Self {
            catalog: Catalog::new(pools),
            cache: Mutex::default(),
        }
    }

    /// Whether functions of pools are looked for.
    #[must_use]
    pub fn has_pools(&self) -> bool {
        self.catalog.pools().next().is_some()
    }

    /// Fails unless some file of `mappings`, which are those of `pid`, has each function of a
    /// pool.
    ///
    /// # Errors
    ///
    /// The first that is missing, or cannot be probed.
    pub fn require_pools(&self, pid: u32, mappings: &MappingTable) -> Result<(), FindError> {
        if !self.has_pools() {
            return Ok(());
        }
        let files = mappings.files();
        let read = |file: &&Arc<MappedFile>| {
            let definitions = self.definitions(file, file.file.as_ref()?).ok()?;
            Some((file.path.clone(), definitions))
        };
        let all: Vec<_> = files.iter().filter_map(|file| read(&file)).collect();
        for &names::Known { symbol, .. } in self.catalog.pools() {
            let has_it = |(_, definitions): &(_, Arc<Definitions>)| {
                definitions.sites.iter().any(|site| site.is_called(symbol))
            };
            if all.iter().any(has_it) {
                continue;
            }
            let refused = all.iter().find_map(|(path, definitions)| {
                let refusal = definitions.refusal(symbol)?;
                Some((path.clone(), refusal))
            });
            return Err(match refused {
                Some((path, refusal)) => FindError::Refused {
                    pid,
                    symbol,
                    path,
                    refusal,
                },
                None => FindError::NoFunction {
                    pid,
                    symbol,
                    searched: files.iter().map(|file| file.path.clone()).collect(),
                },
            });
        }
        Ok(())
    }

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
        let read = Arc::new(Definitions::read(open, &self.catalog)?);
        if !read.indirect.is_empty() {
            let (path, functions) = (file.path.display(), &read.indirect);
            tracing::warn!(%path, ?functions, "not probed: the file chooses them at run time");
        }
        if !read.ambiguous.is_empty() {
            let (path, functions) = (file.path.display(), &read.ambiguous);
            tracing::warn!(%path, ?functions, "not probed: the file has several of that name");
        }
        for (symbol, refusal) in &read.refused {
            let path = file.path.display();
            tracing::warn!(%path, symbol, "not probed: {refusal}");
        }
        let mut cache = lock();
        if cache.len() >= MAX_CACHED {
            cache.clear();
        }
        cache.insert(key, Arc::clone(&read));
        Ok(read)
    }
}

#[cfg(test)]
mod pools_tests;
#[cfg(test)]
#[path = "find_tests.rs"]
pub(crate) mod tests;
