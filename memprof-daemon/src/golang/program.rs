//! A Go program among a process's files.

use std::sync::{Arc, Mutex};

use super::{
    GoError,
    file::{GoFile, GoFiles},
    layout::Layout,
    memory::FileImage,
    names::Places,
};
use crate::process::mapping::{MappedFile, Mapping, MappingTable};

/// Where a program's variables are in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variables {
    /// `runtime.mbuckets`.
    pub(super) buckets: u64,
    /// `runtime.mProfCycle`.
    pub(super) cycle: u64,
    /// `runtime.MemProfileRate`.
    pub(super) rate: u64,
    /// `runtime.disableMemoryProfiling`, which the linker sets; by symbol only.
    pub(super) is_disabled: Option<u64>,
}

/// What its file says about a Go program, at its place in a process.
#[derive(Debug)]
pub(crate) struct GoProgram {
    /// Version of Go.
    pub(super) version: String,
    pub(super) layout: Layout,
    pub(super) image: FileImage,
    /// Where its function table is in memory.
    pub(super) function_table: u64,
    /// Its variables, if it has symbols.
    pub(super) variables: Option<Variables>,
    /// Parts of its memory that have data, from the file at first.
    pub(super) data: Vec<(u64, u64)>,
    /// Names of its instructions that were asked for.
    pub(super) places: Mutex<Places>,
}

/// A file that Go has built, and where a process maps it.
pub(super) struct Mapped<'a> {
    go: Arc<GoFile>,
    file: &'a Arc<MappedFile>,
    mapping: &'a Mapping,
}

impl<'a> Mapped<'a> {
    /// That of a process's files; none if there is none. Of several, which only libraries built
    /// by Go can be, it is the first.
    pub(super) fn find(mappings: &'a MappingTable, files: &GoFiles) -> Option<Self> {
        let mut seen = Vec::new();
        mappings.iter().find_map(|mapping| {
            let file = mapping.file.as_ref()?;
            let id = (file.device, file.inode);
            if seen.contains(&id) {
                return None;
            }
            seen.push(id);
            let go = files.file(file)?;
            Some(Self { go, file, mapping })
        })
    }

    /// The version of the Go that built it.
    pub(super) fn version(&self) -> &str {
        &self.go.version.text
    }

    /// The program at its place.
    ///
    /// # Errors
    ///
    /// It is of a Go that is not known, or not as it should be.
    pub(super) fn program(&self) -> Result<GoProgram, GoError> {
        let gone = || GoError::File(std::io::ErrorKind::NotFound.into());
        let open = self.file.file.as_ref().ok_or_else(gone)?;
        let parts = self.go.parts(open)?;
        let start = parts
            .elf
            .code_address(self.mapping.file_offset)
            .ok_or(GoError::FunctionTable("its code is mapped from nowhere"))?;
        let bias = self.mapping.start.0.wrapping_sub(start.0);
        let at = |address: u64| address.wrapping_add(bias);
        let variables = match parts.symbols {
            [Some(buckets), Some(cycle), Some(rate), is_disabled] => Some(Variables {
                buckets: at(buckets),
                cycle: at(cycle),
                rate: at(rate),
                is_disabled: is_disabled.map(at),
            }),
            _ => None,
        };
        let data = parts
            .elf
            .segments
            .iter()
            .filter(|segment| !segment.executable)
            .map(|segment| {
                let start = at(segment.address.0);
                (start, start.saturating_add(segment.file_size))
            })
            .collect();
        Ok(GoProgram {
            version: self.version().to_owned(),
            layout: parts.layout,
            image: FileImage {
                file: Arc::clone(self.file),
                segments: parts.elf.segments.clone(),
                bias,
            },
            function_table: at(parts.table),
            variables,
            data,
            places: Mutex::default(),
        })
    }
}

impl GoProgram {
    /// The version of the Go that built it.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Its file.
    pub(crate) fn file(&self) -> &MappedFile {
        &self.image.file
    }
}
