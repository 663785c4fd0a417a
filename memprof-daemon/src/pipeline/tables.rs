//! Unwind tables that BPF has, each once however many processes map its file.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use memprof_common::unwind::{
    rule::Rule,
    table::{MappingEntry, MappingKind, SLAB_WORDS},
};
use tracing::{debug, warn};

use crate::{
    address::VirtOffset,
    prefilter::stack_rows::FileRows,
    probe::arena::{Arena, ArenaError, SLAB_BYTES, Slab, SlabMaker, Words},
    process::{
        content::Content,
        elf::{ElfLayout, Segment},
        mapping::{MappedFile, Mapping},
        maps::read_maps,
    },
    unwind::{self, Table},
};

/// What is known of how a file's code is unwound.
#[derive(Clone, Debug)]
pub(super) enum FileTable {
    /// BPF has its table.
    Loaded(Arc<LoadedTable>),
    /// It has no unwind information that could be used, or there is no room.
    Missing,
}

/// A table in the arena. Dropping it takes it out.
#[derive(Debug)]
pub(super) struct LoadedTable {
    arena: Arc<Mutex<Arena>>,
    words: Words,
    wide: u32,
    pages: u32,
    page_count: u32,
    origin: VirtOffset,
    segments: Vec<Segment>,
}

impl Drop for LoadedTable {
    fn drop(&mut self) {
        lock(&self.arena).give_back(self.words);
    }
}

/// One content: locked while it is compiled, so that it is compiled once.
type Entry = Arc<Mutex<Known>>;

#[derive(Debug, Default)]
enum Known {
    #[default]
    Nothing,
    Loaded(Weak<LoadedTable>),
    /// There was no room for so many words.
    NoRoom(usize),
    Missing,
}

/// Compiles tables and hands them to BPF.
#[derive(Debug)]
pub(super) struct TableStore {
    arena: Arc<Mutex<Arena>>,
    /// Locked before the arena, and while that grows.
    maker: Mutex<SlabMaker>,
    known: Mutex<HashMap<Content, Entry>>,
    vdso: Mutex<Option<FileTable>>,
    /// What the arena may take.
    max_bytes: AtomicU64,
    /// What compiling a table may take.
    max_compile_bytes: AtomicU64,
    /// One large file is compiled at a time, where memory is bounded.
    large: Mutex<()>,
    /// Tables and lists that there was no room for below that.
    refused: AtomicU64,
}

/// Words to be free in one piece: more than two of the largest lists.
const SPARE_WORDS: u32 = SLAB_WORDS / 2;

/// A file of which compiling takes so little can be compiled at any time.
const SMALL_COMPILE_BYTES: u64 = 2 << 20;

/// Entries that are kept at least before those without a table are forgotten.
const KEEP: usize = 1024;

impl TableStore {
    pub(super) fn new((arena, maker): (Arena, SlabMaker)) -> Self {
        Self {
            arena: Arc::new(Mutex::new(arena)),
            maker: Mutex::new(maker),
            known: Mutex::new(HashMap::new()),
            vdso: Mutex::new(None),
            max_bytes: AtomicU64::new(u64::MAX),
            max_compile_bytes: AtomicU64::new(u64::MAX),
            large: Mutex::new(()),
            refused: AtomicU64::new(0),
        }
    }

    /// Lets tables take so many bytes from now on, and compiling one so many; those that there
    /// are stay.
    pub(super) fn limit(&self, max_bytes: Option<u64>, max_compile_bytes: Option<u64>) {
        let store = |place: &AtomicU64, bytes: Option<u64>| {
            place.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
        };
        store(&self.max_bytes, max_bytes);
        store(&self.max_compile_bytes, max_compile_bytes);
    }

