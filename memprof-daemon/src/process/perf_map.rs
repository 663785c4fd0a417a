//! Names of code that a program makes at run time: `/tmp/perf-PID.map`, which just-in-time
//! compilers write for perf (`tools/perf/Documentation/jit-interface.txt` in Linux).

mod index;

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::PathBuf,
    sync::{Arc, Mutex, Once, PoisonError},
    time::{Duration, SystemTime},
};

use self::index::Index;
use super::{
    files::open_below,
    mapping::{Mapping, MappingLookup, MappingTable},
    origin,
};
use crate::address::AbsAddr;

/// No more of a file is read at a time. Each compiled function adds a line and none is
/// ever taken out, so the newest are at the end.
const MAX_BYTES: u64 = 64 << 20;
/// What is read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// A longer line is left out.
const MAX_LINE_BYTES: usize = 16 << 10;
/// A file is known again by that much of its beginning and before where reading ended.
const SAMPLE_BYTES: usize = 64;

/// Opens the file that process `pid`, which was started then, writes, as it sees `/tmp`. It
/// stays readable when the process is gone.
///
/// # Errors
///
/// There is none (yet); or the process or root does not own it, as another user could
/// have put it there; or it is older than the process.
pub fn open(pid: u32, started: SystemTime) -> io::Result<PerfMap> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    // In the innermost pid namespace, the last number, it knows itself by.
    let own_pid = origin::own_pid(&status)
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
    Ok(PerfMap::new(file))
}

/// Such a file, of which what was read is remembered: it can have a hundred thousand lines,
/// and mostly has a few more than last time.
#[derive(Debug)]
pub struct PerfMap {
    file: File,
    read: Mutex<Read>,
}

/// What was read of a file.
#[derive(Debug, Default)]
struct Read {
    index: Index,
    /// All lines before were read.
    end: u64,
    /// The line there is too long, and is left out.
    is_skipping: bool,
    /// The first bytes of the file.
    head: Vec<u8>,
    /// The last before `end`.
    tail: Vec<u8>,
    /// Size and time of change when it was read.
    stamp: Option<(u64, i64, i64)>,
}

impl PerfMap {
    fn new(file: File) -> Self {
        Self {
            file,
            read: Mutex::default(),
        }
    }

    /// Reads what was written since the last time.
    ///
    /// # Errors
    ///
    /// It cannot be read; what was read before is still known.
    pub fn refresh(&self) -> io::Result<()> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.refresh(&self.file)
    }

    /// The newest name of the code at an address, as of the last refresh.
    #[must_use]
    pub fn name(&self, address: AbsAddr) -> Option<String> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.index.name(address.0).map(str::to_owned)
    }
}

impl Read {
    fn refresh(&mut self, file: &File) -> io::Result<()> {
        let metadata = file.metadata()?;
        if self.stamp == Some(stamp(&metadata)) {
            return Ok(());
        }
        let length = metadata.len();
        if !self.is_continued(file, length) {
            *self = Self::default();
        }
        if length.saturating_sub(self.end) > MAX_BYTES {
            self.end = length - MAX_BYTES;
            // Somewhere in a line.
            self.is_skipping = true;
        }
        self.read_lines(file, length)?;
        self.head = sample(file, 0, length.min(SAMPLE_BYTES as u64))?;
        let from = self.end.saturating_sub(SAMPLE_BYTES as u64);
        self.tail = sample(file, from, self.end - from)?;
        self.stamp = Some(stamp(&metadata));
        Ok(())
    }

    /// Whether the file is as it was up to `end`. A virtual machine writes it anew each
    /// time it is asked for it.
    fn is_continued(&self, file: &File, length: u64) -> bool {
        let same = |place: u64, known: &[u8]| {
            sample(file, place, known.len() as u64).is_ok_and(|now| now == known)
        };
        length >= self.end
            && same(0, &self.head)
            && same(self.end.saturating_sub(self.tail.len() as u64), &self.tail)
    }

    /// Reads whole lines up to `length`: the last may be half written.
    fn read_lines(&mut self, file: &File, length: u64) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.end < length {
            let wanted = usize::try_from(length - self.end).unwrap_or(usize::MAX);
            let wanted = chunk.get_mut(..wanted.min(CHUNK_BYTES)).unwrap_or_default();
            // By place: the descriptor is shared.
            let count = file.read_at(wanted, self.end)?;
            let bytes = wanted.get(..count).unwrap_or_default();
            if bytes.is_empty() {
                // It was cut short meanwhile.
                return Ok(());
            }
            let Some(last) = bytes.iter().rposition(|&byte| byte == b'\n') else {
                if count < MAX_LINE_BYTES && !self.is_skipping {
                    return Ok(());
                }
                self.is_skipping = true;
                self.end += count as u64;
                continue;
            };
            let mut lines = bytes
                .get(..last)
                .unwrap_or_default()
                .split(|&byte| byte == b'\n');
            if std::mem::take(&mut self.is_skipping) {
                lines.next();
            }
            for line in lines.filter(|line| line.len() <= MAX_LINE_BYTES) {
                self.index.add(line);
            }
            self.end += last as u64 + 1;
        }
        Ok(())
    }
}

fn stamp(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.ctime(), metadata.ctime_nsec())
}

fn sample(file: &File, place: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0).min(SAMPLE_BYTES)];
    file.read_exact_at(&mut bytes, place)?;
    Ok(bytes)
}

/// Mappings with the names of code made at run time, which are brought up to date when the
/// first is asked for.
#[derive(Debug)]
pub struct NamedMappings {
    mappings: MappingTable,
    map: Option<Arc<PerfMap>>,
    refreshed: Once,
}

impl NamedMappings {
    /// `map` is as [`open`] gave it.
    #[must_use]
    pub fn new(mappings: MappingTable, map: Option<Arc<PerfMap>>) -> Self {
        Self {
            mappings,
            map,
            refreshed: Once::new(),
        }
    }
}

impl MappingLookup for NamedMappings {
    fn lookup(&self, address: AbsAddr) -> Option<Arc<Mapping>> {
        self.mappings.lookup(address)
    }

    fn generated_name(&self, address: AbsAddr) -> Option<String> {
        let map = self.map.as_ref()?;
        self.refreshed.call_once(|| {
            if let Err(error) = map.refresh() {
                tracing::debug!(%error, "cannot read a perf map");
            }
        });
        map.name(address)
    }
}

#[cfg(test)]
mod tests;
