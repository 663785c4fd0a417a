//! A file and its content, to remember things by.

use std::{fs::Metadata, io, os::unix::fs::MetadataExt as _};

use super::mapping::MappedFile;

/// A file and its state: where a file without a build id is written anew in
/// place, its times change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileState {
    device: u64,
    inode: u64,
    build_id: Option<Vec<u8>>,
    size: u64,
    modified_ns: (i64, i64),
    changed_ns: (i64, i64),
}

impl FileState {
    /// That of a file now.
    ///
    /// # Errors
    ///
    /// It is not open, or the kernel does not tell.
    pub(crate) fn of(file: &MappedFile) -> io::Result<Self> {
        let open = file.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        Ok(Self::new(file, &open.metadata()?))
    }

    fn new(file: &MappedFile, metadata: &Metadata) -> Self {
        Self {
            device: file.device,
            inode: file.inode,
            build_id: file.build_id.clone(),
            size: metadata.size(),
            modified_ns: (metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}
