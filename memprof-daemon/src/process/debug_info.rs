//! Where the debug information of a file is.
//!
//! Distributions take it out of their files and into others, which are named after the
//! file's build id or in its `.gnu_debuglink`. They are looked for where the target would
//! find them, in its own mount namespace and below its own root, and opened when the
//! mapping is learnt: later the target may be gone.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    path::{Component, Path, PathBuf},
};

use super::{
    elf::{ElfLayout, LinkKind, Section},
    files::open_below,
};

/// Where distributions put debug files, below a root.
const DEBUG_DIRECTORY: &str = "usr/lib/debug";

/// A longer section is no link: it holds a file's name, padding and four bytes.
const MAX_LINK_BYTES: u64 = 4096 + 8;

/// A file is not read for its checksum if it is larger: few are, and those have a build
/// id.
const MAX_SUMMED_BYTES: u64 = 1 << 30;

/// Where the debug information of a file is.
#[derive(Debug, Default)]
pub enum DebugInfo {
    /// Nowhere that we know of.
    #[default]
    Missing,
    /// In the file itself.
    Within,
    /// In this one.
    Separate(File),
}

impl DebugInfo {
    /// The separate file, if it is there.
    #[must_use]
    pub const fn file(&self) -> Option<&File> {
        match self {
            Self::Separate(file) => Some(file),
            Self::Missing | Self::Within => None,
        }
    }
}

/// The file that debug information is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// The file.
    pub(super) file: &'a File,
    /// Its layout.
    pub(super) layout: &'a ElfLayout,
    /// Its build id.
    pub(super) build_id: Option<&'a [u8]>,
    /// Where the target sees it.
    pub(super) path: &'a Path,
}

impl Wanted<'_> {
    /// Looks where process `pid` would, and then where we keep debug files.
    pub(super) fn find(&self, pid: u32) -> DebugInfo {
        if self.layout.debug_info.is_some() {
            return DebugInfo::Within;
        }
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        self.find_below(&root, Path::new("/"))
    }

    fn find_below(&self, root: &Path, ours: &Path) -> DebugInfo {
        let link = self
            .layout
            .links
            .iter()
            .find(|(kind, _)| *kind == LinkKind::Debug)
            .and_then(|(_, section)| Link::read(self.file, section));
        let link = link.as_ref();
        let everywhere = [Beside::File, Beside::Hidden, Beside::InDebugDirectory];
        self.by_build_id(root)
            .or_else(|| self.by_link(root, link?, &everywhere))
            .or_else(|| self.by_build_id(ours))
            // What is beside the file in our root is the target's all the same, and links
            // in there would be followed in ours.
            .or_else(|| self.by_link(ours, link?, &[Beside::InDebugDirectory]))
            .map_or(DebugInfo::Missing, DebugInfo::Separate)
    }

    fn by_build_id(&self, root: &Path) -> Option<File> {
        let hex = hex(self.build_id?);
        let (first, rest) = hex.split_at_checked(2)?;
        let path = format!("{DEBUG_DIRECTORY}/.build-id/{first}/{rest}.debug");
        let file = open_below(root, Path::new(&path)).ok()?;
        has_build_id(&file, self.build_id?).then_some(file)
    }

    fn by_link(&self, root: &Path, link: &Link, places: &[Beside]) -> Option<File> {
        let directory = self.path_below(root);
        let directory = directory.parent()?;
        places
            .iter()
            .map(|place| match place {
                Beside::File => directory.to_owned(),
                Beside::Hidden => directory.join(".debug"),
                Beside::InDebugDirectory => Path::new(DEBUG_DIRECTORY).join(directory),
            })
            .filter_map(|directory| open_below(root, &directory.join(&link.name)).ok())
            .find(|file| self.is_linked(file, link))
    }

    /// The path of the file from a root on. The kernel shows it from our root, unless it
    /// is in another mount namespace.
    fn path_below(&self, root: &Path) -> PathBuf {
        let below = fs::read_link(root)
            .ok()
            .and_then(|root| self.path.strip_prefix(root).ok());
        below
            .unwrap_or(self.path)
            .components()
            .filter(|part| matches!(part, Component::Normal(_)))
            .collect()
    }

    /// Whether this is the file that the link was written for. Build ids tell, without
    /// reading all of it; the checksum is for files without.
    fn is_linked(&self, file: &File, link: &Link) -> bool {
        let Ok(layout) = ElfLayout::read(file) else {
            return false;
        };
        match (self.build_id, layout.build_id(file)) {
            (Some(wanted), Some(found)) => wanted == found,
            _ => checksum(file).is_ok_and(|sum| sum == link.checksum),
        }
    }
}

