//! Which files are Go programs, and what they say about themselves: read once of each file,
//! however many processes run it.
//!
//! Where every process is traced, each file that one maps is asked whether it is a Go program.
//! That takes the section headers and one section. The rest is read when a process's heap is.

use std::{
    collections::HashMap,
    fs::File,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use super::{
    GoError,
    buildinfo::{self, Version},
    layout::Layout,
    symbols,
};
use crate::process::{
    elf::{ElfLayout, find_sections},
    mapping::MappedFile,
    state::FileState,
};

/// Files that are remembered; a host maps some thousand different ones.
const MAX_KNOWN: usize = 1 << 14;

/// The variables that are looked for among symbols.
const VARIABLES: [&str; 4] = [
    "runtime.mbuckets",
    "runtime.mProfCycle",
    "runtime.MemProfileRate",
    "runtime.disableMemoryProfiling",
];

/// Which of the files that were met are Go programs.
#[derive(Debug, Default)]
pub(crate) struct GoFiles {
    known: Mutex<HashMap<FileState, Option<Arc<GoFile>>>>,
}

/// A file that Go has built.
#[derive(Debug)]
pub(super) struct GoFile {
    pub(super) version: Version,
    /// Where its function table is, in the file's terms.
    table: Option<u64>,
    parts: OnceLock<Arc<Parts>>,
}

/// What is needed to read the heap of a process that runs it.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) layout: Layout,
    pub(super) elf: ElfLayout,
    /// Where its function table is, in the file's terms, ...
    pub(super) table: u64,
    /// ... and each of [`VARIABLES`], if it has a symbol.
    pub(super) symbols: [Option<u64>; VARIABLES.len()],
}

impl GoFiles {
    /// Whether a file is a Go program, or a library that Go has built.
    pub(crate) fn is_go(&self, file: &MappedFile) -> bool {
        self.file(file).is_some()
    }

    /// What is known of a file that Go has built.
    pub(super) fn file(&self, file: &MappedFile) -> Option<Arc<GoFile>> {
        let open = file.file.as_ref()?;
        let state = FileState::of(file).ok()?;
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&state) {
            return known.clone();
        }
        let read = GoFile::read(open).map(Arc::new);
        let mut known = lock();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(state, read.clone());
        read
    }
}

impl GoFile {
    fn read(file: &File) -> Option<Self> {
        let names: [&[u8]; 3] = [
            b".go.buildinfo",
            b".gopclntab",
            // Of position-independent programs before Go 1.26.
            b".data.rel.ro.gopclntab",
        ];
        let [build_info, table, relocated_table] = find_sections(file, names).ok()?;
        Some(Self {
            version: buildinfo::version(file, &build_info?)?,
            table: table.or(relocated_table).map(|table| table.address.0),
            parts: OnceLock::new(),
        })
    }

    /// The rest of it, from the file if nobody has asked before.
    ///
    /// # Errors
    ///
    /// It is of a Go that is not known, or not as it should be.
    pub(super) fn parts(&self, file: &File) -> Result<Arc<Parts>, GoError> {
        if let Some(known) = self.parts.get() {
            return Ok(Arc::clone(known));
        }
        let Some(layout) = self.version.minor.and_then(Layout::of) else {
            return Err(GoError::Version {
                version: self.version.text.clone(),
            });
        };
        let unreadable = |_| GoError::FunctionTable("its file is not an ELF file");
        let elf = ElfLayout::read(file).map_err(unreadable)?;
        let table = self
            .table
            .ok_or(GoError::FunctionTable("there is no section .gopclntab"))?;
        let symbols = symbols::find(file, &elf, VARIABLES).map_err(GoError::File)?;
        let parts = Arc::new(Parts {
            layout,
            elf,
            table,
            symbols,
        });
        Ok(Arc::clone(self.parts.get_or_init(|| parts)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{files::FileStore, maps::read_mappings};

    /// Check that none of this process's files is a Go program, and that each was asked once:
    /// what is known of it is not read again.
    #[test]
    fn other_programs() {
        let mappings = read_mappings(std::process::id(), &FileStore::default()).unwrap();
        let files = GoFiles::default();
        for _ in 0..2 {
            for file in mappings.files() {
                assert!(!files.is_go(&file), "{file:?}");
            }
            let known = files.known.lock().unwrap();
            assert_eq!(known.len(), mappings.files().len());
            assert!(known.values().all(Option::is_none));
        }
    }
}
