//! Has a stopped process map the prefilter's memory.

use std::{
    fs::File,
    ops::Range,
    os::fd::{AsFd as _, AsRawFd as _},
    os::unix::fs::FileExt as _,
};

use nix::errno::Errno;
use rustix::{
    fs::{FlockOperation, flock},
    process::{PidfdGetfdFlags, pidfd_getfd},
};

use super::{
    attach::Order,
    error::PrefilterError,
    inject::{Calls, InjectError},
    plan::Plan,
    stop::Stopped,
};

/// How the kernel shows mappings of the memory file.
pub(super) const FILE_NAME: &str = "/memfd:memprof-prefilter";
const MEMFD_NAME: &[u8] = b"memprof-prefilter\0";
/// `MFD_EXEC` (include/uapi/linux/memfd.h, Linux 6.3).
const MFD_EXEC: u64 = 0x10;
pub(super) const PAGE_BYTES: u64 = 4096;
const NOWHERE: u64 = u64::MAX;

/// Maps data and code as planned: in seven calls, and one more for each further module. The
/// memory file.
///
/// # Errors
///
/// [`PrefilterError::Stale`] if the process has mapped something else there since; nothing
/// stays mapped, whatever has failed.
pub(super) fn map(
    order: &Order<'_>,
    plan: &Plan,
    stopped: &mut Stopped,
) -> Result<File, PrefilterError> {
    // An error of ours goes past the calls' own kind of error.
    let mut outcome = None;
    stopped.inject(|calls| {
        let mut ranges = Ranges::default();
        let mapped = in_file(order, plan, calls, &mut ranges);
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
    plan: &Plan,
    calls: &mut Calls,
    ranges: &mut Ranges,
) -> Result<File, PrefilterError> {
    let fd = create_file(calls)?;
    let mapped = fetch(order, fd).and_then(|file| map_parts(plan, calls, fd, file, ranges));
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
    plan: &Plan,
    calls: &mut Calls,
    fd: u64,
    file: File,
    ranges: &mut Ranges,
) -> Result<File, PrefilterError> {
    file.set_len(plan.file_bytes)
        .map_err(PrefilterError::io("size the memory file"))?;
    // Whole before it is mapped: the process may run it from then on.
    for code in &plan.code {
        file.write_all_at(&code.bytes, code.offset)
            .map_err(PrefilterError::io("write the memory file"))?;
    }
    let place = &plan.place;
    let data = libc::PROT_READ | libc::PROT_WRITE;
    if plan.owns_data {
        // All of it first: should this daemon die now, nobody else's memory comes to be where its
        // second part is to be. What is reserved is the file's, and so has its name.
        let all = place.range.clone();
        reserve(calls, all, libc::PROT_NONE, Some((fd, 0)), ranges)?;
        let shared = place.range.start..place.private;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        map_at(calls, &shared, data, flags, Some((fd, 0)))?;
    }
    for code in &plan.code {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let (at, from) = (code.range.clone(), Some((fd, code.offset)));
        reserve(calls, at, protection, from, ranges)?;
    }
    if plan.owns_data {
        // It is no file's, and has no name to be known by: so it is mapped once the header of
        // some code says where it is.
        let private = place.private..place.range.end;
        let length = private.end - private.start;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        map_at(calls, &private, data, flags, None)?;
        // A forked child finds zeros there: its stubs are switched off.
        let advice = u64::from(libc::MADV_WIPEONFORK.unsigned_abs());
        let arguments = [place.private, length, advice, 0, 0, 0];
        calls.call(libc::SYS_madvise, arguments)?;
    }
    Ok(file)
}

/// Maps the file's where there is nothing.
fn reserve(
    calls: &mut Calls,
    range: Range<u64>,
    protection: i32,
    file: Option<(u64, u64)>,
    ranges: &mut Ranges,
) -> Result<(), PrefilterError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    match map_at(calls, &range, protection, flags, file) {
        Ok(()) => {
            ranges.0.push(range);
            Ok(())
        }
        // Another mapping has come in between.
        Err(InjectError::Call {
            source: Errno::EEXIST,
            ..
        }) => Err(PrefilterError::Stale),
        Err(error) => Err(error.into()),
    }
}

fn map_at(
    calls: &mut Calls,
    range: &Range<u64>,
    protection: i32,
    flags: i32,
    file: Option<(u64, u64)>,
) -> Result<(), InjectError> {
    let (fd, offset) = file.unwrap_or((NOWHERE, 0));
    let length = range.end - range.start;
    let arguments = [
        range.start,
        length,
        protection.unsigned_abs().into(),
        flags.unsigned_abs().into(),
        fd,
        offset,
    ];
    calls.call(libc::SYS_mmap, arguments).map(drop)
}

pub(super) const fn pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE_BYTES)
}
