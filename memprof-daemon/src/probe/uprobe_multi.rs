//! Attaching uprobe_multi and uprobe.session programs.
//!
//! aya 0.14 attaches uprobes by perf event only. aya 0.16 has uprobe_multi of
//! its own (it needs rustc 1.98), and no sessions.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::bpf_insn;

use super::{
    object::{AttachType, LoadError, load},
    syscall::{address, bpf, length},
};

/// Which event of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeOn {
    /// Its instruction is reached; in a session also the function's return.
    Entry,
    /// The function returns.
    Return,
}

/// A place to probe and the number that the program is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Offset in the file.
    pub file_offset: u64,
    /// `bpf_get_attach_cookie`.
    pub cookie: u64,
}

/// `union bpf_attr` of `BPF_LINK_CREATE`, with the part for uprobe_multi.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    ref_ctr_offsets: u64,
    cookies: u64,
    cnt: u32,
    multi_flags: u32,
    pid: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<LinkCreate>() == 64);

const BPF_LINK_CREATE: u32 = 28;
const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;
/// Loads a program that does nothing, and lets returns be probed in a session.
///
/// # Errors
///
/// [`LoadError::Refused`].
pub fn load_empty(attach_type: AttachType) -> Result<OwnedFd, LoadError> {
    // BPF_MOV64_IMM(BPF_REG_0, 0), BPF_EXIT_INSN() (include/linux/filter.h).
    let program = [0xb7, 0x95].map(|code| bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off: 0,
        imm: 0,
    });
    load("memprof_empty", &program, c"GPL", attach_type, None)
}

/// Attaches a program to places in a file, for the process `pid` alone, or for every one
/// if that is 0. The link lasts until the descriptor is closed.
///
/// # Errors
///
/// The kernel's answer; ESRCH if there is no such process.
pub fn attach(
    program: BorrowedFd<'_>,
    attach_type: AttachType,
    on: ProbeOn,
    path: &Path,
    places: &[Place],
    pid: u32,
) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let offsets: Vec<u64> = places.iter().map(|place| place.file_offset).collect();
    let cookies: Vec<u64> = places.iter().map(|place| place.cookie).collect();
    let attr = LinkCreate {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: attach_type as u32,
        path: address(path.as_ptr()),
        offsets: address(offsets.as_ptr()),
        cookies: address(cookies.as_ptr()),
        cnt: length(places.len())?,
        multi_flags: match on {
            ProbeOn::Entry => 0,
            ProbeOn::Return => BPF_F_UPROBE_MULTI_RETURN,
        },
        pid,
        ..LinkCreate::default()
    };
    bpf(BPF_LINK_CREATE, &attr)
}

/// Finds out whether the kernel has this type and filters by process, without
/// probing anything: links to what is no regular file are refused late (EBADF),
/// those of an unknown type early (EINVAL).
///
/// # Errors
///
/// What is missing.
pub fn try_out(attach_type: AttachType) -> Result<(), String> {
    let program = load_empty(attach_type)
        .map_err(|error| format!("a program of that type does not load: {error}"))?;
    let link = |pid| {
        let path = Path::new(OsStr::new("/"));
        let place = Place {
            file_offset: 0,
            cookie: 0,
        };
        attach(
            program.as_fd(),
            attach_type,
            ProbeOn::Entry,
            path,
            &[place],
            pid,
        )
        .err()
        .and_then(|error| error.raw_os_error())
    };
    match link(std::process::id()) {
        Some(libc::EBADF) => {}
        Some(libc::EINVAL) => return Err("no links of that type".to_owned()),
        Some(errno) => return Err(io::Error::from_raw_os_error(errno).to_string()),
        None => return Err("a directory was probed".to_owned()),
    }
    // From 6.6 until a fix in 6.10 the pid filter lets one thread pass only. The
    // fix checks for negative pids first of all; libbpf tells the kernels apart
    // in the same way (tools/lib/bpf/features.c, probe_uprobe_multi_link).
    match link(u32::MAX) {
        Some(libc::EINVAL) => Ok(()),
        _ => Err(
            "its pid filter means one thread, not the process (mended in Linux 6.10)".to_owned(),
        ),
    }
}
