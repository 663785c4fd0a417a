//! New executable mappings, of every process, as they are made.
//!
//! The kernel writes a `PERF_RECORD_MMAP2` within `mmap` (and within `mprotect`
//! that makes memory executable), before it returns to the program
//! (kernel/events/core.c, `perf_event_mmap`). So when a stack from new code
//! reaches the daemon, the record of its mapping is already in the buffer:
//! [`MmapEvents::drain`] first, then look the stack up.
//!
//! Only what the kernel writes into a `dummy` event's buffer is used: no
//! sample is ever taken.

use std::{
    ffi::OsString,
    fs, io, mem,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::PathBuf,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::event::epoll;
use tokio::io::{Interest, unix::AsyncFd};

use crate::address::{AbsAddr, FileOffset};

/// Bytes of each CPU's buffer. A record is some 120 bytes, so this holds the
/// libraries of some 2,000 processes that start between two drains.
pub const BUFFER_BYTES: usize = 256 << 10;

/// Why mappings cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum MmapEventsError {
    /// `perf_event_open` failed.
    #[error("cannot open a system-wide perf event on CPU {cpu} (needs root, or CAP_PERFMON)")]
    Open {
        /// The CPU.
        cpu: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The buffer could not be mapped.
    #[error("cannot map a perf buffer: {0}")]
    Map(io::Error),
    /// The kernel does not say which CPUs there are.
    #[error("cannot read which CPUs are online: {0}")]
    Cpus(io::Error),
    /// Every CPU went away meanwhile.
    #[error("no CPU is online")]
    NoCpu,
}

/// A mapping that became executable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmapEvent {
    /// `CLOCK_MONOTONIC`, as samples have it.
    pub timestamp_ns: u64,
    /// Process id.
    pub pid: u32,
    /// First address.
    pub start: AbsAddr,
    /// Bytes.
    pub len: u64,
    /// Where in the file `start` is.
    pub file_offset: FileOffset,
    /// Device number, as `/proc/PID/maps` shows it.
    pub device_major: u32,
    /// See `device_major`.
    pub device_minor: u32,
    /// 0 without a file.
    pub inode: u64,
    /// The path as the kernel shows it, with ` (deleted)` where it applies; or
    /// its name for memory without a file: `//anon`, `[vdso]`.
    pub path: PathBuf,
}

/// What the kernel has told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// A mapping.
    Mmap(MmapEvent),
    /// A process was made.
    Fork {
        /// When.
        timestamp_ns: u64,
        /// The new one.
        pid: u32,
        /// Its parent.
        parent: u32,
    },
    /// A process has replaced its program; its mappings come after this.
    Exec {
        /// When.
        timestamp_ns: u64,
        /// Which.
        pid: u32,
        /// The new program's name.
        comm: String,
    },
    /// The first thread of a process has ended.
    Exit {
        /// When.
        timestamp_ns: u64,
        /// Which.
        pid: u32,
    },
}

impl HostEvent {
    const fn timestamp_ns(&self) -> u64 {
        match self {
            Self::Mmap(event) => event.timestamp_ns,
            Self::Fork { timestamp_ns, .. }
            | Self::Exec { timestamp_ns, .. }
            | Self::Exit { timestamp_ns, .. } => *timestamp_ns,
        }
    }
}

/// Which records are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those about mappings.
    Mappings,
    /// Those about the lives of processes, too.
    Lives,
}

/// Follows the executable mappings of all processes.
///
/// A CPU that comes online later is not followed; a record on it is missing and
/// not counted.
#[derive(Debug)]
pub struct MmapEvents {
    buffers: Vec<Buffer>,
    /// Reused by each drain.
    bytes: Vec<u8>,
    lost: u64,
    malformed: u64,
}

impl MmapEvents {
    /// Starts following, on every online CPU.
    ///
    /// # Errors
    ///
    /// Privileges are missing, or locked memory has run out.
    pub fn open(scope: Scope) -> Result<Self, MmapEventsError> {
        let online =
            fs::read_to_string("/sys/devices/system/cpu/online").map_err(MmapEventsError::Cpus)?;
        let mut buffers = Vec::new();
        for cpu in parse_cpu_list(&online) {
            match open_event(cpu, scope) {
                Ok(fd) => buffers.push(Buffer::map(fd).map_err(MmapEventsError::Map)?),
                // It went offline since.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(source) => return Err(MmapEventsError::Open { cpu, source }),
            }
        }
        if buffers.is_empty() {
            return Err(MmapEventsError::NoCpu);
        }
        Ok(Self {
            buffers,
            bytes: Vec::new(),
            lost: 0,
            malformed: 0,
        })
    }

