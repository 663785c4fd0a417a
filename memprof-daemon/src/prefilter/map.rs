//! Has a stopped process map the prefilter's memory.

use std::{
    fs::File,
    ops::Range,
    os::fd::{AsFd as _, AsRawFd as _},
    os::unix::fs::FileExt as _,
};

use memprof_common::prefilter::SiteKind;
use nix::errno::Errno;
use rustix::{
    fs::{FlockOperation, flock},
    process::{PidfdGetfdFlags, pidfd_getfd},
};

use super::{
    attach::{DataPlace, Image, ModuleHooks, Order},
    data::SharedData,
    error::PrefilterError,
    image::{MallocNests, assemble_for, code_bytes},
    inject::{Calls, InjectError},
    place::free_places,
    stop::Stopped,
};
use crate::{
    address::FileOffset,
    process::maps::{MapsEntry, read_maps},
};

/// How the kernel shows mappings of the memory file.
pub(super) const FILE_NAME: &str = "/memfd:memprof-prefilter";
const MEMFD_NAME: &[u8] = b"memprof-prefilter\0";
/// `MFD_EXEC` (include/uapi/linux/memfd.h, Linux 6.3).
const MFD_EXEC: u64 = 0x10;
pub(super) const PAGE_BYTES: u64 = 4096;
const NOWHERE: u64 = u64::MAX;

/// What a process has mapped.
pub(super) struct Mapped {
    pub(super) image: Image,
    pub(super) file: File,
    /// Where to probe, in the file.
    pub(super) sites: Vec<(SiteKind, FileOffset)>,
    pub(super) data: Option<SharedData>,
}

/// Maps data, unless there is some, and the code for every module.
///
/// # Errors
///
/// [`PrefilterError`]; nothing stays mapped.
pub(super) fn map(order: &Order<'_>, stopped: &mut Stopped) -> Result<Mapped, PrefilterError> {
    // An error of ours goes past the calls' own kind of error.
    let mut outcome = None;
    stopped.inject(|calls| {
        let mut ranges = Ranges::default();
        let mapped = in_file(order, calls, &mut ranges);
        if mapped.is_err() {
            for range in ranges.0 {
                let length = range.end - range.start;
                calls.call(libc::SYS_munmap, [range.start, length, 0, 0, 0, 0])?;
            }
        }
        outcome = Some(mapped);
        Ok(())
    })?;
    outcome.unwrap_or(Err(PrefilterError::NotMapped))
}

/// What has been mapped so far.
#[derive(Default)]
struct Ranges(Vec<Range<u64>>);

/// Makes the memory file and closes it again, whatever happens in between.
fn in_file(
    order: &Order<'_>,
    calls: &mut Calls,
    ranges: &mut Ranges,
) -> Result<Mapped, PrefilterError> {
    let fd = create_file(calls)?;
    let mapped = fetch(order, fd).and_then(|file| map_parts(order, calls, fd, file, ranges));
    calls.call(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    mapped
}

fn create_file(calls: &mut Calls) -> Result<u64, PrefilterError> {
    let name = calls.scratch();
    calls.write(MEMFD_NAME)?;
    // Sealed so that the daemon, which has it mapped, cannot be hurt by making it shorter.
    let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
    let create =
        |calls: &mut Calls, flags| calls.call(libc::SYS_memfd_create, [name, flags, 0, 0, 0, 0]);
    // Without the flag a host can be set to make files that no code is mapped from; before
    // Linux 6.3 there is no such flag.
    let made = match create(calls, flags | MFD_EXEC) {
        Err(InjectError::Call {
            source: Errno::EINVAL,
            ..
        }) => create(calls, flags),
        made => made,
    };
    Ok(made?)
}

/// The daemon's own descriptor of the process's file, locked for as long as the daemon
/// lives.
fn fetch(order: &Order<'_>, fd: u64) -> Result<File, PrefilterError> {
    let number = i32::try_from(fd).unwrap_or(-1);
    let file = pidfd_getfd(order.process.as_fd(), number, PidfdGetfdFlags::empty())
        .map_err(|error| PrefilterError::io("fetch the memory file")(error.into()))?;
    // Opened anew: the process's mappings hold the open file that it has made, and with it a
    // lock on that, also when the daemon is gone.
    let file = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(PrefilterError::io("open the memory file"))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| PrefilterError::io("lock the memory file")(error.into()))?;
    Ok(file)
}

