//! Where a file's names come from.

use std::{fs::File, sync::Arc};

use super::debuginfod::Debuginfod;
use crate::process::{content::Content, debug_info::DebugInfo, mapping::MappedFile};

/// A file, and the debug file that it is named by: equal values, equal names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NamedFile {
    /// The file.
    pub content: Content,
    /// Its debug file.
    pub debug: Option<Content>,
}

/// A readable file with all that names are taken from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The file that names are wanted for.
    pub file: Arc<MappedFile>,
    /// What is the same of both.
    pub key: NamedFile,
    /// Its debug file, if a server had it.
    downloaded: Option<Arc<File>>,
}

impl Source {
    /// The source of a file's names as things stand: with a debug file that has arrived
    /// it is another. None if the file cannot be read.
    #[must_use]
    pub fn of(file: &Arc<MappedFile>, debuginfod: Option<&Debuginfod>) -> Option<Self> {
        let build_id = file.build_id.as_deref();
        let content = Content::of(file.file.as_ref()?, build_id).ok()?;
        let downloaded = match (&file.debug_info, build_id, debuginfod) {
            (DebugInfo::Missing, Some(build_id), Some(debuginfod)) => debuginfod.find(build_id),
            _ => None,
        };
        let mut source = Self {
            file: Arc::clone(file),
            key: NamedFile {
                content,
                debug: None,
            },
            downloaded,
        };
        source.key.debug = source
            .debug_file()
            .and_then(|file| Content::of(file, build_id).ok());
        Some(source)
    }

    /// The open debug file, if there is one.
    pub(super) fn debug_file(&self) -> Option<&File> {
        self.file.debug_info.file().or(self.downloaded.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    };

    use super::*;
    use crate::symbolize::testing::own_path;

    /// Check that copies of a library which root alone can have made are named once, that
    /// what another user may have written is not taken for them, and that a debug file is
    /// a part of what is the same.
    #[test]
    fn copies_are_one() {
        let dir = tempfile::tempdir().unwrap();
        let copy = |name: &str, mode, debug_info| {
            let path = dir.path().join(name);
            fs::copy(own_path(), &path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let file = Arc::new(MappedFile {
                path: path.clone(),
                device: 0,
                inode: 0,
                build_id: Some(vec![1, 2, 3]),
                file: Some(File::open(path).unwrap()),
                debug_info,
            });
            Source::of(&file, None).unwrap().key
        };
        let one = copy("one", 0o755, DebugInfo::Missing);
        let two = copy("two", 0o755, DebugInfo::Missing);
        let is_root = fs::metadata(dir.path()).unwrap().uid() == 0;
        assert_eq!(one == two, is_root);
        assert_ne!(one, copy("three", 0o777, DebugInfo::Missing));
        let debug = File::open(own_path()).unwrap();
        assert_ne!(one, copy("four", 0o755, DebugInfo::Separate(debug)));
    }
}
