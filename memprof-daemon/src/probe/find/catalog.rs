//! What is looked for in files, and where in their names it stands.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
};

use super::{
    CHUNK_BYTES, for_each_chunk,
    names::{Family, Known, known},
};
use crate::{
    probe::pools::Pools,
    process::elf::{ElfError, SymbolTable},
};

/// How often names that are looked for may stand in a table: each name that another ends
/// with counts (`free` in `x_free`), and large libraries have thousands of those. A hostile
/// file could name the same function over and over.
pub(super) const MAX_NAMES: usize = 1 << 16;

/// A variable that glibc's dynamic loader defines, and nobody else.
const LOADER_MARK: &str = "_rtld_global";

/// What files name, themselves or of another file, whose code throws or lets others throw
/// through it: C++'s, and Rust's panics.
const THROWING_MARKS: [&str; 3] = ["__gxx_personality_v0", "__cxa_throw", "rust_eh_personality"];

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// A place in a catalog.
    Function(usize),
    LoaderMark,
    ThrowingMark,
}

/// Bytes at the end of a name by which it is looked up. No allocator's name is shorter.
const ENDING_BYTES: usize = 4;

/// Names by their ends: a table of a large program has a million others.
type Endings = BTreeMap<[u8; ENDING_BYTES], Vec<(&'static [u8], Name)>>;

/// Every function that is looked for, in the order in which sites that share an address are
/// given to one of them.
#[derive(Debug)]
pub(super) struct Catalog {
    functions: Vec<Known>,
    endings: Endings,
    /// Names that are shorter.
    short: Vec<(&'static [u8], Name)>,
    longest: usize,
}

impl Default for Catalog {
    fn default() -> Self {
        Self::new(&Pools::default())
    }
}

impl Catalog {
    /// The functions of allocators, and those of `pools`, whose names are kept for as long as
    /// memprof runs: there is one catalog at a time.
    pub(super) fn new(pools: &Pools) -> Self {
        let mut functions = known().to_vec();
        functions.extend(pools.iter().map(|pool| Known {
            symbol: Box::leak(pool.symbol.clone().into_boxed_str()),
            function: pool.function,
            family: Family::Pool,
            places: Some(pool.places),
        }));
        let names = functions.iter().enumerate();
        let names = names.map(|(order, known)| (known.symbol, Name::Function(order)));
        let mut names: Vec<(&'static str, Name)> = names.collect();
        names.push((LOADER_MARK, Name::LoaderMark));
        if !pools.is_empty() {
            names.extend(THROWING_MARKS.map(|mark| (mark, Name::ThrowingMark)));
        }
        let mut endings = Endings::new();
        let mut short = Vec::new();
        for &(name, what) in &names {
            let name = name.as_bytes();
            match name.last_chunk() {
                Some(ending) => endings.entry(*ending).or_default().push((name, what)),
                None => short.push((name, what)),
            }
        }
        Self {
            functions,
            endings,
            short,
            longest: names.iter().map(|(name, _)| name.len()).max().unwrap_or(0),
        }
    }

    /// The function at a place.
    pub(super) fn get(&self, order: usize) -> Option<Known> {
        self.functions.get(order).copied()
    }

    /// The functions of pools.
    pub(super) fn pools(&self) -> impl Iterator<Item = &Known> {
        let is_pools = |known: &&Known| known.family == Family::Pool;
        self.functions.iter().filter(is_pools)
    }

    /// Where in the names of `table` those stand that are looked for.
    ///
    /// Linkers let a name stand at the end of a longer one (`malloc` in `xmalloc`),
    /// so each place counts at which the rest up to the zero is the name. Looking
    /// for names first, and by number in the symbols, takes constant memory,
    /// whatever the size of the tables.
    pub(super) fn find_names(
        &self,
        file: &File,
        table: &SymbolTable,
    ) -> Result<HashMap<u32, Name>, ElfError> {
        let mut names = HashMap::new();
        let mut window: Vec<u8> = Vec::new();
        let mut window_start = 0_u64;
        for_each_chunk(
            file,
            table.names_offset,
            table.names_size,
            CHUNK_BYTES,
            |chunk| {
                window.extend_from_slice(chunk);
                for (end, _) in window.iter().enumerate().filter(|&(_, &byte)| byte == 0) {
                    let before = window.get(..end).unwrap_or_default();
                    let ending = before.last_chunk();
                    let ending = ending.and_then(|ending| self.endings.get(ending));
                    for &(name, what) in ending.into_iter().flatten().chain(&self.short) {
                        if names.len() <= MAX_NAMES && before.ends_with(name) {
                            let start = window_start + (end - name.len()) as u64;
                            names.extend(u32::try_from(start).ok().map(|start| (start, what)));
                        }
                    }
                }
                // A name may go on in the next chunk.
                let done = window.len().saturating_sub(self.longest);
                window.drain(..done);
                window_start += done as u64;
            },
        )?;
        if names.len() > MAX_NAMES {
            return Err(ElfError::Malformed("the same names too often"));
        }
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that each name can be looked up by its end.
    #[test]
    fn names_are_looked_up() {
        let catalog = Catalog::default();
        assert_eq!(
            catalog.endings.values().flatten().count(),
            known().len() + 1
        );
        assert!(catalog.short.is_empty());
        assert_eq!(catalog.pools().count(), 0);
    }
}
