//! Names of code that a program makes at run time: `/tmp/perf-PID.map`, which just-in-time
//! compilers write for perf (`tools/perf/Documentation/jit-interface.txt` in Linux).

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use super::{
    files::open_below,
    mapping::{Mapping, MappingLookup, MappingTable},
};
use crate::address::AbsAddr;

/// More of a file is not read. Each compiled function adds a line and none is ever taken
/// out, so the newest are at the end.
const MAX_BYTES: u64 = 64 << 20;
/// A longer name is cut.
const MAX_NAME_BYTES: usize = 1024;

/// Opens the file that process `pid`, which was started then, writes, as it sees `/tmp`. It
/// stays readable when the process is gone.
///
/// # Errors
///
/// There is none (yet); or the process or root does not own it, as another user could
/// have put it there; or it is older than the process.
pub fn open(pid: u32, started: SystemTime) -> io::Result<File> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    // In the innermost pid namespace, the last number, it knows itself by.
    let own_pid = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last())
        .ok_or_else(|| io::Error::other("/proc/PID/status has no NSpid"))?;
    let owner = std::fs::metadata(format!("/proc/{pid}"))?.uid();
    let file = open_below(
        &PathBuf::from(format!("/proc/{pid}/root")),
        &PathBuf::from(format!("tmp/perf-{own_pid}.map")),
    )?;
    let metadata = file.metadata()?;
    if metadata.uid() != owner && metadata.uid() != 0 {
        return Err(io::Error::other("not a file of the process"));
    }
    // Start times are coarse.
    let is_left_over = metadata.modified()? + Duration::from_secs(2) < started;
    if is_left_over {
        return Err(io::Error::other(
            "an earlier process of that number wrote it",
        ));
    }
    Ok(file)
}

/// What such a file says.
#[derive(Debug, Default)]
pub struct PerfMap {
    /// First address, the one behind the last, and the name; in the order of the file.
    entries: Vec<(u64, u64, String)>,
}

impl PerfMap {
    /// Reads what is in the file now. What makes no sense is left out.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn read(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        let from = length.saturating_sub(MAX_BYTES);
        let mut bytes = Vec::new();
        // By place: the descriptor is shared.
        let mut reader = At { file, at: from }.take(MAX_BYTES);
        reader.read_to_end(&mut bytes)?;
        Ok(Self::parse(&bytes))
    }

    /// Reads lines `START SIZE NAME`, the numbers in hexadecimal.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let entries = bytes
            .split(|&byte| byte == b'\n')
            .filter_map(|line| {
                let mut fields = line.splitn(3, |&byte| byte == b' ');
                let mut number = || {
                    let text = std::str::from_utf8(fields.next()?).ok()?;
                    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
                };
                let (start, size) = (number()?, number()?);
                let name = fields.next()?.trim_ascii();
                let name = name.get(..MAX_NAME_BYTES).unwrap_or(name);
                (!name.is_empty()).then_some(())?;
                let name = String::from_utf8_lossy(name).into_owned();
                Some((start, start.checked_add(size)?, name))
            })
            .collect();
        Self { entries }
    }

    /// The newest name of the code at an address: places are used again.
    #[must_use]
    pub fn name(&self, address: AbsAddr) -> Option<&str> {
        self.entries
            .iter()
            .rev()
            .find(|(start, end, _)| (*start..*end).contains(&address.0))
            .map(|(_, _, name)| name.as_str())
    }
}

struct At<'a> {
    file: &'a File,
    at: u64,
}

impl io::Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at = self.at.saturating_add(read as u64);
        Ok(read)
    }
}

/// Mappings with the names of code made at run time, read when the first is asked for.
#[derive(Debug)]
pub struct NamedMappings {
    mappings: MappingTable,
    file: Option<Arc<File>>,
    map: OnceLock<PerfMap>,
}

impl NamedMappings {
    /// `file` is as [`open`] gave it.
    #[must_use]
    pub fn new(mappings: MappingTable, file: Option<Arc<File>>) -> Self {
        Self {
            mappings,
            file,
            map: OnceLock::new(),
        }
    }
}

impl MappingLookup for NamedMappings {
    fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>> {
        self.mappings.lookup(address)
    }

    fn generated_name(&self, address: AbsAddr) -> Option<String> {
        let file = self.file.as_ref()?;
        let map = self.map.get_or_init(|| {
            PerfMap::read(file).unwrap_or_else(|error| {
                tracing::debug!(%error, "cannot read a perf map");
                PerfMap::default()
            })
        });
        map.name(address).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check names at their edges, that the newest wins, and that what makes no sense is
    /// left out: no numbers, no name, addresses that wrap around, a last line half
    /// written.
    #[test]
    fn names() {
        let map = PerfMap::parse(
            b"7f0000001000 10 LazyCompile:~first /app.js:1:2\n\
              0x7f0000001010 0x8 second\n\
              nonsense\n\
              7f0000001008 4 newer\n\
              ffffffffffffffff 10 wraps\n\
              7f0000002000 10 \n\
              7f0000003000 1",
        );
        let name = |address| map.name(AbsAddr(address));
        assert_eq!(name(0x7f00_0000_0fff), None);
        assert_eq!(
            name(0x7f00_0000_1000),
            Some("LazyCompile:~first /app.js:1:2")
        );
        assert_eq!(name(0x7f00_0000_1008), Some("newer"));
        assert_eq!(
            name(0x7f00_0000_100f),
            Some("LazyCompile:~first /app.js:1:2")
        );
        assert_eq!(name(0x7f00_0000_1017), Some("second"));
        assert_eq!(name(0x7f00_0000_1018), None);
        assert_eq!(map.entries.len(), 3);
    }
}
