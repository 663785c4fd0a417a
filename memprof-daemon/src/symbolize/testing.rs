//! What the tests of this stage name: the test program itself.

use std::{
    fs::{self, File},
    hint::black_box,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    address::{AbsAddr, FileOffset},
    process::{
        debug_info::DebugInfo,
        mapping::{MappedFile, Mapping, MappingLookup},
    },
};

/// Holds an open file as if a process had mapped it.
pub(crate) fn mapped_file(path: &Path, file: Option<File>) -> Arc<MappedFile> {
    Arc::new(MappedFile {
        path: path.to_owned(),
        device: 0,
        inode: 0,
        debug_info: DebugInfo::Missing,
        build_id: None,
        file,
    })
}

/// Opens a file as if a process had mapped it.
pub(crate) fn open(path: &Path) -> Arc<MappedFile> {
    mapped_file(path, Some(File::open(path).unwrap()))
}

/// The path of the test program.
pub(crate) fn own_path() -> PathBuf {
    fs::read_link("/proc/self/exe").unwrap()
}

/// This process's own mappings.
pub(crate) struct OwnMappings(Vec<Arc<Mapping>>);

impl OwnMappings {
    pub(crate) fn read() -> Self {
        let own_path = own_path();
        let own_file = open(&own_path);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let mappings = maps.lines().map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-').unwrap();
            let name = fields.get(5).copied().unwrap_or_default();
            Arc::new(Mapping {
                start: AbsAddr(hex(start)),
                end: AbsAddr(hex(end)),
                file_offset: FileOffset(hex(fields[2])),
                file: (Path::new(name) == own_path).then(|| Arc::clone(&own_file)),
                name: name.to_owned(),
            })
        });
        Self(mappings.collect())
    }

    /// The first address of the mapping of that name.
    pub(crate) fn start_of(&self, name: &str) -> AbsAddr {
        let mapping = self.0.iter().find(|mapping| mapping.name == name).unwrap();
        mapping.start
    }

    /// Where in the test program's file an address of it is.
    pub(crate) fn file_offset(&self, address: u64) -> FileOffset {
        let mapping = self.lookup(AbsAddr(address)).unwrap();
        FileOffset(mapping.file_offset.0 + address - mapping.start.0)
    }
}

impl MappingLookup for OwnMappings {
    fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>> {
        let holds = |mapping: &&Arc<Mapping>| mapping.start <= address && address < mapping.end;
        self.0.iter().find(holds).map(Arc::clone)
    }
}

/// The line of [`outer_function`].
pub(crate) const OUTER_LINE: u32 = line!() + 4;

/// A function with others inlined into it, two deep.
#[inline(never)]
pub(crate) fn outer_function(value: u64) -> u64 {
    black_box(middle_function(black_box(value)))
}

#[inline(always)]
fn middle_function(value: u64) -> u64 {
    black_box(inner_function(black_box(value)))
}

#[inline(always)]
fn inner_function(value: u64) -> u64 {
    black_box(black_box(value).wrapping_mul(3))
}

/// Where [`outer_function`] is.
pub(crate) fn outer_address() -> u64 {
    black_box(outer_function(1));
    outer_function as *const () as u64
}
