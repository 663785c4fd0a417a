//! What BPF is told of a process's code, to walk its stacks.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use memprof_common::unwind::table::{MAX_MAPPINGS, MappingEntry, MappingKind, MappingList};
use tracing::warn;

use super::{Command, Tracer};
use crate::{
    pipeline::{
        scan::monotonic_ns,
        tables::{FileTable, mapping_entry},
        target::Target,
    },
    sample::ImageId,
};

/// Above are the kernel's addresses, with paging of four levels or of five.
const USER_SPACE_END: u64 = 1 << 56;

/// How long a table that is ready waits for those of other files of its process.
const PUBLISH_EVERY: Duration = Duration::from_millis(5);

impl Tracer {
    /// Tells BPF which code the present program of a process is made of. To be called
    /// whenever its mappings or their tables have changed.
    pub(super) fn publish_mappings(&mut self, pid: u32) {
        let begun = Instant::now();
        self.unpublished.remove(&pid);
        let vdso = self.tables.vdso();
        let Some(target) = self.targets.get_mut(&pid).filter(|target| target.is_live()) else {
            return;
        };
        let Some(image) = target.images.last() else {
            return;
        };
        let epoch = image.id.epoch;
        let entries: Vec<MappingEntry> = image
            .code
            .now()
            .iter()
            // The search in BPF takes addresses of user space, and no stack leads to the
            // page that the kernel shows above.
            .filter(|mapping| mapping.start.0 < USER_SPACE_END)
            .map(|mapping| {
                let table = match &mapping.file {
                    Some(file) => target.tables.get(&(file.device, file.inode)),
                    None if mapping.name == "[vdso]" => Some(&vdso),
                    None => None,
                };
                mapping_entry(mapping, table)
            })
            .collect();
        let entries = join(entries);
        let entries = entries
            .get(entries.len().saturating_sub(MAX_MAPPINGS)..)
            .unwrap_or_default();
        let list = match self.tables.store_list(entries) {
            Ok(list) => list,
            Err(error) => {
                warn!(pid, %error, "stacks through new code will be cut");
                return;
            }
        };
        if self.tables.is_low() {
            let tables = Arc::clone(&self.tables);
            tokio::task::spawn_blocking(move || tables.make_room());
        }
        let told = MappingList::new(list.first(), entries.len() as u32);
        // The old list goes after BPF knows the new one.
        let old = target.list.replace((list, told, epoch));
        match self.tell_bpf(pid) {
            Ok(()) => {
                if let Some(image) = self.targets.get_mut(&pid).and_then(Target::current) {
                    image.code.told(monotonic_ns());
                }
            }
            Err(error) => warn!(pid, %error, "stacks through new code will be cut"),
        }
        drop(old);
        // Tables of what was unloaded, or belonged to the program before: BPF has forgotten
        // them.
        if let Some(target) = self.targets.get_mut(&pid)
            && let Some(image) = target.images.last()
        {
            let used: HashSet<(u64, u64)> = image
                .code
                .now()
                .iter()
                .filter_map(|mapping| mapping.file.as_ref())
                .map(|file| (file.device, file.inode))
                .collect();
            target.tables.retain(|file, _| used.contains(file));
            target.seen_files.retain(|file| used.contains(file));
            target
                .mapped_ns
                .retain(|file, _| used.contains(file) || target.compiling.contains(file));
            let now_ns = monotonic_ns();
            for (_, since_ns) in target
                .mapped_ns
                .extract_if(|file, _| target.tables.contains_key(file))
            {
                let delay = Duration::from_nanos(now_ns.saturating_sub(since_ns));
                let longest = &mut self.work.longest_table_delay;
                *longest = delay.max(*longest);
            }
        }
        self.work.lists += 1;
        self.work.list_time += begun.elapsed();
    }

    /// Compiles the tables of the files of a process that have none, elsewhere.
    pub(super) fn compile_missing(&mut self, pid: u32) {
        let Some(target) = self.targets.get_mut(&pid).filter(|target| target.is_live()) else {
            return;
        };
        let Some(image) = target.images.last() else {
            return;
        };
        // No stack of it is walked.
        if image.is_only_go() {
            return;
        }
        let files: Vec<_> = image
            .code
            .now()
            .files()
            .into_iter()
            .filter(|file| {
                let id = (file.device, file.inode);
                !target.tables.contains_key(&id) && target.compiling.insert(id)
            })
            .collect();
        for file in files {
            let scanner = self.scanner.clone();
            self.spawn_job(move || Command::Compiled {
                pid,
                file: (file.device, file.inode),
                table: scanner.table_of(&file),
            });
        }
    }

    /// A table is ready.
    pub(super) fn compiled(&mut self, pid: u32, file: (u64, u64), table: FileTable) {
        if let Some(target) = self.targets.get_mut(&pid).filter(|target| target.is_live()) {
            target.compiling.remove(&file);
            target.tables.insert(file, table);
            if target.compiling.is_empty() {
                self.publish_mappings(pid);
            } else {
                self.unpublished.insert(pid);
                self.publish_at
                    .get_or_insert(Instant::now() + PUBLISH_EVERY);
            }
        }
    }

    /// Tells BPF of tables that were ready some time ago.
    pub(super) fn publish_ready(&mut self) {
        self.publish_at = None;
        for pid in std::mem::take(&mut self.unpublished) {
            self.publish_mappings(pid);
        }
    }

    /// BPF came to code that it was not told of.
    pub(super) fn meet_unknown_code(&mut self, image: ImageId, address: u64) {
        self.meet_image(image, None);
        self.drain_mmap_events();
        let Some(target) = self.targets.get_mut(&image.pid) else {
            return;
        };
        let is_known = target
            .list
            .as_ref()
            .is_some_and(|(_, _, epoch)| *epoch == image.epoch)
            && target.images.last().is_some_and(|image| {
                image
                    .code
                    .now()
                    .iter()
                    .any(|mapping| mapping.start.0 < address && address <= mapping.end.0)
            });
        // The records about mappings tell of nearly all; not of what `mremap` moves,
        // and not of what was mapped while they were being lost.
        if !is_known && target.may_rescan() {
            target.jobs += 1;
            self.spawn_rescan(image);
        }
    }
}

/// Neighbours without tables are one to a walk; programs that make code at run time can
/// have thousands.
fn join(entries: Vec<MappingEntry>) -> Vec<MappingEntry> {
    let mut joined: Vec<MappingEntry> = Vec::with_capacity(entries.len());
    for entry in entries {
        if let Some(last) = joined.last_mut()
            && last.end == entry.start
            && last.kind == entry.kind
            && entry.kind == MappingKind::FramePointers as u32
        {
            last.end = entry.end;
        } else {
            joined.push(entry);
        }
    }
    joined
}
