use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::Path,
};

use super::*;

struct Written {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    map: PerfMap,
}

impl Written {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("perf-1.map");
        fs::write(&path, text).unwrap();
        let map = PerfMap::new(File::open(&path).unwrap());
        Self {
            _dir: dir,
            path,
            map,
        }
    }

    fn append(&self, text: &str) {
        append(&self.path, text.as_bytes());
    }

    fn name(&self, address: u64) -> Option<String> {
        self.map.refresh().unwrap();
        self.map.name(AbsAddr(address))
    }

    fn end(&self) -> u64 {
        self.map.read.lock().unwrap().end
    }
}

fn append(path: &Path, bytes: &[u8]) {
    let mut file = OpenOptions::new().append(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
}

/// Check that what is appended is known after a refresh, that a line counts once it is
/// whole, and that what was read is not read again.
#[test]
fn reads_what_was_appended() {
    let written = Written::new("1000 10 first\n2000 10 sec");
    assert_eq!(written.name(0x1000).as_deref(), Some("first"));
    assert_eq!(written.name(0x2000), None);
    assert_eq!(written.end(), 14);
    written.append("ond\n1008 4 third\n");
    assert_eq!(written.name(0x2000).as_deref(), Some("second"));
    assert_eq!(written.name(0x1008).as_deref(), Some("third"));
    assert_eq!(written.map.read.lock().unwrap().index.len(), 4);
    // In a file that is only longer, what was read before could be anything.
    let mut read = written.map.read.lock().unwrap();
    read.index = Index::default();
    drop(read);
    written.append("3000 1 fourth\n");
    assert_eq!(written.name(0x3000).as_deref(), Some("fourth"));
    assert_eq!(written.name(0x1000), None);
}

/// Check that a file that is written anew is read anew, whether it has become shorter or
/// longer, and that names of code that is gone are forgotten.
#[test]
fn reads_a_new_file() {
    let written = Written::new("1000 10 first\n2000 10 second\n");
    assert_eq!(written.name(0x1000).as_deref(), Some("first"));
    fs::write(&written.path, "3000 10 third\n").unwrap();
    assert_eq!(written.name(0x3000).as_deref(), Some("third"));
    assert_eq!(written.name(0x1000), None);
    fs::write(&written.path, "4000 10 fourth\n5000 10 fifth\n").unwrap();
    assert_eq!(written.name(0x5000).as_deref(), Some("fifth"));
    assert_eq!(written.name(0x3000), None);
    fs::write(&written.path, "").unwrap();
    assert_eq!(written.name(0x5000), None);
}

/// Check that of a file beyond the limit the end is read, that a line without end costs
/// no memory, and that what follows it counts.
#[test]
fn long_files_and_lines() {
    let written = Written::new("1000 10 first\n");
    let line = [&[b' '; 1023][..], b"\n"].concat();
    append(&written.path, &line.repeat((MAX_BYTES >> 10) as usize));
    written.append("2000 10 last\n");
    assert_eq!(written.name(0x2000).as_deref(), Some("last"));
    assert_eq!(written.name(0x1000), None);

    let written = Written::new("1000 10 first\n");
    append(&written.path, &vec![b'x'; CHUNK_BYTES + 7]);
    assert_eq!(written.name(0x1000).as_deref(), Some("first"));
    written.append(" 3000 10 of the long line\n2000 10 next\n");
    assert_eq!(written.name(0x2000).as_deref(), Some("next"));
    assert_eq!(written.name(0x3000), None);
}