    /// Waits until a file may be compiled; an error if that takes more memory than there is.
    fn turn_to_compile(&self, file: &File) -> Result<Option<MutexGuard<'_, ()>>, ArenaError> {
        let max_bytes = self.max_compile_bytes.load(Ordering::Relaxed);
        if max_bytes == u64::MAX {
            return Ok(None);
        }
        // Why it cannot be compiled, compiling it will tell.
        let bytes = unwind::compile_bytes(file).unwrap_or(0);
        if bytes > max_bytes.max(SMALL_COMPILE_BYTES) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(ArenaError::OverLimit);
        }
        Ok((bytes > SMALL_COMPILE_BYTES).then(|| lock(&self.large)))
    }

    /// Whether there is room for a table, or could be.
    fn may_have_room(&self, words: usize) -> bool {
        let mut arena = lock(&self.arena);
        let bytes = arena.bytes() + words as u64 * 8;
        let wanted = u32::try_from(words)
            .unwrap_or(u32::MAX)
            .saturating_add(SPARE_WORDS);
        bytes <= self.max_bytes.load(Ordering::Relaxed) || arena.has_room(wanted)
    }

    /// How many tables and lists found no room below the limit.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The table of a file, compiled and loaded if nobody has it. Takes up to a second
    /// for the largest.
    pub(super) fn of(&self, file: &MappedFile) -> FileTable {
        let Some(open) = &file.file else {
            return FileTable::Missing;
        };
        let Ok(content) = Content::of(open, file.build_id.as_deref()) else {
            return FileTable::Missing;
        };
        let entry = self.entry(content);
        let mut known = lock(&entry);
        match &*known {
            Known::Missing => return FileTable::Missing,
            Known::Loaded(table) => {
                if let Some(table) = table.upgrade() {
                    return FileTable::Loaded(table);
                }
            }
            Known::NoRoom(words) if !self.may_have_room(*words) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return FileTable::Missing;
            }
            Known::Nothing | Known::NoRoom(_) => {}
        }
        let path = file.path.display();
        let turn = match self.turn_to_compile(open) {
            Ok(turn) => turn,
            Err(error) => {
                debug!(%path, %error, "stacks through this file will be cut");
                return FileTable::Missing;
            }
        };
        let compiled = unwind::compile(open).and_then(|table| {
            let layout = ElfLayout::read(open)?;
            Ok((table, layout.segments))
        });
        let (table, segments) = match compiled {
            Ok(compiled) => compiled,
            Err(error) => {
                debug!(%path, %error, "no unwind table");
                *known = Known::Missing;
                return FileTable::Missing;
            }
        };
        let loaded = self.load(&table, segments);
        drop(turn);
        match loaded {
            Ok(table) => {
                *known = Known::Loaded(Arc::downgrade(&table));
                FileTable::Loaded(table)
            }
            // There may be room later.
            Err(error @ ArenaError::OverLimit) => {
                debug!(%path, %error, "stacks through this file will be cut");
                *known = Known::NoRoom(table.words());
                FileTable::Missing
            }
            Err(error) => {
                warn!(%path, %error, "stacks through this file will be cut");
                FileTable::Missing
            }
        }
    }

    /// The table of stubs of the prefilter.
    pub(super) fn of_stubs(&self, file: &FileRows) -> FileTable {
        // Addresses are places in the file.
        let origin = file.code.first().map_or(0, |code| code.offset.0);
        let rules: Vec<(u32, Rule)> = file
            .code
            .iter()
            .flat_map(|code| {
                let begin = code.offset.0.saturating_sub(origin) as u32;
                code.rows
                    .iter()
                    .map(move |&(offset, rule)| (begin.saturating_add(offset), rule))
            })
            .collect();
        let segments = file.code.iter().map(|code| Segment {
            file_offset: code.offset,
            address: VirtOffset(code.offset.0),
            file_size: code.bytes,
            executable: true,
        });
        let loaded = unwind::of_rules(VirtOffset(origin), &rules)
            .map_err(|error| error.to_string())
            .and_then(|table| {
                self.load(&table, segments.collect())
                    .map_err(|error| error.to_string())
            });
        match loaded {
            Ok(table) => FileTable::Loaded(table),
            Err(error) => {
                warn!(error, "stacks of handlers that interrupt stubs will be cut");
                FileTable::Missing
            }
        }
    }

    /// The table of the code that the kernel maps into every process.
    pub(super) fn vdso(&self) -> FileTable {
        let mut vdso = lock(&self.vdso);
        if let Some(table) = &*vdso {
            return table.clone();
        }
        let table = match self.load_vdso() {
            Ok(table) => FileTable::Loaded(table),
            Err(error) => {
                debug!(error, "no unwind table of the vDSO");
                FileTable::Missing
            }
        };
        vdso.insert(table).clone()
    }

    /// Every process has the same, memprof too.
    fn load_vdso(&self) -> Result<Arc<LoadedTable>, String> {
        let words = |error: &dyn std::fmt::Display| error.to_string();
        let maps = read_maps(std::process::id()).map_err(|error| words(&error))?;
        let vdso = maps
            .iter()
            .find(|entry| entry.path.as_os_str() == "[vdso]")
            .ok_or("this kernel maps none")?;
        let length = vdso.end.0.saturating_sub(vdso.start.0).min(1 << 20);
        let mut image = vec![0; usize::try_from(length).unwrap_or(0)];
        File::open("/proc/self/mem")
            .and_then(|memory| memory.read_exact_at(&mut image, vdso.start.0))
            .map_err(|error| words(&error))?;
        let table = unwind::compile_image(&image).map_err(|error| words(&error))?;
        // Its only segment begins at its first byte (arch/x86/entry/vdso/vdso-layout.lds.S).
        let segment = Segment {
            file_offset: crate::address::FileOffset(0),
            address: VirtOffset(0),
            file_size: length,
            executable: true,
        };
        self.load(&table, vec![segment])
            .map_err(|error| words(&error))
    }

    fn entry(&self, content: Content) -> Entry {
        let mut known = lock(&self.known);
        if known.len() >= KEEP && known.len() == known.capacity() {
            known.retain(|_, entry| {
                Arc::strong_count(entry) > 1
                    || matches!(&*lock(entry), Known::Loaded(table) if table.strong_count() > 0)
            });
        }
        Arc::clone(known.entry(content).or_default())
    }

    fn load(&self, table: &Table, segments: Vec<Segment>) -> Result<Arc<LoadedTable>, ArenaError> {
        let all = [&table.rows[..], &table.wide[..], &table.pages[..]].concat();
        // The next list of mappings is not to wait for room.
        let words = self.store(&all, SPARE_WORDS)?;
        // They fit, or `store` would have failed.
        let wide = words.first + table.rows.len() as u32;
        let pages = wide + table.wide.len() as u32;
        Ok(Arc::new(LoadedTable {
            arena: Arc::clone(&self.arena),
            words,
            wide,
            pages,
            page_count: table.pages.len() as u32,
            origin: table.origin,
            segments,
        }))
    }

    /// Stores words such that `spare` more could be after them.
    fn store(&self, words: &[u64], spare: u32) -> Result<Words, ArenaError> {
        let wanted = u32::try_from(words.len())
            .ok()
            .and_then(|count| count.checked_add(spare))
            .ok_or(ArenaError::Full)?;
        let store = || {
            let mut arena = lock(&self.arena);
            if arena.has_room(wanted) {
                arena.store(words)
            } else {
                Ok(None)
            }
        };
        if let Some(stored) = store()? {
            return Ok(stored);
        }
        let mut maker = lock(&self.maker);
        loop {
            // Others may have made it grow.
            if let Some(stored) = store()? {
                return Ok(stored);
            }
            let slab = self.make_slab(&mut maker).inspect_err(|error| {
                if matches!(error, ArenaError::OverLimit) {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
            })?;
            lock(&self.arena).add(slab);
        }
    }

    fn make_slab(&self, maker: &mut SlabMaker) -> Result<Slab, ArenaError> {
        let bytes = self.bytes() + SLAB_BYTES;
        if bytes > self.max_bytes.load(Ordering::Relaxed) {
            return Err(ArenaError::OverLimit);
        }
        maker.make()
    }

    /// Whether the next lists of mappings may have to wait for room.
    pub(super) fn is_low(&self) -> bool {
        !lock(&self.arena).has_room(SPARE_WORDS)
    }

    /// Makes room ahead of need. Blocks.
    pub(super) fn make_room(&self) {
        // Somebody who makes some comes by here.
        let Ok(mut maker) = self.maker.try_lock() else {
            return;
        };
        while self.is_low() {
            match self.make_slab(&mut maker) {
                Ok(slab) => lock(&self.arena).add(slab),
                Err(error) => {
                    // Who needs it is told.
                    debug!(%error, "no room for unwind tables ahead of need");
                    return;
                }
            }
        }
    }

    /// Hands a list of mappings to BPF. Waits if there [is little room](Self::is_low).
    pub(super) fn store_list(&self, entries: &[MappingEntry]) -> Result<LoadedList, ArenaError> {
        let words: Vec<u64> = entries.iter().flat_map(|entry| entry.to_words()).collect();
        let words = self.store(&words, 0)?;
        Ok(LoadedList {
            arena: Arc::clone(&self.arena),
            words,
        })
    }

    /// Bytes of kernel memory that tables and lists take.
    pub(super) fn bytes(&self) -> u64 {
        lock(&self.arena).bytes()
    }
}

