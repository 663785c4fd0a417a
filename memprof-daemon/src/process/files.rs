//! The files that processes map, each opened once.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use super::{
    debug_info::{DebugInfo, Wanted},
    elf::ElfLayout,
    mapping::MappedFile,
    maps::{self, MapsEntry},
};

/// Holds one open file for each (device, inode) that some process maps, for as
/// long as anyone has its [`MappedFile`].
///
/// While the file is held open its inode number cannot be given to another
/// file, so the pair names it.
#[derive(Debug, Default)]
pub struct FileStore {
    files: Mutex<HashMap<(u64, u64), Weak<MappedFile>>>,
}

impl FileStore {
    /// The file that `entry` of process `pid` maps.
    ///
    /// Failure is part of the result: `MappedFile::file` is then none, and such
    /// a result is not shared, so that the next call tries again.
    #[must_use]
    pub fn open(&self, pid: u32, entry: &MapsEntry) -> Arc<MappedFile> {
        match open_mapped(pid, entry).and_then(|file| self.share(pid, file, entry)) {
            Ok(file) => file,
            Err(error) => {
                tracing::debug!(pid, path = %entry.path.display(), %error, "cannot open a mapped file");
                Arc::new(MappedFile {
                    path: entry.path.clone(),
                    device: kernel_device(entry),
                    inode: entry.inode,
                    build_id: None,
                    file: None,
                    debug_info: DebugInfo::Missing,
                })
            }
        }
    }

    fn share(&self, pid: u32, file: File, entry: &MapsEntry) -> io::Result<Arc<MappedFile>> {
        let metadata = file.metadata()?;
        let key = (metadata.dev(), metadata.ino());
        if let Some(known) = self.known(key) {
            return Ok(known);
        }
        // Outside the lock: this reads the file, and other files need not wait.
        let layout = ElfLayout::read(&file).unwrap_or_default();
        let build_id = layout.build_id(&file);
        let wanted = Wanted {
            file: &file,
            layout: &layout,
            build_id: build_id.as_deref(),
            path: &entry.path,
        };
        let opened = Arc::new(MappedFile {
            path: entry.path.clone(),
            device: key.0,
            inode: key.1,
            debug_info: wanted.find(pid),
            build_id,
            file: Some(file),
        });
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = files.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        // Forget what nobody holds any more, at a cost shared by the insertions
        // that made the map grow.
        if files.len() == files.capacity() {
            files.retain(|_, file| file.strong_count() > 0);
        }
        files.insert(key, Arc::downgrade(&opened));
        Ok(opened)
    }

    fn known(&self, key: (u64, u64)) -> Option<Arc<MappedFile>> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.get(&key).and_then(Weak::upgrade)
    }

    /// How many files are held open.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files
            .values()
            .filter(|file| file.strong_count() > 0)
            .count()
    }
}

/// The device number that the kernel shows for a mapping, in the form of
/// `st_dev`.
fn kernel_device(entry: &MapsEntry) -> u64 {
    libc::makedev(entry.device_major, entry.device_minor)
}

fn open_mapped(pid: u32, entry: &MapsEntry) -> io::Result<File> {
    // The link leads to the mapped file itself, whatever its name means now and
    // in whose mount namespace. Its device may be another than the one in
    // `maps` (overlayfs, btrfs), its inode number must be the same: otherwise
    // the range was mapped anew meanwhile.
    let linked = open_link(pid, entry).or_else(|error| {
        // A part of it may have been unmapped or protected since a kernel
        // record gave its range.
        let now = maps::read_maps(pid).map_err(|_| io::Error::from(error.kind()))?;
        let now = now
            .iter()
            .find(|now| now.start <= entry.start && entry.start < now.end)
            .filter(|now| now.inode == entry.inode)
            .ok_or(error)?;
        open_link(pid, now)
    });
    let link_error = match linked {
        Ok(file) => return Ok(file),
        Err(error) => error,
    };
    // The kernel shows paths from its reader's root, except that a path in
    // another mount namespace begins at that namespace's root.
    let root = Path::new("/proc").join(pid.to_string()).join("root");
    let path = entry.path.strip_prefix("/").unwrap_or(&entry.path);
    let candidates = [root.join(path), entry.path.clone(), root.join(marked(path))];
    for candidate in candidates {
        let Ok(file) = open_regular(&candidate) else {
            continue;
        };
        let metadata = file.metadata()?;
        if (metadata.dev(), metadata.ino()) == (kernel_device(entry), entry.inode) {
            return Ok(file);
        }
    }
    Err(link_error)
}

/// A path that really ends in the kernel's mark of deletion.
fn marked(path: &Path) -> PathBuf {
    let mut marked = path.as_os_str().as_bytes().to_vec();
    marked.extend(b" (deleted)");
    PathBuf::from(std::ffi::OsString::from_vec(marked))
}

fn open_link(pid: u32, entry: &MapsEntry) -> io::Result<File> {
    let link = format!(
        "/proc/{pid}/map_files/{:x}-{:x}",
        entry.start.0, entry.end.0
    );
    let file = open_regular(Path::new(&link))?;
    if file.metadata()?.ino() != entry.inode {
        return Err(io::Error::other("the address range maps another file now"));
    }
    Ok(file)
}

