//! Processes that share the memory of another without being its threads: made by
//! clone(2) with `CLONE_VM` alone, or vfork(2).

use std::{ffi::c_int, fs, sync::Once};

use nix::errno::Errno;

use super::stop_error::StopError;
use crate::process::info::{Stat, read_status, status_field};

/// `KCMP_VM` (include/uapi/linux/kcmp.h).
const KCMP_VM: c_int = 1;

/// Refuses a process that shares its memory with its parent or with a child of it. `tid`
/// is a thread of it that has not ended: those that have share none, with each other.
pub(super) fn check(pid: u32, tid: u32) -> Result<(), StopError> {
    let parent = read_status(pid)
        .ok()
        .and_then(|status| status_field(&status, "PPid:"))
        .and_then(|parent| u32::try_from(parent).ok());
    let mut relatives = children_of(pid);
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

/// The children of every thread. None on a kernel without `CONFIG_PROC_CHILDREN`.
fn children_of(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let mut children = Vec::new();
    for thread in threads.flatten() {
        match fs::read_to_string(thread.path().join("children")) {
            Ok(text) => children.extend(
                text.split_whitespace()
                    .filter_map(|id| id.parse::<u32>().ok()),
            ),
            Err(error) if thread.path().exists() => {
                say_once(&error.to_string());
                break;
            }
            Err(_) => {}
        }
    }
    children
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
