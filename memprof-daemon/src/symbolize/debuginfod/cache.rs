//! Downloaded debug files on disk, as elfutils' client keeps them: what one of the two
//! has downloaded, the other finds.
//!
//! `CACHE/BUILDID/debuginfo` is the file; empty and without permissions it says that no
//! server had it when it was made (`debuginfod/debuginfod-client.c` in elfutils).

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::process::debug_info::{has_build_id, hex};

/// For how long nobody is asked again for a file that no server had. elfutils' default.
pub(super) const ABSENT_FOR: Duration = Duration::from_secs(600);

const NAME: &str = "debuginfo";

/// What is on disk.
#[derive(Debug)]
pub(super) enum Cached {
    /// The file.
    Here(File),
    /// No server had it; it may be asked for after that time.
    Absent(Duration),
    /// Nothing is known.
    Unknown,
}

/// The directory.
#[derive(Debug)]
pub(super) struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// Makes the directory, for its owner alone, if it is not there.
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        create_directory(&directory)?;
        Ok(Self { directory })
    }

    /// What is known of a build id.
    pub(super) fn look_up(&self, build_id: &[u8]) -> Cached {
        let path = self.directory_of(build_id).join(NAME);
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            return Cached::Unknown;
        };
        if metadata.is_file() && metadata.len() == 0 {
            let age = metadata
                .modified()
                .ok()
                // From the future: a clock was set back.
                .and_then(|made| SystemTime::now().duration_since(made).ok())
                .unwrap_or(ABSENT_FOR);
            return match ABSENT_FOR.checked_sub(age) {
                Some(left) if !left.is_zero() => Cached::Absent(left),
                _ => Cached::Unknown,
            };
        }
        if !metadata.is_file() {
            return Cached::Unknown;
        }
        match File::open(&path) {
            Ok(file) if has_build_id(&file, build_id) => Cached::Here(file),
            Ok(_) => {
                tracing::warn!(path = %path.display(), "not the debug file that its place says");
                Cached::Unknown
            }
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "cannot open a debug file");
                Cached::Unknown
            }
        }
    }

    /// A file to download into. It is nobody's until [`Unfinished::finish`].
    pub(super) fn begin(&self, build_id: &[u8]) -> io::Result<Unfinished> {
        let directory = self.directory_of(build_id);
        create_directory(&directory)?;
        let path = directory.join(format!("{NAME}.{}", std::process::id()));
        // Left by an earlier process of our number.
        let _ = fs::remove_file(&path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Unfinished {
            file: Some(file),
            path,
        })
    }

    /// Remembers that no server has it.
    pub(super) fn remember_absent(&self, build_id: &[u8]) -> io::Result<()> {
        let unfinished = self.begin(build_id)?;
        unfinished.rename(0o000)?;
        Ok(())
    }

    fn directory_of(&self, build_id: &[u8]) -> PathBuf {
        self.directory.join(hex(build_id))
    }
}

fn create_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A file that is being downloaded. It goes unless it is finished.
#[derive(Debug)]
pub(super) struct Unfinished {
    file: Option<File>,
    path: PathBuf,
}

impl Unfinished {
    /// To write to.
    pub(super) fn file(&mut self) -> io::Result<&mut File> {
        self.file.as_mut().ok_or_else(|| io::Error::other("closed"))
    }

    /// Gives it its name, at once: nobody ever sees a part of it.
    pub(super) fn finish(self) -> io::Result<File> {
        self.rename(0o400)
    }

    fn rename(mut self, mode: u32) -> io::Result<File> {
        let file = self.file.take().ok_or_else(|| io::Error::other("closed"))?;
        file.set_permissions(fs::Permissions::from_mode(mode))
            .and_then(|()| fs::rename(&self.path, self.path.with_file_name(NAME)))
            .inspect_err(|_| drop(fs::remove_file(&self.path)))?;
        Ok(file)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::process::elf::ElfLayout;

    fn own_id() -> Vec<u8> {
        let file = File::open("/proc/self/exe").unwrap();
        ElfLayout::read(&file).unwrap().build_id(&file).unwrap()
    }

    /// Check that a finished file is where elfutils looks for it and is found, that an
    /// unfinished one leaves nothing, and that a file with another build id is not taken.
    #[test]
    fn files() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("a/cache")).unwrap();
        let id = own_id();
        assert!(matches!(cache.look_up(&id), Cached::Unknown));
        let own = fs::read("/proc/self/exe").unwrap();
        let write = |id: &[u8]| {
            let mut unfinished = cache.begin(id).unwrap();
            unfinished.file().unwrap().write_all(&own).unwrap();
            unfinished
        };
        drop(write(&id));
        assert!(matches!(cache.look_up(&id), Cached::Unknown));
        write(&id).finish().unwrap();
        assert!(matches!(cache.look_up(&id), Cached::Here(_)));
        let directory = dir.path().join("a/cache").join(hex(&id));
        let names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["debuginfo"]);
        write(&[1, 2]).finish().unwrap();
        assert!(matches!(cache.look_up(&[1, 2]), Cached::Unknown));
    }

    /// Check that what no server has is remembered for its time, and can come later.
    #[test]
    fn absence() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().to_owned()).unwrap();
        let id = own_id();
        cache.remember_absent(&id).unwrap();
        match cache.look_up(&id) {
            Cached::Absent(left) => assert!(left > ABSENT_FOR - Duration::from_secs(60)),
            other => panic!("{other:?}"),
        }
        let path = dir.path().join(hex(&id)).join(NAME);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0);
        let set = |time| {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.set_modified(time).unwrap();
        };
        for hour in [
            SystemTime::now() - Duration::from_secs(3600),
            SystemTime::now() + Duration::from_secs(3600),
        ] {
            set(hour);
            assert!(matches!(cache.look_up(&id), Cached::Unknown));
        }
        let mut unfinished = cache.begin(&id).unwrap();
        let own = fs::read("/proc/self/exe").unwrap();
        unfinished.file().unwrap().write_all(&own).unwrap();
        unfinished.finish().unwrap();
        assert!(matches!(cache.look_up(&id), Cached::Here(_)));
    }
}