/// Where a linked file can be.
#[derive(Clone, Copy, Debug)]
enum Beside {
    /// In the directory of the file.
    File,
    /// In `.debug` there.
    Hidden,
    /// In the directory's likeness among the debug files.
    InDebugDirectory,
}

/// What a `.gnu_debuglink` says ("Debugging Information in Separate Files" in gdb's
/// manual).
#[derive(Debug, PartialEq, Eq)]
struct Link {
    name: PathBuf,
    checksum: u32,
}

impl Link {
    fn read(file: &File, section: &Section) -> Option<Self> {
        Self::parse(&read_link(file, section)?)
    }

    /// A name, zeros up to a multiple of four, and a checksum.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let length = bytes.iter().position(|&byte| byte == 0)?;
        let name = Path::new(OsStr::from_bytes(bytes.get(..length)?));
        // The name of a file, and no way to another place.
        let mut parts = name.components();
        let (Some(Component::Normal(only)), None) = (parts.next(), parts.next()) else {
            return None;
        };
        let place = (length + 1).next_multiple_of(4);
        let checksum = bytes.get(place..)?.first_chunk()?;
        Some(Self {
            name: PathBuf::from(only),
            checksum: u32::from_le_bytes(*checksum),
        })
    }
}

fn read_link(file: &File, section: &Section) -> Option<Vec<u8>> {
    if section.size > MAX_LINK_BYTES {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(section.size).ok()?];
    file.read_exact_at(&mut bytes, section.file_offset.0).ok()?;
    Some(bytes)
}

/// Whether all that a reader of the debug information in `file` opens besides is below our
/// own `/usr/lib/debug`. A file can name any other, and opening one can have effects: a
/// named pipe is waited for, a device may act.
#[must_use]
pub fn leads_nowhere_else(file: &File, layout: &ElfLayout) -> bool {
    layout.has_section_names
        && layout.links.iter().all(|(kind, section)| match kind {
            LinkKind::Shared => read_link(file, section).is_some_and(|link| is_ours(&link)),
            // Of the debug link we take care ourselves.
            LinkKind::Debug | LinkKind::Supplementary => false,
        })
}

/// Whether a path with a zero behind it leads below our directory of debug files.
fn is_ours(link: &[u8]) -> bool {
    let path = link.split(|&byte| byte == 0).next().unwrap_or_default();
    let path = Path::new(OsStr::from_bytes(path));
    path.strip_prefix(Path::new("/").join(DEBUG_DIRECTORY))
        .is_ok_and(|rest| {
            rest.components()
                .all(|part| matches!(part, Component::Normal(_)))
        })
}

/// The CRC-32 of the whole file.
fn checksum(file: &File) -> io::Result<u32> {
    let size = file.metadata()?.len();
    if size > MAX_SUMMED_BYTES {
        return Err(io::Error::other("it is larger than 1 GiB"));
    }
    let mut sum = flate2::Crc::new();
    let mut chunk = vec![0; 1 << 18];
    let mut place = 0;
    // A file that grows is not read for ever.
    while place < size {
        let read = file.read_at(&mut chunk, place)?;
        if read == 0 {
            break;
        }
        sum.update(chunk.get(..read).unwrap_or_default());
        place += read as u64;
    }
    Ok(sum.sum())
}

/// Whether the file is an ELF file with this build id.
#[must_use]
pub fn has_build_id(file: &File, build_id: &[u8]) -> bool {
    ElfLayout::read(file)
        .ok()
        .and_then(|layout| layout.build_id(file))
        .is_some_and(|id| id == build_id)
}

