//! Who a process is, and what memory the kernel says it holds.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

use super::{
    elf::{self, Class},
    origin::Origin,
};

/// The unit of times in `/proc/PID/stat`: `USER_HZ` is 100 on x86-64, whatever
/// `CONFIG_HZ` is (include/asm-generic/param.h).
const TICKS_PER_SECOND: u64 = 100;

/// The inode of the initial pid namespace (include/linux/proc_ns.h,
/// `PROC_PID_INIT_INO`).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// `PF_KTHREAD` (include/linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Why a process cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is none with this id, or there is none any more.
    #[error("no process with pid {pid}")]
    NotFound {
        /// The id.
        pid: u32,
    },
    /// The id is that of a thread.
    #[error("{tid} is a thread of process {pid}: give the process")]
    Thread {
        /// The id.
        tid: u32,
        /// The process it belongs to.
        pid: u32,
    },
    /// It is a part of the kernel and has no memory of its own.
    #[error("pid {pid} ({comm}) is a kernel thread")]
    KernelThread {
        /// The id.
        pid: u32,
        /// Its name.
        comm: String,
    },
    /// It has ended and its parent has not asked for its status, or its main
    /// thread has ended before the others: no mappings can be read then.
    #[error("pid {pid} ({comm}) is a zombie: it, or its main thread, has ended")]
    Zombie {
        /// The id.
        pid: u32,
        /// Its name.
        comm: String,
    },
    /// The daemon lacks a privilege.
    #[error(
        "pid {pid} may not be traced (needs root with every capability the process has, or CAP_SYS_PTRACE)"
    )]
    Permission {
        /// The id.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// It runs 32-bit code.
    #[error(
        "pid {pid} is a 32-bit program, or not one for x86: only 64-bit x86 programs can be traced"
    )]
    WrongMachine {
        /// The id.
        pid: u32,
    },
    /// The kernel's text is not as expected.
    #[error("cannot understand /proc/{pid}/{what}: {text:?}")]
    Malformed {
        /// The id.
        pid: u32,
        /// The file.
        what: &'static str,
        /// What it says.
        text: String,
    },
    /// Anything else.
    #[error("cannot read about pid {pid}")]
    Io {
        /// The id.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

impl ProcessError {
    /// What a failure to read a file of `/proc/PID` means.
    #[must_use]
    pub fn from_io(pid: u32, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Self::NotFound { pid },
            Some(libc::EACCES | libc::EPERM) => Self::Permission { pid, source },
            _ => Self::Io { pid, source },
        }
    }
}

/// Who a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Process id.
    pub pid: u32,
    /// Name of its main thread.
    pub comm: String,
    /// Path of its program, as the kernel shows it.
    pub exe: String,
    /// When it was started, by the wall clock as it is set now.
    pub start_time: SystemTime,
    /// When it was started, in hundredths of a second since boot: with `pid` it
    /// names one process.
    pub start_ticks: u64,
    /// Its user, pid namespaces and cgroup.
    pub origin: Origin,
}

impl ProcessInfo {
    /// Reads about `pid`.
    ///
    /// # Errors
    ///
    /// There is no such process, it has ended, or it is none that can be traced.
    pub fn read(pid: u32) -> Result<Self, ProcessError> {
        let stat = Stat::read(pid)?;
        if stat.flags & KERNEL_THREAD != 0 {
            return Err(ProcessError::KernelThread {
                pid,
                comm: stat.comm,
            });
        }
        if matches!(stat.state, 'Z' | 'X') {
            return Err(ProcessError::Zombie {
                pid,
                comm: stat.comm,
            });
        }
        let status = read_status(pid)?;
        match status_field(&status, "Tgid:") {
            Some(tgid) if tgid != u64::from(pid) => {
                return Err(ProcessError::Thread {
                    tid: pid,
                    pid: u32::try_from(tgid).unwrap_or_default(),
                });
            }
            _ => {}
        }
        let exe = match fs::read_link(format!("/proc/{pid}/exe")) {
            Ok(exe) => exe,
            // It ends: its memory goes, and the link with it, before its state
            // says so (kernel/exit.c, `do_exit`). Unless all of it is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let comm = Stat::read(pid)?.comm;
                return Err(ProcessError::Zombie { pid, comm });
            }
            Err(error) => return Err(ProcessError::from_io(pid, error)),
        };
        Ok(Self {
            pid,
            comm: stat.comm,
            exe: exe.to_string_lossy().into_owned(),
            start_time: boot_time(pid)?
                + Duration::from_millis(stat.start_ticks * (1000 / TICKS_PER_SECOND)),
            start_ticks: stat.start_ticks,
            origin: Origin::read(pid, &status),
        })
    }
}

