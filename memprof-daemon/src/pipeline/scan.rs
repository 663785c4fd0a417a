//! What must be read of a process before it can be traced. Blocks; runs in jobs.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    tables::{FileTable, TableStore},
    target::TargetError,
};
use crate::{
    golang::{self, FoundGo, GoFiles},
    prefilter::{
        error::DetachError, leftover, stack_rows::FileRows, tracer::with_tracer, turn::Turn,
    },
    probe::{
        attach::FileId,
        find::{AllocatorModule, Finder},
        pools::Pools,
    },
    process::{
        exit::ExitWatch,
        files::FileStore,
        info::{ProcessError, ProcessInfo, check_machine},
        mapping::{MappedFile, Mapping, MappingTable},
        maps::{MapsEntry, mapping_of, read_mappings},
    },
    ring::mmap_events::MmapEvent,
};

/// Opens and reads files for all targets, each once.
#[derive(Debug)]
pub(super) struct Scanner {
    files: FileStore,
    finder: Finder,
    go_files: GoFiles,
    tables: Arc<TableStore>,
    /// Files that were met a moment ago: programs that start one after the other map the same.
    recent: Mutex<HashMap<FileId, Recent>>,
}

/// Whether the unwind tables of a process's files are made when it is read: the largest take
/// a second, and others may be waiting to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tables {
    Made,
    Later,
}

/// Who has asked for a process to be taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Somebody, who hears why it cannot be.
    Request,
    /// A rule, or that all are: a Go program that cannot be read is taken on too, so that the
    /// list says why.
    Rule,
}

/// Which of the functions of pools a process must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PoolsWanted {
    /// Each: somebody has asked for this process and these functions.
    All,
    /// Those that it has.
    Any,
}

/// How long a child's parent's stubs may take to be unmapped, if it can be probed else: words
/// that have been left on its stack do not go by themselves.
const CLEAR_CHILD: Duration = Duration::from_millis(200);

/// A file that is held, and its table.
#[derive(Debug)]
struct Recent {
    met: Instant,
    _file: Arc<MappedFile>,
    _table: FileTable,
}

/// A process as it was read.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) info: ProcessInfo,
    pub(super) mappings: MappingTable,
    /// When they were read, or a little earlier.
    pub(super) read_ns: u64,
    pub(super) modules: Vec<AllocatorModule>,
    /// The Go program that it is, if it is one.
    pub(super) go: Option<FoundGo>,
    pub(super) exit: ExitWatch,
    /// The unwind tables of its files, by (device, inode).
    pub(super) tables: Vec<((u64, u64), FileTable)>,
    /// Why what its parent's stubs are in is still mapped, if it is. No function leads there.
    pub(super) stays_mapped: Option<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The clock of samples and of records about mappings.
pub(super) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Takes out what an earlier memprof has left, if that may be done: beside it nothing can be
/// attached.
fn clear_leftover(pid: u32, clear: Option<Duration>) -> Result<(), TargetError> {
    let left = |error| TargetError::Leftover { pid, error };
    let Some(leftover) = leftover::find(pid).map_err(left)? else {
        return Ok(());
    };
    if leftover.in_use {
        return Err(TargetError::InUse(pid));
    }
    let Some(time_limit) = clear else {
        return Err(TargetError::HasLeftover(pid));
    };
    let _turn = Turn::wait(pid);
    let process = ExitWatch::open(pid)?;
    let deadline = Instant::now() + time_limit;
    with_tracer(|tracer| leftover::remove(tracer, &process, &leftover, deadline))
        .unwrap_or_else(|source| {
            Err(DetachError::Io {
                what: "make a thread",
                source,
            })
        })
        .map_err(left)?;
    tracing::info!(pid, "the prefilter of an earlier memprof was taken out");
    Ok(())
}

impl Scanner {
    pub(super) fn new(tables: Arc<TableStore>, pools: &Pools) -> Self {
        Self {
            files: FileStore::default(),
            finder: Finder::new(pools),
            go_files: GoFiles::default(),
            tables,
            recent: Mutex::default(),
        }
    }

    /// The unwind table of a file, which is held for a while.
    pub(super) fn table_of(&self, file: &Arc<MappedFile>) -> FileTable {
        let table = self.tables.of(file);
        if file.file.is_some() {
            let recent = Recent {
                met: Instant::now(),
                _file: Arc::clone(file),
                _table: table.clone(),
            };
            lock(&self.recent).insert((file.device, file.inode), recent);
        }
        table
    }

    /// The unwind table of what has been put into a process.
    pub(super) fn table_of_stubs(&self, file: &FileRows) -> FileTable {
        self.tables.of_stubs(file)
    }

    /// Lets go of files that were not met for so long.
    pub(super) fn forget_files(&self, unused: Duration) {
        let forgotten: Vec<_> = lock(&self.recent)
            .extract_if(|_, recent| recent.met.elapsed() >= unused)
            .collect();
        // Not under the lock.
        drop(forgotten);
    }

