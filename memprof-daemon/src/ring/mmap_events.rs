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

mod buffer;
mod records;

use std::{
    fs, io,
    os::fd::{FromRawFd, OwnedFd},
};

use rustix::event::epoll;
use tokio::io::{Interest, unix::AsyncFd};

pub use buffer::BUFFER_BYTES;
use buffer::Buffer;
pub use records::{HostEvent, MmapEvent};
use records::{Record, Records};

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

#[cfg(test)]
#[path = "mmap_events_tests.rs"]
mod tests;