/// Memory of a process, in bytes, from `/proc/PID/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// `VmRSS`: resident.
    pub rss_bytes: u64,
    /// `RssAnon`: resident and anonymous, the heap among it.
    pub rss_anon_bytes: u64,
    /// `RssFile`: resident and file-backed.
    pub rss_file_bytes: u64,
    /// `VmHWM`: the peak of `rss_bytes`.
    pub rss_peak_bytes: u64,
    /// `VmSwap`: swapped out.
    pub swap_bytes: u64,
    /// `VmSize`: address space.
    pub virtual_bytes: u64,
}

/// Whether `pid` runs a 64-bit x86 program.
///
/// # Errors
///
/// [`ProcessError::WrongMachine`] if it does not; or its program cannot be read.
pub fn check_machine(pid: u32) -> Result<(), ProcessError> {
    let exe = File::open(format!("/proc/{pid}/exe"))
        .map_err(|error| ProcessError::from_io(pid, error))?;
    match elf::class(&exe).map_err(|source| ProcessError::Io { pid, source })? {
        Some(Class::X86_64) => Ok(()),
        _ => Err(ProcessError::WrongMachine { pid }),
    }
}

/// What the kernel says that `pid` holds.
///
/// # Errors
///
/// There is no such process, or it holds no memory any more.
pub fn read_memory(pid: u32) -> Result<ProcessMemory, ProcessError> {
    let status = read_status(pid)?;
    let bytes = |name| status_field(&status, name).map(|kib| kib.saturating_mul(1024));
    // A process that has let its memory go (a zombie) has none of these lines.
    let rss_bytes = bytes("VmRSS:").ok_or(ProcessError::NotFound { pid })?;
    Ok(ProcessMemory {
        rss_bytes,
        rss_anon_bytes: bytes("RssAnon:").unwrap_or_default(),
        rss_file_bytes: bytes("RssFile:").unwrap_or_default(),
        rss_peak_bytes: bytes("VmHWM:").unwrap_or_default(),
        swap_bytes: bytes("VmSwap:").unwrap_or_default(),
        virtual_bytes: bytes("VmSize:").unwrap_or_default(),
    })
}

/// Whether the first thread of `pid` has ended while others go on. The process
/// looks dead then to some who ask (a zombie), and is not.
#[must_use]
pub fn first_thread_has_ended(pid: u32) -> bool {
    let is_zombie = read_status(pid).is_ok_and(|status| {
        let state = status.lines().find_map(|line| line.strip_prefix("State:"));
        state.is_some_and(|state| state.trim_start().starts_with('Z'))
    });
    is_zombie && fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

/// When `pid` was started, in hundredths of a second since boot.
///
/// # Errors
///
/// There is no such process.
pub fn start_ticks(pid: u32) -> Result<u64, ProcessError> {
    Stat::read(pid).map(|stat| stat.start_ticks)
}

/// The parent of `pid`, 0 if that is in no pid namespace of ours; none if there is no such
/// process, or not any more: a zombie has ended.
#[must_use]
pub fn parent_of(pid: u32) -> Option<u32> {
    let stat = Stat::read(pid).ok()?;
    (!matches!(stat.state, 'Z' | 'X')).then_some(stat.parent)
}

/// Whether a signal is ignored by this process, as nohup(1) has it.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    let mask = read_status(std::process::id()).ok().and_then(|status| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("SigIgn:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    });
    let bit = u32::try_from(signal - 1).ok();
    mask.zip(bit)
        .is_some_and(|(mask, bit)| mask & 1_u64.checked_shl(bit).unwrap_or(0) != 0)
}

/// Whether this process sees the pids that BPF programs see.
///
/// # Errors
///
/// `/proc` is not mounted.
pub fn pid_namespace_is_initial() -> io::Result<bool> {
    Ok(fs::metadata(Path::new("/proc/self/ns/pid"))?.ino() == INITIAL_PID_NAMESPACE)
}

/// The text of `/proc/PID/status`, of a process or a thread.
pub(crate) fn read_status(pid: u32) -> Result<String, ProcessError> {
    let status = fs::read(format!("/proc/{pid}/status"))
        .map_err(|error| ProcessError::from_io(pid, error))?;
    Ok(String::from_utf8_lossy(&status).into_owned())
}