/// Opens a regular file below a root directory for reading, as a process with that root
/// does: no link leads out of it (`openat2`, Linux 5.6).
pub(super) fn open_below(root: &Path, path: &Path) -> io::Result<File> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2};
    let root = rustix::fs::openat(
        CWD,
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let place = openat2(
        &root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?;
    let place = File::from(place);
    if !place.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(open(path, flags, Mode::empty())?))
}

/// Opens a regular file for reading, and nothing else: to open a device or a
/// named pipe can have effects of its own.
fn open_regular(path: &Path) -> io::Result<File> {
    let place = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(path)?;
    if !place.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        address::AbsAddr,
        process::mapping::{Mapping, MappingTable},
    };
    use std::{
        fs,
        process::{Child, Command},
    };

    struct Sleeper(Child, PathBuf);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
            let _ = fs::remove_file(&self.1);
            let _ = fs::remove_dir(self.1.parent().unwrap());
        }
    }

    /// Runs a copy of `sleep` at `path`, and waits until it runs.
    fn sleeper(path: &Path) -> Sleeper {
        fs::copy("/bin/sleep", path).unwrap();
        // A child that another test has just forked holds the copy open for
        // writing until it execs.
        let child = loop {
            match Command::new(path).arg("60").spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {}
                started => break started.unwrap(),
            }
        };
        let sleeper = Sleeper(child, path.to_owned());
        while fs::read_link(format!("/proc/{}/exe", sleeper.0.id())).unwrap() != *path
            || !table(&sleeper, &FileStore::default())
                .iter()
                .any(|mapping| mapping.name.contains("libc"))
        {
            std::thread::yield_now();
        }
        sleeper
    }

    fn table(sleeper: &Sleeper, files: &FileStore) -> MappingTable {
        maps::read_mappings(sleeper.0.id(), files).unwrap()
    }

    fn own_mapping(table: &MappingTable, path: &Path) -> Arc<Mapping> {
        let name = path.to_string_lossy();
        Arc::clone(table.iter().find(|mapping| mapping.name == name).unwrap())
    }

    fn scratch(name: &str) -> PathBuf {
        let pid = std::process::id();
        let directory = std::env::temp_dir().join(format!("memprof-{pid}-{}", name.len()));
        fs::create_dir_all(&directory).unwrap();
        directory.join(name)
    }

    /// Check that a program under a name with spaces and a newline is opened,
    /// also after the file was deleted and another put in its place.
    #[test]
    fn deleted_and_replaced_file() {
        let path = scratch("a program\nof (deleted)");
        let sleeper = sleeper(&path);
        let inode = fs::metadata(&path).unwrap().ino();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "something else").unwrap();
        let files = FileStore::default();
        let table = table(&sleeper, &files);
        let mapping = own_mapping(&table, &path);
        let file = mapping.file.as_ref().unwrap();
        assert_eq!(file.path, path);
        assert_eq!(file.inode, inode);
        let open = file.file.as_ref().unwrap();
        assert_eq!(open.metadata().unwrap().ino(), inode);
        assert!(file.build_id.is_some());
    }

    /// Check that two processes share one open file, and that it is closed when
    /// both tables are gone.
    #[test]
    fn shared_and_released() {
        let (one, two) = (sleeper(&scratch("first")), sleeper(&scratch("second")));
        let files = FileStore::default();
        let (first, second) = (table(&one, &files), table(&two, &files));
        let libc = |table: &MappingTable| {
            let mapping = table.iter().find(|m| m.name.contains("libc")).unwrap();
            Arc::clone(mapping.file.as_ref().unwrap())
        };
        assert!(Arc::ptr_eq(&libc(&first), &libc(&second)));
        // Two programs, one libc, one loader.
        assert_eq!(files.open_files(), 4);
        drop((first, second));
        assert_eq!(files.open_files(), 0);
    }

    /// Check that a range that has changed since it was reported is found by its
    /// first address, and that one that maps another file is not accepted.
    #[test]
    fn changed_ranges() {
        let path = scratch("ranges");
        let sleeper = sleeper(&path);
        let pid = sleeper.0.id();
        let entries = maps::read_maps(pid).unwrap();
        let mut entry = entries
            .iter()
            .find(|entry| entry.executable && entry.path == path)
            .cloned()
            .unwrap();
        entry.end = AbsAddr(entry.end.0 + 0x10000);
        let files = FileStore::default();
        assert!(files.open(pid, &entry).file.is_some());
        entry.inode += 1;
        let unopened = files.open(pid, &entry);
        assert!(unopened.file.is_none());
        assert_eq!(unopened.inode, entry.inode);
    }

    /// Check that a device is not opened.
    #[test]
    fn devices_stay_closed() {
        assert!(open_regular(Path::new("/dev/zero")).is_err());
        assert!(open_regular(Path::new("/bin/true")).is_ok());
    }

    /// Check that links in another root lead to what they lead to there, absolute ones and
    /// such as climb above it too.
    #[test]
    fn links_stay_below_their_root() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("etc");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("passwd"), "inside").unwrap();
        for (name, target) in [("absolute", "/etc"), ("climbs", "../../../../../../../etc")] {
            std::os::unix::fs::symlink(target, dir.path().join(name)).unwrap();
            let path = Path::new(name).join("passwd");
            let file = open_below(dir.path(), &path).unwrap();
            assert_eq!(std::io::read_to_string(file).unwrap(), "inside", "{name}");
        }
        assert!(open_below(dir.path(), Path::new("etc")).is_err());
        assert!(open_below(dir.path(), Path::new("missing")).is_err());
    }
}