/// A list of mappings in the arena. Dropping it takes it out.
#[derive(Debug)]
pub(super) struct LoadedList {
    arena: Arc<Mutex<Arena>>,
    words: Words,
}

impl LoadedList {
    /// Where it begins.
    pub(super) const fn first(&self) -> u32 {
        self.words.first
    }
}

impl Drop for LoadedList {
    fn drop(&mut self) {
        lock(&self.arena).give_back(self.words);
    }
}

/// What BPF is told of a mapping.
pub(super) fn mapping_entry(mapping: &Mapping, table: Option<&FileTable>) -> MappingEntry {
    let mut entry = MappingEntry {
        start: mapping.start.0,
        end: mapping.end.0,
        bias: 0,
        rows: 0,
        wide: 0,
        pages: 0,
        page_count: 0,
        kind: MappingKind::FramePointers as u32,
    };
    match (table, mapping.name.as_str()) {
        (_, "[uprobes]") => entry.kind = MappingKind::ReturnProbe as u32,
        (Some(FileTable::Loaded(table)), _) => {
            if let Some(address) = virtual_address(&table.segments, mapping.file_offset.0) {
                entry.kind = MappingKind::Table as u32;
                entry.bias = mapping
                    .start
                    .0
                    .wrapping_sub(address)
                    .wrapping_add(table.origin.0);
                entry.rows = table.words.first;
                entry.wide = table.wide;
                entry.pages = table.pages;
                entry.page_count = table.page_count;
            }
        }
        (None, _) if mapping.file.is_some() => entry.kind = MappingKind::Pending as u32,
        _ => {}
    }
    entry
}

/// Where the file wants the byte at `file_offset` to be. Mappings begin at a page's
/// start, which can be before that of the segment.
fn virtual_address(segments: &[Segment], file_offset: u64) -> Option<u64> {
    const PAGE: u64 = 4096;
    segments
        .iter()
        .filter(|segment| segment.executable)
        .find(|segment| {
            let first = segment.file_offset.0;
            first & !(PAGE - 1) <= file_offset
                && file_offset < first.saturating_add(segment.file_size)
        })
        .map(|segment| {
            segment
                .address
                .0
                .wrapping_sub(segment.file_offset.0)
                .wrapping_add(file_offset)
        })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
