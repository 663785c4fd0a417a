//! Processes that share the memory of another without being its threads: made by
//! clone(2) with `CLONE_VM` alone, or vfork(2).

use std::{
    ffi::c_int,
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    sync::Once,
};

use nix::errno::Errno;
use rustix::fs::{AtFlags, Mode, OFlags};

use super::stop_error::StopError;
use crate::process::info::{Stat, read_status, status_field};

/// `KCMP_VM` (include/uapi/linux/kcmp.h).
const KCMP_VM: c_int = 1;

/// Refuses a process that shares its memory with its parent or with a child of it. `threads`
/// are all of it that have not ended: those that have share none, with each other.
pub(super) fn check(pid: u32, threads: &[u32]) -> Result<(), StopError> {
    let Some(&tid) = threads.first() else {
        return Ok(());
    };
    let parent = read_status(pid)
        .ok()
        .and_then(|status| status_field(&status, "PPid:"))
        .and_then(|parent| u32::try_from(parent).ok());
    let mut relatives = children_of(pid, threads.iter().copied());
    relatives.extend(parent.filter(|&parent| parent != 0));
    for other in relatives {
        match shares_memory(tid, other) {
            Ok(false) => {}
            Ok(true) => {
                return Err(StopError::SharesMemory {
                    pid,
                    other,
                    comm: Stat::read(other).map(|stat| stat.comm).unwrap_or_default(),
                });
            }
            // The other has ended, or may not be looked at: then by us only, who may
            // look at the process itself.
            Err(Errno::ESRCH | Errno::EPERM | Errno::EACCES) => {}
            Err(error) => say_once(&error.to_string()),
        }
    }
    Ok(())
}

/// The children of `threads` of `pid`. None on a kernel without `CONFIG_PROC_CHILDREN`.
///
/// The process stands still, and it may have thousands of threads: so no path is walked twice.
fn children_of(pid: u32, threads: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut children = Vec::new();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(tasks) = rustix::fs::open(format!("/proc/{pid}/task"), flags, Mode::empty()) else {
        return children;
    };
    let mut text = Vec::new();
    for tid in threads {
        let file = rustix::fs::openat(&tasks, format!("{tid}/children"), flags, Mode::empty());
        text.clear();
        let read = file
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).read_to_end(&mut text));
        match read {
            Ok(_) => {
                let ids = text.split(u8::is_ascii_whitespace);
                children.extend(ids.filter_map(|id| str::from_utf8(id).ok()?.parse::<u32>().ok()));
            }
            Err(error) if is_there(&tasks, tid) => {
                say_once(&error.to_string());
                break;
            }
            // It has ended.
            Err(_) => {}
        }
    }
    children
}

fn is_there(tasks: &OwnedFd, tid: u32) -> bool {
    rustix::fs::statat(tasks, tid.to_string(), AtFlags::empty()).is_ok()
}

/// Whether two processes have the same memory, as far as the kernel tells.
#[must_use]
pub fn is_shared_by(a: u32, b: u32) -> bool {
    shares_memory(a, b).unwrap_or(false)
}

fn shares_memory(a: u32, b: u32) -> Result<bool, Errno> {
    // SAFETY: kcmp(2) takes numbers, and writes nothing.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    // 0 for the same, 1 to 3 for an order of others.
    Errno::result(order).map(|order| order == 0)
}

fn say_once(error: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            error,
            "this kernel does not tell whether other processes share the memory of a target"
        );
    });
}
