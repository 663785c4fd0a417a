//! `/proc/PID/maps`.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use super::{
    files::FileStore,
    info::ProcessError,
    mapping::{Mapping, MappingTable},
};
use crate::address::{AbsAddr, FileOffset};

/// One line of `/proc/PID/maps`, or what a kernel record says of a new mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapsEntry {
    /// First address.
    pub start: AbsAddr,
    /// First address behind it.
    pub end: AbsAddr,
    /// Code can run in it.
    pub executable: bool,
    /// Where in the file `start` is.
    pub file_offset: FileOffset,
    /// Device number as the kernel shows it, which need not be the `st_dev` of
    /// the file: overlayfs and btrfs have others.
    pub device_major: u32,
    /// See `device_major`.
    pub device_minor: u32,
    /// 0 without a file.
    pub inode: u64,
    /// The path without ` (deleted)`, or the kernel's name for memory without a
    /// file, or nothing.
    pub path: PathBuf,
    /// The kernel said that no directory holds the file any more. A file whose
    /// name ends so looks the same.
    pub deleted: bool,
}

impl MapsEntry {
    /// The entry that a kernel record of a new executable mapping amounts to;
    /// `path` as the record has it. None if its range is empty or wraps around.
    #[must_use]
    pub fn from_record(
        start: AbsAddr,
        len: u64,
        file_offset: FileOffset,
        (device_major, device_minor): (u32, u32),
        inode: u64,
        path: &Path,
    ) -> Option<Self> {
        let end = AbsAddr(start.0.checked_add(len)?);
        (start < end).then_some(())?;
        // Records call anonymous memory what maps leaves unnamed
        // (kernel/events/core.c, `perf_event_mmap_event`).
        let path = match path.as_os_str().as_bytes() {
            b"//anon" => b"",
            path => path,
        };
        let (path, deleted) = split_deleted(path);
        Some(Self {
            start,
            end,
            executable: true,
            file_offset,
            device_major,
            device_minor,
            inode,
            path: PathBuf::from(OsStr::from_bytes(path)),
            deleted,
        })
    }

    /// Whether the mapping is of a file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.inode != 0
    }
}

/// Splits ` (deleted)` from a path as the kernel prints it.
#[must_use]
pub fn split_deleted(path: &[u8]) -> (&[u8], bool) {
    match path.strip_suffix(b" (deleted)") {
        Some(rest) => (rest, true),
        None => (path, false),
    }
}

/// Reads the executable mappings of `pid` and opens their files.
///
/// # Errors
///
/// The process does not exist, ends meanwhile, or may not be looked at.
pub fn read_mappings(pid: u32, files: &FileStore) -> Result<MappingTable, ProcessError> {
    let mut table = MappingTable::default();
    for entry in read_maps(pid)?.iter().filter(|entry| entry.executable) {
        table.insert(mapping_of(pid, entry, files));
    }
    Ok(table)
}

/// The mapping that `entry` describes, with its file opened.
#[must_use]
pub fn mapping_of(pid: u32, entry: &MapsEntry, files: &FileStore) -> Mapping {
    Mapping {
        start: entry.start,
        end: entry.end,
        file_offset: entry.file_offset,
        file: entry.is_file().then(|| files.open(pid, entry)),
        name: entry.path.to_string_lossy().into_owned(),
    }
}

/// Reads all mappings of `pid`.
///
/// # Errors
///
/// As for [`read_mappings`].
pub fn read_maps(pid: u32) -> Result<Vec<MapsEntry>, ProcessError> {
    let text =
        fs::read(format!("/proc/{pid}/maps")).map_err(|error| ProcessError::from_io(pid, error))?;
    parse_maps(&text).map_err(|line| ProcessError::Malformed {
        pid,
        what: "maps",
        text: line,
    })
}

/// Parses the text of `/proc/PID/maps`.
///
/// # Errors
///
/// Gives back the first line that is not one.
pub fn parse_maps(text: &[u8]) -> Result<Vec<MapsEntry>, String> {
    // The kernel escapes newlines in names, so a line is a mapping.
    text.split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| parse_line(line).ok_or_else(|| String::from_utf8_lossy(line).into_owned()))
        .collect()
}

/// `START-END PERM OFFSET MAJOR:MINOR INODE   NAME` (fs/proc/task_mmu.c,
/// `show_map_vma`). The name is separated by at least one space and begins at
/// column 73 or later, so leading spaces of a name cannot be told from padding;
/// no name begins with one, since paths begin with a slash.
fn parse_line(line: &[u8]) -> Option<MapsEntry> {
    let (range, rest) = split_field(line)?;
    let (permissions, rest) = split_field(rest)?;
    let (offset, rest) = split_field(rest)?;
    let (device, rest) = split_field(rest)?;
    let (inode, name) = split_field(rest)?;

    let (start, end) = range.split_once('-')?;
    let (major, minor) = device.split_once(':')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let (path, deleted) = split_deleted(name.trim_ascii_start());
    (start < end).then_some(MapsEntry {
        start: AbsAddr(start),
        end: AbsAddr(end),
        executable: permissions.as_bytes().get(2) == Some(&b'x'),
        file_offset: FileOffset(hex(offset)?),
        device_major: u32::from_str_radix(major, 16).ok()?,
        device_minor: u32::from_str_radix(minor, 16).ok()?,
        inode: inode.parse().ok()?,
        path: PathBuf::from(OsString::from_vec(unescape_newlines(path))),
        deleted,
    })
}

