//! Instructions of a process that calls in it are made with.
//!
//! They are found in the code it has mapped from files, so that nothing of it has to be
//! changed. Wherever the bytes stand, within other instructions too, they do the same.

use nix::errno::Errno;

use super::remote;
use crate::process::{
    info::ProcessError,
    maps::{MapsEntry, read_maps},
};

/// `syscall; ret`.
const CALL: &[u8] = &[0x0f, 0x05, 0xc3];
/// `mov $15, %rax; syscall` and `mov $15, %eax; syscall`: rt_sigreturn(2), as C libraries
/// have it behind every signal handler.
const RETURNS: [&[u8]; 2] = [
    &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05],
    &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05],
];
const CHUNK: usize = 256 << 10;
/// The longest of the above, less one: what may stand across two chunks.
const OVERLAP: usize = 8;

/// Addresses in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gadgets {
    /// Of `syscall; ret`.
    pub(super) call: u64,
    /// Of what returns from a signal handler.
    pub(super) sigreturn: u64,
}

impl Gadgets {
    /// Looks for them; none if either is nowhere.
    ///
    /// # Errors
    ///
    /// The process has ended or cannot be looked at.
    pub fn find(pid: u32) -> Result<Option<Self>, ProcessError> {
        let mut maps = read_maps(pid)?;
        maps.retain(|entry| entry.executable && entry.is_file());
        // Most have both in the C library; a big program's own text is left for last.
        maps.sort_by_key(|entry| (!is_libc(entry), entry.end.0 - entry.start.0));
        let (mut call, mut sigreturn) = (None, None);
        for entry in &maps {
            // Gone meanwhile, or not readable: look elsewhere.
            let _: Result<(), Errno> = search(pid, entry, |address, code| {
                call = call.or_else(|| find_in(address, code, CALL));
                let found = RETURNS
                    .iter()
                    .find_map(|bytes| find_in(address, code, bytes));
                sigreturn = sigreturn.or(found);
                call.is_some() && sigreturn.is_some()
            });
            if let (Some(call), Some(sigreturn)) = (call, sigreturn) {
                return Ok(Some(Self { call, sigreturn }));
            }
        }
        Ok(None)
    }

    /// Whether they are there still.
    pub(super) fn are_there(&self, tid: u32) -> bool {
        let has = |address, bytes: &[u8]| {
            let mut found = vec![0; bytes.len()];
            remote::read(tid, address, &mut found).is_ok() && found == bytes
        };
        has(self.call, CALL) && RETURNS.iter().any(|bytes| has(self.sigreturn, bytes))
    }
}

fn is_libc(entry: &MapsEntry) -> bool {
    let name = entry.path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("libc.") || name.starts_with("libc-") || name.starts_with("ld-musl")
}

fn find_in(address: u64, code: &[u8], bytes: &[u8]) -> Option<u64> {
    let at = code
        .windows(bytes.len())
        .position(|window| window == bytes)?;
    Some(address + at as u64)
}

/// Shows `entry`'s bytes to `is_done`, piece by piece, until it is.
fn search(
    pid: u32,
    entry: &MapsEntry,
    mut is_done: impl FnMut(u64, &[u8]) -> bool,
) -> Result<(), Errno> {
    let mut buffer = vec![0; CHUNK];
    let mut at = entry.start.0;
    while at < entry.end.0 {
        let len = usize::try_from(entry.end.0 - at)
            .unwrap_or(CHUNK)
            .min(CHUNK);
        let code = buffer.get_mut(..len).unwrap_or_default();
        remote::read(pid, at, code)?;
        if is_done(at, code) || len < CHUNK {
            break;
        }
        at += (CHUNK - OVERLAP) as u64;
    }
    Ok(())
}
