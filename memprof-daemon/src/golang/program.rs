//! A Go program among a process's files.

use std::{
    fs::File,
    sync::{Arc, Mutex},
};

use super::{GoError, buildinfo, layout::Layout, memory::FileImage, names::Places, symbols};
use crate::process::{
    elf::{ElfLayout, find_sections},
    mapping::{MappedFile, Mapping, MappingTable},
};

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

impl GoProgram {
    /// The Go program among the files that a process maps, or why it cannot be read; none if
    /// there is none. Of several, which only libraries built by Go can be, it is the first.
    pub(crate) fn find(mappings: &MappingTable) -> Option<Result<Self, GoError>> {
        let mut seen = Vec::new();
        mappings.iter().find_map(|mapping| {
            let file = mapping.file.as_ref()?;
            let open = file.file.as_ref()?;
            let id = (file.device, file.inode);
            if seen.contains(&id) {
                return None;
            }
            seen.push(id);
            Self::read(mapping, file, open)
        })
    }

    /// The version of the Go that built it.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Its file.
    pub(crate) fn file(&self) -> &MappedFile {
        &self.image.file
    }

    fn read(
        mapping: &Mapping,
        file: &Arc<MappedFile>,
        open: &File,
    ) -> Option<Result<Self, GoError>> {
        let names: [&[u8]; 3] = [
            b".go.buildinfo",
            b".gopclntab",
            // Of position-independent programs before Go 1.26.
            b".data.rel.ro.gopclntab",
        ];
        let [build_info, table, relocated_table] = find_sections(open, names).ok()?;
        let version = buildinfo::version(open, &build_info?)?;
        Some(Self::known(
            mapping,
            file,
            open,
            version,
            table.or(relocated_table).map(|table| table.address.0),
        ))
    }

    fn known(
        mapping: &Mapping,
        file: &Arc<MappedFile>,
        open: &File,
        version: buildinfo::Version,
        table: Option<u64>,
    ) -> Result<Self, GoError> {
        let Some(layout) = version.minor.and_then(Layout::of) else {
            return Err(GoError::Version {
                version: version.text,
            });
        };
        let unreadable = |_| GoError::FunctionTable("its file is not an ELF file");
        let elf = ElfLayout::read(open).map_err(unreadable)?;
        let table = table.ok_or(GoError::FunctionTable("there is no section .gopclntab"))?;
        let start = elf
            .code_address(mapping.file_offset)
            .ok_or(GoError::FunctionTable("its code is mapped from nowhere"))?;
        let bias = mapping.start.0.wrapping_sub(start.0);
        let at = |address: u64| address.wrapping_add(bias);
        let symbols = symbols::find(
            open,
            &elf,
            [
                "runtime.mbuckets",
                "runtime.mProfCycle",
                "runtime.MemProfileRate",
                "runtime.disableMemoryProfiling",
            ],
        )
        .map_err(GoError::File)?;
        let variables = match symbols {
            [Some(buckets), Some(cycle), Some(rate), is_disabled] => Some(Variables {
                buckets: at(buckets),
                cycle: at(cycle),
                rate: at(rate),
                is_disabled: is_disabled.map(at),
            }),
            _ => None,
        };
        let data = elf
            .segments
            .iter()
            .filter(|segment| !segment.executable)
            .map(|segment| {
                let start = at(segment.address.0);
                (start, start.saturating_add(segment.file_size))
            })
            .collect();
        Ok(Self {
            version: version.text,
            layout,
            image: FileImage {
                file: Arc::clone(file),
                segments: elf.segments,
                bias,
            },
            function_table: at(table),
            variables,
            data,
            places: Mutex::default(),
        })
    }
}