    /// Hands over everything recorded until now, in the order of time: a
    /// process that moves between CPUs leaves its records in several buffers.
    pub fn drain(&mut self, mut on_event: impl FnMut(HostEvent)) {
        let mut events = Vec::new();
        for buffer in &self.buffers {
            if !buffer.take(&mut self.bytes) {
                self.malformed = self.malformed.saturating_add(1);
            }
            let mut records = Records(&self.bytes);
            for record in &mut records {
                match record {
                    Record::Event(event) => events.push(event),
                    Record::Lost(count) => self.lost = self.lost.saturating_add(count),
                    Record::Malformed => self.malformed = self.malformed.saturating_add(1),
                    Record::Other => {}
                }
            }
        }
        events.sort_by_key(HostEvent::timestamp_ns);
        events.into_iter().for_each(&mut on_event);
    }

    /// Mappings that found no room in a buffer, as far as the kernel has said: it
    /// does so with the next record on the same CPU. When this grows, read
    /// `/proc/PID/maps` of the targets again.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Records that made no sense: 0 unless the kernel is not as documented.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// What to wait on: wakes when something was recorded.
    ///
    /// # Errors
    ///
    /// If the runtime it is called in cannot watch it, or there are no descriptors left.
    pub fn alarm(&self) -> io::Result<MmapAlarm> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for buffer in &self.buffers {
            epoll::add(
                &epoll,
                &buffer.fd,
                epoll::EventData::new_u64(0),
                epoll::EventFlags::IN,
            )?;
        }
        // SAFETY: an `OwnedFd` keeps its descriptor open for its lifetime and always returns
        // the same one.
        let alarm = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) }?;
        Ok(MmapAlarm(alarm))
    }
}

/// Tells that [`MmapEvents`] have something to hand over.
#[derive(Debug)]
pub struct MmapAlarm(AsyncFd<OwnedFd>);

impl MmapAlarm {
    /// Waits for a record that was written since the last time.
    ///
    /// # Errors
    ///
    /// If waiting fails.
    pub async fn recorded(&self) -> io::Result<()> {
        // Cleared before the records are read: what is recorded meanwhile wakes again.
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

/// `0-3,8,10-11` and a newline.
fn parse_cpu_list(text: &str) -> impl Iterator<Item = u32> {
    text.trim().split(',').flat_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        match (first.parse::<u32>(), last.parse::<u32>()) {
            (Ok(first), Ok(last)) => first..last.saturating_add(1),
            _ => 0..0,
        }
    })
}

/// `struct perf_event_attr` up to `PERF_ATTR_SIZE_VER5`: the first to have
/// `clockid` (include/uapi/linux/perf_event.h).
#[derive(Default)]
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_watermark: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
    branch_sample_type: u64,
    sample_regs_user: u64,
    sample_stack_user: u32,
    clockid: i32,
    sample_regs_intr: u64,
    aux_watermark: u32,
    sample_max_stack: u16,
    reserved: u16,
}

const _: () = assert!(size_of::<Attributes>() == 112);

const PERF_TYPE_SOFTWARE: u32 = 1;
const PERF_COUNT_SW_DUMMY: u64 = 9;
const PERF_SAMPLE_TIME: u64 = 1 << 2;
const PERF_FLAG_FD_CLOEXEC: u64 = 1 << 3;
/// Record mappings with `PROT_EXEC` (and no others, without `mmap_data`).
const FLAG_MMAP: u64 = 1 << 8;
const FLAG_WATERMARK: u64 = 1 << 14;
/// Record names of threads ...
const FLAG_COMM: u64 = 1 << 9;
/// ... and threads that are made and end ...
const FLAG_TASK: u64 = 1 << 13;
/// ... and say whether a name is that of a new program.
const FLAG_COMM_EXEC: u64 = 1 << 24;
/// Put the time into such records too.
const FLAG_SAMPLE_ID_ALL: u64 = 1 << 18;
/// Record them with device and inode.
const FLAG_MMAP2: u64 = 1 << 23;
const FLAG_USE_CLOCKID: u64 = 1 << 25;