fn map_parts(
    order: &Order<'_>,
    calls: &mut Calls,
    fd: u64,
    file: File,
    ranges: &mut Ranges,
) -> Result<Mapped, PrefilterError> {
    let geometry = order.geometry;
    let code_at = if order.image.is_some() {
        0
    } else {
        geometry.shared_bytes() as u64
    };
    let code_length = |module: &ModuleHooks| pages(code_bytes(module.hooks.len()) as u64);
    let file_bytes = code_at + order.modules.iter().map(code_length).sum::<u64>();
    file.set_len(file_bytes)
        .map_err(PrefilterError::io("size the memory file"))?;
    let (place, data) = match &order.image {
        Some(place) => (place.clone(), None),
        None => {
            let mut data = SharedData::new(&file, 0, geometry)
                .map_err(PrefilterError::io("map the memory file"))?;
            data.start(order.interval_bytes, order.seed);
            (map_shared(order, calls, fd, ranges)?, Some(data))
        }
    };
    let maps = read_maps(order.process.pid())?;
    // One module's functions may call another's.
    let nests = if order.modules.len() > 1 || order.image.is_some() {
        MallocNests::Yes
    } else {
        MallocNests::No
    };
    let mut offset = code_at;
    let (mut code, mut patches, mut sites) = (Vec::new(), Vec::new(), Vec::new());
    for module in order.modules {
        let length = code_length(module);
        let at = reserve_code(calls, &maps, module, length, fd)?;
        ranges.0.push(at..at + length);
        let image = assemble_for(at, place.range.start, place.geometry, &module.hooks, nests)?;
        if image.bytes.len() as u64 > length {
            return Err(PrefilterError::NotMapped);
        }
        // Whole before it is mapped: the process may run it from then on.
        file.write_all_at(&image.bytes, offset)
            .map_err(PrefilterError::io("write the memory file"))?;
        map_fixed(
            calls,
            at..at + length,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE,
            Some((fd, offset)),
        )?;
        code.push(at..at + length);
        sites.extend(
            image
                .sites
                .iter()
                .map(|&(kind, within)| (kind, FileOffset(offset + within))),
        );
        patches.extend(in_order(image.patches, &module.hooks));
        offset += length;
    }
    if order.image.is_none() {
        map_private(calls, &place)?;
    }
    // Over all modules: no block is to be freed unseen.
    patches.sort_by_key(|&(is_free, _)| !is_free);
    Ok(Mapped {
        image: Image::new(
            place,
            order.image.is_none(),
            code,
            patches.into_iter().map(|(_, patch)| patch).collect(),
        ),
        file,
        sites,
        data,
    })
}

/// Each patch, and whether its function gives blocks up.
fn in_order(
    patches: Vec<super::image::Patch>,
    hooks: &[super::hooks::Hook],
) -> impl Iterator<Item = (bool, super::image::Patch)> + '_ {
    patches.into_iter().map(|patch| {
        let is_free = hooks
            .iter()
            .any(|hook| hook.entry == patch.address && hook.function.is_free());
        (is_free, patch)
    })
}

/// Reserves room for all data first, so that its parts lie as the stubs expect.
fn map_shared(
    order: &Order<'_>,
    calls: &mut Calls,
    fd: u64,
    ranges: &mut Ranges,
) -> Result<DataPlace, PrefilterError> {
    let shared = order.geometry.shared_bytes() as u64;
    let private = order.geometry.private_bytes() as u64;
    let start = reserve(calls, 0, shared + private, fd)?;
    let range = start..start + shared + private;
    ranges.0.push(range.clone());
    map_fixed(
        calls,
        start..start + shared,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED,
        Some((fd, 0)),
    )?;
    Ok(DataPlace {
        private: start + shared,
        geometry: order.geometry,
        range,
    })
}

/// The part of the data that is no file's has no name to be known by: it is mapped once the
/// header of some code says where it is.
fn map_private(calls: &mut Calls, place: &DataPlace) -> Result<(), PrefilterError> {
    map_fixed(
        calls,
        place.private..place.range.end,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
    )?;
    // A forked child finds zeros there: its stubs are switched off.
    let advice = u64::from(libc::MADV_WIPEONFORK.unsigned_abs());
    let length = place.range.end - place.private;
    calls.call(libc::SYS_madvise, [place.private, length, advice, 0, 0, 0])?;
    Ok(())
}

/// Room for a module's stubs, near its code.
fn reserve_code(
    calls: &mut Calls,
    maps: &[MapsEntry],
    module: &ModuleHooks,
    length: u64,
    fd: u64,
) -> Result<u64, PrefilterError> {
    let reach: Vec<Range<u64>> = module
        .hooks
        .iter()
        .flat_map(|hook| {
            let references = hook.displaced.references();
            references
                .map(|address| address..address.saturating_add(1))
                .chain([hook.displaced.range()])
        })
        .collect();
    for place in free_places(maps, &reach, length) {
        match reserve(calls, place, length, fd) {
            Ok(at) if at == place => return Ok(at),
            // Before Linux 4.17 the flag was a hint.
            Ok(at) => {
                calls.call(libc::SYS_munmap, [at, length, 0, 0, 0, 0])?;
            }
            // Another mapping has come in between.
            Err(InjectError::Call {
                source: Errno::EEXIST,
                ..
            }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(PrefilterError::NoPlace {
        module: module.path.clone(),
    })
}

/// Takes address space: at `place` or, if that is 0, anywhere. It is the file's, though
/// nothing can be read there: so it has its name, should this daemon die now.
fn reserve(calls: &mut Calls, place: u64, length: u64, fd: u64) -> Result<u64, InjectError> {
    let fixed = if place == 0 {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | fixed;
    let none = libc::PROT_NONE.unsigned_abs();
    let flags = flags.unsigned_abs();
    calls.call(
        libc::SYS_mmap,
        [place, length, none.into(), flags.into(), fd, 0],
    )
}

/// Maps over what was reserved.
fn map_fixed(
    calls: &mut Calls,
    range: Range<u64>,
    protection: i32,
    flags: i32,
    file: Option<(u64, u64)>,
) -> Result<(), InjectError> {
    let (fd, offset) = file.unwrap_or((NOWHERE, 0));
    let flags = (flags | libc::MAP_FIXED).unsigned_abs();
    let length = range.end - range.start;
    calls.call(
        libc::SYS_mmap,
        [
            range.start,
            length,
            protection.unsigned_abs().into(),
            flags.into(),
            fd,
            offset,
        ],
    )?;
    Ok(())
}

pub(super) const fn pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE_BYTES)
}