/// The number in the line that begins with `name`. The process's own name, the
/// only text in `status` that it chooses, is escaped by the kernel and cannot
/// begin a line.
pub(crate) fn status_field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn boot_time(pid: u32) -> Result<SystemTime, ProcessError> {
    let stat =
        fs::read_to_string("/proc/stat").map_err(|source| ProcessError::Io { pid, source })?;
    let seconds = status_field(&stat, "btime ").unwrap_or_default();
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// The fields of `/proc/PID/stat` that are used, of a process or a thread.
pub(crate) struct Stat {
    pub(crate) comm: String,
    pub(crate) state: char,
    pub(crate) flags: u64,
    parent: u32,
    start_ticks: u64,
}

impl Stat {
    pub(crate) fn read(pid: u32) -> Result<Self, ProcessError> {
        let text = fs::read(format!("/proc/{pid}/stat"))
            .map_err(|error| ProcessError::from_io(pid, error))?;
        let text = String::from_utf8_lossy(&text);
        Self::parse(&text).ok_or_else(|| ProcessError::Malformed {
            pid,
            what: "stat",
            text: text.into_owned(),
        })
    }

    /// The name stands in parentheses and may hold spaces and parentheses
    /// itself, so it ends at the last one (proc(5)).
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once('(')?;
        let (comm, rest) = rest.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let state = fields.next()?.chars().next()?;
        // Behind `state`, which is field 3: the parent is field 4, flags are 9, starttime 22.
        let parent = fields.next()?.parse().ok()?;
        let flags = fields.nth(4)?.parse().ok()?;
        let start_ticks = fields.nth(12)?.parse().ok()?;
        Some(Self {
            comm: comm.to_owned(),
            state,
            flags,
            parent,
            start_ticks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Check that a name full of parentheses and spaces does not shift fields.
    #[test]
    fn hostile_comm() {
        let text = "7 (a) R 1 (b) S 1 2 3 4 5 4194560 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.comm, "a) R 1 (b");
        assert_eq!(
            (stat.state, stat.parent, stat.flags, stat.start_ticks),
            ('S', 1, 4_194_560, 777)
        );
        for text in ["", "7 (a", "7 (a)", "7 (a) S 1 2 3", ") 7 ("] {
            assert!(Stat::parse(text).is_none(), "{text}");
        }
    }

    /// Check what is read of this process against what it knows of itself.
    #[test]
    fn own_process() {
        let pid = std::process::id();
        let info = ProcessInfo::read(pid).unwrap();
        let exe = std::env::current_exe().unwrap();
        assert_eq!(info.exe, exe.to_string_lossy());
        assert!(
            exe.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with(&info.comm)
        );
        let age = SystemTime::now().duration_since(info.start_time).unwrap();
        assert!(age < Duration::from_secs(3600), "{age:?}");
        assert_eq!(start_ticks(pid).unwrap(), info.start_ticks);
        assert_eq!(info.origin.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(info.origin.namespace_pids, [pid]);
        assert!(info.origin.cgroup.path.starts_with('/'));
        let memory = read_memory(pid).unwrap();
        assert!(memory.rss_bytes > 1 << 20 && memory.rss_bytes <= memory.virtual_bytes);
        assert!(memory.rss_anon_bytes + memory.rss_file_bytes <= memory.rss_bytes);
        check_machine(pid).unwrap();
    }

    /// Check that what cannot be traced is told apart: nothing there, a kernel
    /// thread, a thread, a zombie.
    #[test]
    fn refusals() {
        let read = ProcessInfo::read;
        assert!(matches!(read(u32::MAX), Err(ProcessError::NotFound { .. })));
        assert!(matches!(read(2), Err(ProcessError::KernelThread { .. })));
        let tid = std::thread::spawn(|| {
            let tid = nix::unistd::gettid().as_raw() as u32;
            (tid, ProcessInfo::read(tid))
        });
        let (tid, of_thread) = tid.join().unwrap();
        assert_ne!(tid, std::process::id());
        assert!(
            matches!(of_thread, Err(ProcessError::Thread { pid, .. }) if pid == std::process::id())
        );

        let mut child = Command::new("/bin/true").spawn().unwrap();
        assert!(parent_of(child.id()).is_none_or(|parent| parent == std::process::id()));
        let refused = loop {
            match read(child.id()) {
                Ok(_) => std::thread::yield_now(),
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, ProcessError::Zombie { .. }), "{refused}");
        assert_eq!(parent_of(child.id()), None);
        assert!(matches!(
            read_memory(child.id()),
            Err(ProcessError::NotFound { .. })
        ));
        child.wait().unwrap();
    }

    /// Check that ignored signals are told from others: Rust ignores SIGPIPE.
    #[test]
    fn ignored_signals() {
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGHUP));
        assert!(!is_ignored(0) && !is_ignored(-1) && !is_ignored(999));
    }

    /// Check that the namespace of the tests, which need root on the host, is
    /// recognized as the initial one.
    #[test]
    fn initial_namespace() {
        assert!(pid_namespace_is_initial().unwrap());
    }
}