/// As build ids are written.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, process::Command};

    use super::*;

    /// Check the parts of a link, and that no name leads elsewhere: paths, none, one
    /// without an end; and that a checksum must be there.
    #[test]
    fn links() {
        let link = |bytes: &[u8]| Link::parse(bytes).map(|link| (link.name, link.checksum));
        let expected = |name: &str| Some((PathBuf::from(name), 0x0403_0201));
        assert_eq!(link(b"a.debug\0\x01\x02\x03\x04"), expected("a.debug"));
        assert_eq!(link(b"abc.d\0\0\0\x01\x02\x03\x04"), expected("abc.d"));
        for hostile in [
            &b""[..],
            b"abc",
            b"\0\0\0\0\x01\x02\x03\x04",
            b"abc\0\x01\x02\x03",
            b"../abc\0\0\x01\x02\x03\x04",
            b"/abc\0\0\0\0\x01\x02\x03\x04",
            b"a/b\0\x01\x02\x03\x04",
            b"..\0\0\x01\x02\x03\x04",
            b".\0\0\0\x01\x02\x03\x04",
        ] {
            assert_eq!(link(hostile), None, "{hostile:?}");
        }
    }

    /// Check which shared debug files may be opened: ours alone, by no detour.
    #[test]
    fn shared_files() {
        for (link, expected) in [
            (
                &b"/usr/lib/debug/.dwz/x86_64-linux-gnu/a.debug\0id"[..],
                true,
            ),
            (b"/usr/lib/debug/../../../dev/zero\0id", false),
            (b"/usr/lib/debugger\0id", false),
            (b"../../.dwz/a.debug\0id", false),
            (b"/dev/zero\0id", false),
            (b"", false),
        ] {
            assert_eq!(is_ours(link), expected, "{link:?}");
        }
    }

    /// A root directory with a program in `opt`, with a link to a debug file of which the
    /// bytes are returned.
    fn root(flags: &[&str]) -> (tempfile::TempDir, Vec<u8>) {
        let root = tempfile::tempdir().unwrap();
        let opt = root.path().join("opt");
        fs::create_dir(&opt).unwrap();
        fs::write(opt.join("a.c"), "int main(void) { return 0; }").unwrap();
        let run = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments).current_dir(&opt);
            assert!(command.status().unwrap().success(), "{command:?}");
        };
        run("cc", &[flags, &["-g", "-o", "a", "a.c"]].concat());
        run("objcopy", &["--only-keep-debug", "a", "a.debug"]);
        run("strip", &["a"]);
        run("objcopy", &["--add-gnu-debuglink=a.debug", "a"]);
        let debug = fs::read(opt.join("a.debug")).unwrap();
        fs::remove_file(opt.join("a.debug")).unwrap();
        (root, debug)
    }

    fn find(root: &Path) -> DebugInfo {
        let file = File::open(root.join("opt/a")).unwrap();
        let layout = ElfLayout::read(&file).unwrap();
        let build_id = layout.build_id(&file);
        Wanted {
            file: &file,
            layout: &layout,
            build_id: build_id.as_deref(),
            path: Path::new("/opt/a"),
        }
        .find_below(root, root)
    }

    /// Check each place where the linked file can be, with a build id to know it by and
    /// with its checksum; and that a damaged one is not taken by its checksum.
    #[test]
    fn linked_files() {
        for flags in [["-Wl,--build-id"], ["-Wl,--build-id=none"]] {
            let (root, debug) = root(&flags);
            assert!(find(root.path()).file().is_none());
            for place in ["opt", "opt/.debug", "usr/lib/debug/opt"] {
                let directory = root.path().join(place);
                fs::create_dir_all(&directory).unwrap();
                fs::write(directory.join("a.debug"), &debug).unwrap();
                assert!(find(root.path()).file().is_some(), "{flags:?} {place}");
                let mut damaged = debug.clone();
                *damaged.last_mut().unwrap() ^= 1;
                fs::write(directory.join("a.debug"), damaged).unwrap();
                let by_checksum = flags == ["-Wl,--build-id=none"];
                assert_eq!(find(root.path()).file().is_none(), by_checksum, "{place}");
                fs::remove_file(directory.join("a.debug")).unwrap();
            }
        }
    }

    /// Check that another program's debug file is refused, and that a link which leads
    /// out of the root leads nowhere.
    #[test]
    fn what_is_refused() {
        let (root, debug) = root(&["-Wl,--build-id"]);
        let place = root.path().join("opt/a.debug");
        fs::copy("/proc/self/exe", &place).unwrap();
        assert!(find(root.path()).file().is_none());
        fs::remove_file(&place).unwrap();

        let outside = tempfile::tempdir().unwrap();
        let debug_file = outside.path().join("a.debug");
        fs::write(&debug_file, debug).unwrap();
        symlink(&debug_file, &place).unwrap();
        assert!(find(root.path()).file().is_none());
        // The same within.
        let inside = root.path().join(debug_file.strip_prefix("/").unwrap());
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::copy(&debug_file, inside).unwrap();
        assert!(find(root.path()).file().is_some());
    }
}