    /// Reads a process that is to be traced.
    ///
    /// # Errors
    ///
    /// [`TargetError`]: it is gone, cannot be traced, or has neither an allocator nor a Go
    /// heap, or not each function that `wanted` asks for; or there is a
    /// prefilter in it that must not be taken out, or cannot be within `clear`.
    pub(super) fn scan(
        &self,
        pid: u32,
        clear: Option<Duration>,
        wish: Wish,
        wanted: PoolsWanted,
    ) -> Result<Scan, TargetError> {
        clear_leftover(pid, clear)?;
        let scan = self.read(pid, Tables::Made, |mappings, go| {
            if wanted == PoolsWanted::All {
                self.finder.require_pools(pid, mappings)?;
            }
            let error = match self.finder.find_all(pid, mappings) {
                Ok(modules) => return Ok(modules),
                Err(error) => error,
            };
            match go.take() {
                Some(FoundGo {
                    profile: Err(error),
                    ..
                }) if wish == Wish::Request => Err(TargetError::Go { pid, error }),
                Some(found) => {
                    *go = Some(found);
                    Ok(Vec::new())
                }
                None => Err(error.into()),
            }
        })?;
        // Alive after all was read: so all of it is this process's. Unable to
        // tell is as good as alive; attaching will tell.
        if !scan.exit.is_alive().unwrap_or(true) {
            return Err(TargetError::Exited(pid));
        }
        Ok(scan)
    }

    /// Reads a child of a traced process, which may have no allocator yet. If it may be probed,
    /// its parent's stubs may stay mapped.
    ///
    /// # Errors
    ///
    /// As for [`Self::scan`].
    pub(super) fn scan_child(
        &self,
        pid: u32,
        clear: Option<Duration>,
        may_probe: bool,
    ) -> Result<Scan, TargetError> {
        let clear = clear.map(|limit| match may_probe {
            true => limit.min(CLEAR_CHILD),
            false => limit,
        });
        let stays_mapped = match clear_leftover(pid, clear) {
            // Its functions are as they were: probes do no harm.
            Err(TargetError::Leftover {
                error: error @ DetachError::Busy,
                ..
            }) if may_probe => Some(format!("its parent's prefilter: {error}")),
            cleared => {
                cleared?;
                None
            }
        };
        let scan = self.rescan(pid, Tables::Later)?;
        let scan = Scan {
            stays_mapped,
            ..scan
        };
        if !scan.exit.is_alive().unwrap_or(true) {
            return Err(TargetError::Exited(pid));
        }
        Ok(scan)
    }

    /// Reads a process that is traced; it may have no allocator (yet), and may
    /// have ended: the caller compares the start time.
    ///
    /// # Errors
    ///
    /// As for [`Self::scan`].
    pub(super) fn rescan(&self, pid: u32, tables: Tables) -> Result<Scan, TargetError> {
        self.read(pid, tables, |mappings, _| {
            Ok(mappings
                .files()
                .iter()
                .flat_map(|file| self.allocators_in(file))
                .collect())
        })
    }

    fn read(
        &self,
        pid: u32,
        tables: Tables,
        find: impl FnOnce(
            &MappingTable,
            &mut Option<FoundGo>,
        ) -> Result<Vec<AllocatorModule>, TargetError>,
    ) -> Result<Scan, TargetError> {
        // The watch first: from then on the pid cannot become another's
        // without the watch noticing.
        let exit = ExitWatch::open(pid)?;
        let info = ProcessInfo::read(pid)?;
        check_machine(pid)?;
        let read_ns = monotonic_ns();
        let mappings = read_mappings(pid, &self.files)?;
        let mut go = golang::find(pid, &mappings, &self.go_files);
        let modules = find(&mappings, &mut go)?;
        let tables = match tables {
            // No stack of it is walked.
            _ if go.is_some() && modules.is_empty() => Vec::new(),
            Tables::Made => mappings
                .files()
                .iter()
                .map(|file| ((file.device, file.inode), self.table_of(file)))
                .collect(),
            Tables::Later => Vec::new(),
        };
        Ok(Scan {
            info,
            mappings,
            read_ns,
            modules,
            go,
            exit,
            tables,
            stays_mapped: None,
        })
    }

    /// What a process maps now.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub(super) fn mappings(&self, pid: u32) -> Result<MappingTable, ProcessError> {
        read_mappings(pid, &self.files)
    }

    /// Who a process is now; none if it is gone.
    pub(super) fn info(pid: u32) -> Option<ProcessInfo> {
        ProcessInfo::read(pid).ok()
    }

    /// The mapping that a record tells of; none if its range makes no sense.
    pub(super) fn mapping_of(&self, event: &MmapEvent) -> Option<Mapping> {
        let entry = MapsEntry::from_record(
            event.start,
            event.len,
            event.file_offset,
            (event.device_major, event.device_minor),
            event.inode,
            &event.path,
        )?;
        Some(mapping_of(event.pid, &entry, &self.files))
    }

    /// The file of a mapping of a process.
    pub(super) fn open(&self, pid: u32, entry: &MapsEntry) -> Arc<MappedFile> {
        self.files.open(pid, entry)
    }

    /// Whether a file is a Go program, or a library that Go has built.
    pub(super) fn is_go(&self, file: &MappedFile) -> bool {
        self.go_files.is_go(file)
    }

    /// The allocator that a file defines, if it does.
    pub(super) fn allocators_in(&self, file: &Arc<MappedFile>) -> Vec<AllocatorModule> {
        self.finder.find(file).into_iter().collect()
    }
}