/// The text up to the first space, which may be missing at the end, and what
/// follows it.
fn split_field(line: &[u8]) -> Option<(&str, &[u8])> {
    let end = line.iter().position(|&byte| byte == b' ');
    let (field, rest) = match end {
        Some(end) => (line.get(..end)?, line.get(end + 1..)?),
        None => (line, &[][..]),
    };
    (!field.is_empty()).then_some(())?;
    Some((std::str::from_utf8(field).ok()?, rest))
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// Undoes the kernel's escape of newlines (fs/seq_file.c, `mangle_path`). It
/// escapes nothing else, not even the backslash, so a name that holds `\012`
/// itself is read wrong: files are therefore opened by address, not by name.
fn unescape_newlines(mut path: &[u8]) -> Vec<u8> {
    const ESCAPED: &[u8] = b"\\012";
    let mut plain = Vec::with_capacity(path.len());
    while let Some((&first, rest)) = path.split_first() {
        match path.strip_prefix(ESCAPED) {
            Some(after) => {
                plain.push(b'\n');
                path = after;
            }
            None => {
                plain.push(first);
                path = rest;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::mapping::MappingLookup;

    /// Check that the usual kinds of line are read: file, unnamed, named by the
    /// kernel, anonymous with a name that has spaces.
    #[test]
    fn usual_lines() {
        let text = b"55a975b16000-55a975b1c000 r-xp 00002000 fe:00 247282                     /usr/bin/head\n\
            7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n\
            7f0000001000-7f0000002000 rwxp 00000000 00:00 0                          [anon: my heap]\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let entries = parse_maps(text).unwrap();
        assert_eq!(entries.len(), 4);
        assert_eq!(
            entries[0],
            MapsEntry {
                start: AbsAddr(0x55a9_75b1_6000),
                end: AbsAddr(0x55a9_75b1_c000),
                executable: true,
                file_offset: FileOffset(0x2000),
                device_major: 0xfe,
                device_minor: 0,
                inode: 247_282,
                path: PathBuf::from("/usr/bin/head"),
                deleted: false,
            }
        );
        assert_eq!(entries[1].path, PathBuf::new());
        assert!(!entries[1].executable && !entries[1].is_file());
        assert_eq!(entries[2].path, PathBuf::from("[anon: my heap]"));
        assert_eq!(entries[3].path, PathBuf::from("[vsyscall]"));
    }

    /// Check that paths with spaces, newlines, bytes that are no UTF-8 and the
    /// mark of deletion come out as they are.
    #[test]
    fn hostile_paths() {
        let text = b"1000-2000 r-xp 00000000 fd:01 9   /a  b /x\\012y/\xff (deleted)\n";
        let entries = parse_maps(text).unwrap();
        let expected = OsString::from_vec(b"/a  b /x\ny/\xff".to_vec());
        assert_eq!(entries[0].path, PathBuf::from(expected));
        assert!(entries[0].deleted);
    }

    /// Check that a kernel record becomes the entry that maps would have, and
    /// that an impossible range is none.
    #[test]
    fn records() {
        let entry = |start, len, path| {
            let (offset, device) = (FileOffset(0x3000), (0xfd, 1));
            MapsEntry::from_record(AbsAddr(start), len, offset, device, 9, Path::new(path))
        };
        let text = b"1000-2000 r-xp 00003000 fd:01 9   /a b (deleted)";
        let expected = parse_maps(text).unwrap().remove(0);
        assert_eq!(entry(0x1000, 0x1000, "/a b (deleted)"), Some(expected));
        let anonymous = entry(0x1000, 0x1000, "//anon").unwrap();
        assert_eq!(anonymous.path, PathBuf::new());
        assert_eq!(entry(0x1000, 0, "/a"), None);
        assert_eq!(entry(u64::MAX, 2, "/a"), None);
    }

    /// Check that text that is no line is given back as an error, whatever it
    /// is, and never panics.
    #[test]
    fn malformed_lines() {
        for line in [
            "x",
            " ",
            "1000-2000",
            "1000-2000 r-xp 0 0 0 /a",
            "2000-1000 r-xp 00000000 00:00 0",
            "1000-2000 r-xp 00000000 00:00 inode",
            "11111111111111111-2 r-xp 00000000 00:00 0",
        ] {
            assert_eq!(parse_maps(line.as_bytes()), Err(line.to_owned()));
        }
        assert_eq!(parse_maps(b""), Ok(Vec::new()));
    }

    /// Check that this process's own table finds this very function, in a file
    /// that is open and has a build id.
    #[test]
    fn reads_own_mappings() {
        let files = FileStore::default();
        let table = read_mappings(std::process::id(), &files).unwrap();
        let here = AbsAddr(reads_own_mappings as fn() as usize as u64);
        let mapping = table.lookup(here).unwrap();
        let file = mapping.file.as_ref().unwrap();
        assert_eq!(file.path, std::env::current_exe().unwrap());
        assert!(file.file.is_some());
        assert!(table.iter().any(|mapping| mapping.name == "[vdso]"));
    }

    /// Check that a process that does not exist is an error that says so.
    #[test]
    fn missing_process() {
        let error = read_maps(u32::MAX).unwrap_err();
        assert!(matches!(error, ProcessError::NotFound { .. }), "{error}");
    }
}