fn open_event(cpu: u32, scope: Scope) -> io::Result<OwnedFd> {
    let lives = match scope {
        Scope::Mappings => 0,
        Scope::Lives => FLAG_COMM | FLAG_TASK | FLAG_COMM_EXEC,
    };
    let attributes = Attributes {
        kind: PERF_TYPE_SOFTWARE,
        size: size_of::<Attributes>() as u32,
        config: PERF_COUNT_SW_DUMMY,
        sample_type: PERF_SAMPLE_TIME,
        flags: FLAG_MMAP
            | FLAG_WATERMARK
            | FLAG_SAMPLE_ID_ALL
            | FLAG_MMAP2
            | FLAG_USE_CLOCKID
            | lives,
        // A record is longer: each wakes who waits.
        wakeup_watermark: 1,
        clockid: libc::CLOCK_MONOTONIC,
        ..Attributes::default()
    };
    let every_process: libc::pid_t = -1;
    let no_group: libc::c_int = -1;
    // SAFETY: `attributes` is laid out as the kernel expects a structure of the
    // size it states, and lives until the call returns; the kernel only reads it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            every_process,
            cpu,
            no_group,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed out this descriptor, to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Places in `struct perf_event_mmap_page` (include/uapi/linux/perf_event.h).
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

/// One CPU's buffer: a page of control, then `BUFFER_BYTES` of records.
#[derive(Debug)]
struct Buffer {
    fd: OwnedFd,
    control: NonNull<u8>,
    page_bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only
// reached through this value; `take` is the only reader and `&mut MmapEvents` is
// needed to call it.
unsafe impl Send for Buffer {}

impl Buffer {
    fn map(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: sysconf has no preconditions.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page_bytes = usize::try_from(page_bytes).map_err(io::Error::other)?;
        // SAFETY: a new mapping at a place of the kernel's choice touches no
        // memory in use.
        let control = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                page_bytes + BUFFER_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if control == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let control = NonNull::new(control.cast::<u8>())
            .ok_or_else(|| io::Error::other("mmap gave a null pointer"))?;
        Ok(Self {
            fd,
            control,
            page_bytes,
        })
    }

    fn position(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `at` is `DATA_HEAD` or `DATA_TAIL`, a multiple of 8 within the
        // first, page-aligned page of the mapping, which lives as long as
        // `self`; the kernel and this process only access it atomically.
        unsafe { AtomicU64::from_ptr(self.control.as_ptr().add(at).cast()) }
    }

    /// Moves all that was recorded into `bytes`, and gives the room back. False
    /// if the kernel claims to have recorded more than there is room for.
    fn take(&self, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        // Acquire: pairs with the kernel's barrier before it publishes the head
        // (kernel/events/ring_buffer.c, `perf_output_put_handle`), so that the
        // records before it are visible.
        let head = self.position(DATA_HEAD).load(Ordering::Acquire);
        // Only this side writes the tail.
        let tail = self.position(DATA_TAIL).load(Ordering::Relaxed);
        // Both count bytes for ever; the buffer's size is a power of two.
        let length = usize::try_from(head.wrapping_sub(tail)).unwrap_or(usize::MAX);
        if (1..=BUFFER_BYTES).contains(&length) {
            let from = (tail % BUFFER_BYTES as u64) as usize;
            let first = length.min(BUFFER_BYTES - from);
            bytes.reserve(length);
            // SAFETY: `from + first` and `length - first` are at most
            // `BUFFER_BYTES`, the length of the data that follows the control
            // page, so both sources are within the mapping; `bytes` has room for
            // `first + (length - first)`. The kernel does not write between tail
            // and head until the tail is moved, below.
            unsafe {
                let data = self.control.as_ptr().add(self.page_bytes);
                let to = bytes.as_mut_ptr();
                to.copy_from_nonoverlapping(data.add(from), first);
                to.add(first).copy_from_nonoverlapping(data, length - first);
                bytes.set_len(length);
            }
        }
        // Release: the copy is complete before the kernel may overwrite it.
        self.position(DATA_TAIL).store(head, Ordering::Release);
        length <= BUFFER_BYTES
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and no reference into it
        // outlives `self`.
        unsafe {
            libc::munmap(self.control.as_ptr().cast(), self.page_bytes + BUFFER_BYTES);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Record {
    Event(HostEvent),
    Lost(u64),
    Other,
    Malformed,
}

const RECORD_LOST: u32 = 2;
const RECORD_COMM: u32 = 3;
const RECORD_EXIT: u32 = 4;
const RECORD_FORK: u32 = 7;
const RECORD_MMAP2: u32 = 10;
/// The header's `misc` says that the name is that of a new program.
const MISC_COMM_EXEC: u16 = 1 << 13;
/// The header's `misc` says that a build id stands in the place of the device;
/// it was not asked for.
const MISC_MMAP_BUILD_ID: u16 = 1 << 14;

/// Splits bytes into records. A record that cannot be delimited ends it.
struct Records<'a>(&'a [u8]);

impl Iterator for Records<'_> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = mem::take(&mut self.0);
        let record = split_record(bytes).map(|(kind, misc, body, rest)| {
            self.0 = rest;
            parse_record(kind, misc, body)
        });
        Some(record.flatten().unwrap_or(Record::Malformed))
    }
}

/// `struct perf_event_header { u32 type; u16 misc; u16 size; }`
fn split_record(mut bytes: &[u8]) -> Option<(u32, u16, &[u8], &[u8])> {
    let whole = bytes;
    let kind = u32::from_ne_bytes(field(&mut bytes)?);
    let misc = u16::from_ne_bytes(field(&mut bytes)?);
    let size = usize::from(u16::from_ne_bytes(field(&mut bytes)?));
    let body = whole.get(8..size)?;
    Some((kind, misc, body, whole.get(size..)?))
}

/// The layouts are in include/uapi/linux/perf_event.h, `enum perf_event_type`.
fn parse_record(kind: u32, misc: u16, mut body: &[u8]) -> Option<Record> {
    match kind {
        RECORD_LOST => {
            let _id: [u8; 8] = field(&mut body)?;
            Some(Record::Lost(u64::from_ne_bytes(field(&mut body)?)))
        }
        RECORD_MMAP2 if misc & MISC_MMAP_BUILD_ID == 0 => {
            // With `sample_id_all` a record ends in what `sample_type` asks for.
            let (rest, time) = body.split_last_chunk::<8>()?;
            body = rest;
            let pid = u32::from_ne_bytes(field(&mut body)?);
            let _tid: [u8; 4] = field(&mut body)?;
            let start = u64::from_ne_bytes(field(&mut body)?);
            let len = u64::from_ne_bytes(field(&mut body)?);
            let file_offset = u64::from_ne_bytes(field(&mut body)?);
            let device_major = u32::from_ne_bytes(field(&mut body)?);
            let device_minor = u32::from_ne_bytes(field(&mut body)?);
            let inode = u64::from_ne_bytes(field(&mut body)?);
            let _generation: [u8; 8] = field(&mut body)?;
            let _prot_and_flags: [u8; 8] = field(&mut body)?;
            let path = body.split(|&byte| byte == 0).next()?.to_vec();
            Some(Record::Event(HostEvent::Mmap(MmapEvent {
                timestamp_ns: u64::from_ne_bytes(*time),
                pid,
                start: AbsAddr(start),
                len,
                file_offset: FileOffset(file_offset),
                device_major,
                device_minor,
                inode,
                path: PathBuf::from(OsString::from_vec(path)),
            })))
        }
        RECORD_MMAP2 => None,
        RECORD_COMM if misc & MISC_COMM_EXEC != 0 => {
            let (rest, time) = body.split_last_chunk::<8>()?;
            body = rest;
            let pid = u32::from_ne_bytes(field(&mut body)?);
            let _tid: [u8; 4] = field(&mut body)?;
            let comm = body.split(|&byte| byte == 0).next()?;
            Some(Record::Event(HostEvent::Exec {
                timestamp_ns: u64::from_ne_bytes(*time),
                pid,
                comm: String::from_utf8_lossy(comm).into_owned(),
            }))
        }
        RECORD_FORK | RECORD_EXIT => {
            let pid = u32::from_ne_bytes(field(&mut body)?);
            let parent = u32::from_ne_bytes(field(&mut body)?);
            let tid = u32::from_ne_bytes(field(&mut body)?);
            let _parent_tid: [u8; 4] = field(&mut body)?;
            let timestamp_ns = u64::from_ne_bytes(field(&mut body)?);
            Some(match kind {
                // Of a process, not of a further thread.
                _ if pid != tid => Record::Other,
                RECORD_FORK => Record::Event(HostEvent::Fork {
                    timestamp_ns,
                    pid,
                    parent,
                }),
                _ => Record::Event(HostEvent::Exit { timestamp_ns, pid }),
            })
        }
        _ => Some(Record::Other),
    }
}

fn field<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (field, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*field)
}

#[cfg(test)]
#[path = "mmap_events_tests.rs"]
mod tests;
