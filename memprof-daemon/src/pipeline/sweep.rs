//! Looking through all processes for files with allocators, and for Go programs. Blocks; runs
//! in jobs.
//!
//! The kernel tells of each file that is mapped from the start of the tracer on; what was
//! mapped before, and what was not told for lack of room, is found here.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::PathBuf,
    sync::Arc,
};

use super::scan::{Scanner, monotonic_ns};
use crate::{
    prefilter::leftover,
    probe::find::AllocatorModule,
    process::{
        info::ProcessInfo,
        mapping::MappedFile,
        maps::{MapsEntry, read_maps},
    },
    ring::mmap_events::MmapEvent,
};

/// A file as the kernel names it in mappings: device and inode. The device can be another
/// than the file itself tells (overlayfs, btrfs).
type KernelFile = (u32, u32, u64);

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Swept {
    /// Files with allocators that some process maps.
    pub(super) modules: Vec<AllocatorModule>,
    /// Processes that map a file which Go has built.
    pub(super) go: Vec<ProcessInfo>,
    /// The inodes of all files that are mapped executable, on whatever device.
    pub(super) mapped_inodes: HashSet<u64>,
    /// The processes that there are.
    pub(super) pids: HashSet<u32>,
    /// When the look began.
    pub(super) begun_ns: u64,
    /// Who they are, if that was asked for.
    pub(super) infos: Vec<ProcessInfo>,
    /// One that has the prefilter in it, and whether that is in use.
    pub(super) hooked: Option<(u32, bool)>,
}

/// A file as the kernel's records name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileName {
    device: (u32, u32),
    inode: u64,
    path: PathBuf,
}

impl FileName {
    pub(super) fn of(event: &MmapEvent) -> Self {
        Self {
            device: (event.device_major, event.device_minor),
            inode: event.inode,
            path: event.path.clone(),
        }
    }
}

/// What files are that were mapped.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// The allocators among them.
    pub(super) modules: Vec<AllocatorModule>,
    /// All of them, and whether Go has built them, if they could be opened.
    pub(super) files: Vec<(FileName, Option<bool>)>,
}

impl Scanner {
    /// Looks through all processes; also at who they are, if that matters.
    pub(super) fn sweep(&self, reads_infos: bool) -> Swept {
        let mut swept = Swept {
            begun_ns: monotonic_ns(),
            ..Swept::default()
        };
        // And whether it is Go's.
        let mut seen: HashMap<KernelFile, bool> = HashMap::new();
        for pid in all_pids() {
            swept.pids.insert(pid);
            if reads_infos {
                swept.infos.extend(Self::info(pid));
            }
            // It may have ended, or be a part of the kernel, and then maps nothing.
            let Ok(entries) = read_maps(pid) else {
                continue;
            };
            if swept.hooked.is_none() && entries.iter().any(leftover::is_ours) {
                let found = leftover::find(pid).ok().flatten();
                swept.hooked = Some((pid, found.is_none_or(|found| found.in_use)));
            }
            let mut is_go = false;
            for entry in entries.iter().filter(|e| e.executable && e.is_file()) {
                swept.mapped_inodes.insert(entry.inode);
                if let Some(&known) = seen.get(&kernel_file(entry)) {
                    is_go |= known;
                    continue;
                }
                let file = self.open(pid, entry);
                let is_go_file = self.is_go(&file);
                is_go |= is_go_file;
                // If it is not open, another process may show it as it is.
                if file.file.is_some() {
                    seen.insert(kernel_file(entry), is_go_file);
                }
                swept.modules.extend(self.allocators_in(&file));
            }
            if is_go {
                swept.go.extend(Self::info(pid));
            }
        }
        swept
    }

    /// What files are that have just been mapped, each named by one event.
    pub(super) fn look_at(&self, events: Vec<MmapEvent>) -> Looked {
        let mut looked = Looked::default();
        let mut files: HashMap<(u64, u64), Arc<MappedFile>> = HashMap::new();
        for event in events {
            let file = self.mapping_of(&event).and_then(|mapping| mapping.file);
            let file = file.filter(|file| file.file.is_some());
            let is_go = file.as_ref().map(|file| self.is_go(file));
            if let Some(file) = file {
                files.insert((file.device, file.inode), file);
            }
            looked.files.push((FileName::of(&event), is_go));
        }
        looked.modules = files
            .values()
            .flat_map(|file| self.allocators_in(file))
            .collect();
        looked
    }
}

const fn kernel_file(entry: &MapsEntry) -> KernelFile {
    (entry.device_major, entry.device_minor, entry.inode)
}

/// The ids of all processes that there are now.
pub(super) fn all_pids() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that this process is among all, and the one that the kernel starts first.
    #[test]
    fn finds_this_process() {
        let pids = all_pids();
        assert!(pids.contains(&1) && pids.contains(&std::process::id()));
    }
}
