//! The thread that calls are made in.
//!
//! Below its stack pointer a frame is written, as large as that of a signal. Only where
//! the stack is known to be the thread's own: a coroutine's may be small, and next to
//! what belongs to others.

use super::{ptrace, remote, stop::Stopped, stop::Thread, within::mapping_at};
use crate::process::{
    info::{read_status, status_field},
    maps::MapsEntry,
};

/// 11 KiB of AMX at most, the rest, and room for a handler of the target's that runs
/// before all is taken back.
const USUAL_ROOM: u64 = 16 << 10;
/// `__USER_CS`: 64-bit code.
const CODE_64: u64 = 0x33;

/// Whether calls can be made in `thread`.
fn is_fit(thread: &Thread, maps: &[MapsEntry]) -> bool {
    let registers = &thread.registers;
    let Some(stack) = mapping_at(maps, registers.rsp) else {
        return false;
    };
    // The first thread's stack, or one with the thread's own data on top, as C libraries
    // make them.
    let is_own = stack.path.as_os_str() == "[stack]"
        || (registers.rsp..stack.end.0).contains(&registers.fs_base);
    is_own
        && !stack.is_file()
        && registers.cs == CODE_64
        && registers.rsp - stack.start.0 >= USUAL_ROOM
        && !ptrace::dispatches_syscalls(thread.tid)
        && !has_shadow_stack(thread.tid)
}

/// Whether returns are checked against a second stack, which a frame is not on
/// (`x86_Thread_features` in `/proc/PID/status`, since Linux 6.6).
fn has_shadow_stack(tid: u32) -> bool {
    read_status(tid).is_ok_and(|status| names_shadow_stack(&status))
}

fn names_shadow_stack(status: &str) -> bool {
    let mut lines = status.lines();
    let features = lines.find_map(|line| line.strip_prefix("x86_Thread_features:"));
    features.is_some_and(|features| features.split_whitespace().any(|name| name == "shstk"))
}

/// Whether a seccomp filter would see its calls. Also if that cannot be told.
pub(super) fn is_confined(tid: u32) -> bool {
    let mode = read_status(tid)
        .ok()
        .and_then(|status| status_field(&status, "Seccomp:"));
    mode != Some(0)
}

impl Stopped {
    /// A thread that calls can be made in, one on the program's first stack before others.
    pub(super) fn victim(&self) -> Option<Thread> {
        let maps = self.maps().ok()?;
        let fit = |thread: &&Thread| is_fit(thread, &maps);
        let first = self.threads.iter().find(|thread| thread.tid == self.pid());
        first
            .filter(fit)
            .or_else(|| self.threads.iter().find(fit))
            // The stack is read-write: what is there can be written back.
            .filter(|thread| is_writable(thread))
            .cloned()
    }
}

/// Whether a word far below the red zone can be read and written.
fn is_writable(thread: &Thread) -> bool {
    let at = thread.registers.rsp.wrapping_sub(USUAL_ROOM) & !7;
    remote::read_word(thread.tid, at)
        .and_then(|word| remote::write(thread.tid, at, &word.to_ne_bytes()))
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a thread with a shadow stack is known by what Linux 6.6 and later say of it
    /// (arch/x86/kernel/cpu/proc.c, `dump_x86_features`), and that locked features are not
    /// taken for ones in force.
    #[test]
    fn shadow_stacks() {
        let status = |features: &str, locked: &str| {
            format!(
                "Name:\tx\nx86_Thread_features:\t{features}\n\
                 x86_Thread_features_locked:\t{locked}\n"
            )
        };
        assert!(names_shadow_stack(&status("shstk ", "")));
        assert!(names_shadow_stack(&status("shstk wrss ", "shstk wrss ")));
        assert!(!names_shadow_stack(&status("", "shstk wrss ")));
        assert!(!names_shadow_stack("Name:\tshstk\n"));
    }
}
