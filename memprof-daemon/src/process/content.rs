//! When two files are one to us.
//!
//! The same library in 500 containers is 500 files, each with an inode of its own. What
//! is derived of it, names and unwind tables, is to be made and held once. A build id
//! names the content, but anyone can write any build id into a file: believed of every
//! file, one that a user makes could put its names and its unwind tables in place of
//! those of every process's C library. So it is believed only of a file that root owns
//! and nobody else may write; any other file is itself alone.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
};

/// The longest build id that is believed, a SHA-1: linkers write no longer one unless
/// told so.
const MAX_BUILD_ID_BYTES: usize = 20;

/// Bits of a file's mode by which others than its owner may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// What a file holds: equal values, equal content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// By its build id and its size: a file that only root could have made.
    Built {
        /// Zeros behind its end.
        build_id: [u8; MAX_BUILD_ID_BYTES],
        /// Bytes of it.
        id_bytes: u8,
        /// Size of the file.
        size_bytes: u64,
    },
    /// By its inode: any file. With its change time, since files can be changed, and
    /// inode numbers are used again.
    Inode {
        /// `st_dev`.
        device: u64,
        /// `st_ino`.
        inode: u64,
        /// `st_size`.
        size_bytes: u64,
        /// `st_ctime`: nobody can set it.
        changed_s: i64,
        /// Its nanoseconds.
        changed_ns: i64,
    },
}

impl Content {
    /// What the open regular file holds that has this build id in it.
    ///
    /// # Errors
    ///
    /// Its metadata cannot be read, or it is not a regular file.
    pub fn of(file: &File, build_id: Option<&[u8]>) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let built = build_id
            .filter(|_| is_roots(&metadata))
            .and_then(|id| Self::built(id, metadata.len()));
        Ok(built.unwrap_or_else(|| Self::Inode {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            changed_s: metadata.ctime(),
            changed_ns: metadata.ctime_nsec(),
        }))
    }

    fn built(id: &[u8], size_bytes: u64) -> Option<Self> {
        let mut build_id = [0; MAX_BUILD_ID_BYTES];
        build_id.get_mut(..id.len())?.copy_from_slice(id);
        let id_bytes = u8::try_from(id.len()).ok().filter(|&bytes| bytes > 0)?;
        Some(Self::Built {
            build_id,
            id_bytes,
            size_bytes,
        })
    }
}

/// Only root can have written it.
fn is_roots(metadata: &Metadata) -> bool {
    metadata.uid() == 0 && metadata.mode() & WRITABLE_BY_OTHERS == 0
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, chown},
    };

    use super::*;

    fn content(path: &std::path::Path, build_id: &[u8]) -> Content {
        Content::of(&File::open(path).unwrap(), Some(build_id)).unwrap()
    }

    /// Check that copies with one build id are one content if root alone can have written
    /// them, and that size, build id, owner and mode each keep a file apart. As another
    /// user than root, that no two files are one.
    #[test]
    fn a_build_id_is_believed_of_root() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        let mode = |path: &std::path::Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        for path in [&one, &two] {
            fs::write(path, "library").unwrap();
            mode(path, 0o755);
        }
        if !nix::unistd::geteuid().is_root() {
            assert_ne!(content(&one, &[1, 2]), content(&two, &[1, 2]));
            return;
        }
        assert_eq!(content(&one, &[1, 2]), content(&two, &[1, 2]));
        assert_ne!(content(&one, &[1, 2]), content(&two, &[1, 3]));
        assert_ne!(content(&one, &[1]), content(&two, &[1, 0]));
        for other in [0o775, 0o757] {
            mode(&two, other);
            assert_ne!(content(&one, &[1, 2]), content(&two, &[1, 2]), "{other:o}");
        }
        mode(&two, 0o755);
        chown(&two, Some(1), None).unwrap();
        assert_ne!(content(&one, &[1, 2]), content(&two, &[1, 2]));
        chown(&two, Some(0), None).unwrap();
        assert_eq!(content(&one, &[1, 2]), content(&two, &[1, 2]));
        fs::write(&two, "another library").unwrap();
        assert_ne!(content(&one, &[1, 2]), content(&two, &[1, 2]));
    }

    /// Check that build ids of no byte and of too many are none, and that a directory is
    /// no file.
    #[test]
    fn impossible_build_ids() {
        let own = std::path::Path::new("/proc/self/exe");
        for id in [&[][..], &[7; 21], &[7; 64]] {
            assert!(matches!(content(own, id), Content::Inode { .. }));
        }
        assert!(Content::of(&File::open("/").unwrap(), None).is_err());
    }
}
