//! Loading and attaching uprobe_multi and uprobe.session programs.
//!
//! aya 0.14 attaches uprobes by perf event only. aya 0.16 has uprobe_multi of
//! its own (it needs rustc 1.98): then [`AttachType::Multi`] goes, and this file
//! with it once aya has sessions as well. All that is needed of `aya_obj` is in
//! [`Object::parse`]: it reads the same object that aya has loaded and points it
//! at the maps that aya has made.

use std::{
    collections::HashSet,
    ffi::{CStr, CString, OsStr},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya::{Ebpf, maps::Map};
use aya_obj::generated::bpf_insn;
use thiserror::Error;

/// `expected_attach_type` of a program, and type of its links
/// (`include/uapi/linux/bpf.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    /// `BPF_TRACE_UPROBE_MULTI`, Linux 6.6.
    Multi = 48,
    /// `BPF_TRACE_UPROBE_SESSION`, Linux 6.13.
    Session = 57,
}

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

/// Why a program could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The object cannot be read, or does not fit its maps.
    #[error("the BPF object does not fit: {0}")]
    Object(String),
    /// The kernel refused it.
    #[error("{source}{log}")]
    Refused {
        /// The verifier's words, after a newline; empty if it had none.
        log: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// `union bpf_attr` of `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

const _: () = assert!(size_of::<ProgLoad>() == 72);

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

const BPF_PROG_LOAD: u32 = 5;
const BPF_LINK_CREATE: u32 = 28;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;
/// The kernel's own limit of a log (`kernel/bpf/verifier.c`) is far above.
const LOG_BYTES: usize = 1 << 20;

/// bpf(2) with a command that makes a file descriptor.
fn bpf<T>(command: u32, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is as long as said, and the kernel reads it only; what it
    // points to is alive in the callers, who borrow it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An address for the kernel.
fn address<T>(pointer: *const T) -> u64 {
    pointer.addr() as u64
}

/// A length for the kernel.
fn length(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}

/// The object's programs, ready to be loaded.
#[derive(Debug)]
pub struct Object(aya_obj::Object);

impl Object {
    /// Reads the object and points its programs at the maps of `ebpf`, which was
    /// loaded from it and still holds them all.
    ///
    /// # Errors
    ///
    /// [`LoadError::Object`].
    pub fn parse(data: &[u8], ebpf: &Ebpf) -> Result<Self, LoadError> {
        let misfit = |error: &dyn std::fmt::Display| LoadError::Object(error.to_string());
        let mut object = aya_obj::Object::parse(data).map_err(|error| misfit(&error))?;
        let text_sections: HashSet<usize> = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .collect();
        let maps: Vec<(String, RawFd, aya_obj::Map)> = object
            .maps
            .iter()
            .map(|(name, map)| {
                let fd = ebpf
                    .map(name)
                    .and_then(map_fd)
                    .ok_or_else(|| LoadError::Object(format!("no map `{name}`")))?;
                Ok((name.clone(), fd.as_raw_fd(), map.clone()))
            })
            .collect::<Result<_, LoadError>>()?;
        object
            .relocate_maps(
                maps.iter().map(|(name, fd, map)| (name.as_str(), *fd, map)),
                &text_sections,
            )
            .map_err(|error| misfit(&error))?;
        object
            .relocate_calls(&text_sections)
            .map_err(|error| misfit(&error))?;
        Ok(Self(object))
    }

    /// Loads one of its programs.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn load(&self, name: &str, attach_type: AttachType) -> Result<OwnedFd, LoadError> {
        let absent = || LoadError::Object(format!("no program `{name}`"));
        let program = self.0.programs.get(name).ok_or_else(absent)?;
        let function = self
            .0
            .functions
            .get(&program.function_key())
            .ok_or_else(absent)?;
        load(name, &function.instructions, &program.license, attach_type)
    }
}

/// The descriptor of a map of one of the types in use.
fn map_fd(map: &Map) -> Option<BorrowedFd<'_>> {
    let data = match map {
        Map::Array(data) | Map::HashMap(data) | Map::PerCpuArray(data) | Map::RingBuf(data) => data,
        _ => return None,
    };
    Some(data.fd().as_fd())
}

fn load(
    name: &str,
    instructions: &[bpf_insn],
    license: &CStr,
    attach_type: AttachType,
) -> Result<OwnedFd, LoadError> {
    let refused = |source| LoadError::Refused {
        log: String::new(),
        source,
    };
    let mut prog_name = [0; 16];
    for (to, from) in prog_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let mut attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_KPROBE,
        insn_cnt: length(instructions.len()).map_err(refused)?,
        insns: address(instructions.as_ptr()),
        license: address(license.as_ptr()),
        prog_name,
        expected_attach_type: attach_type as u32,
        ..ProgLoad::default()
    };
    let error = match bpf(BPF_PROG_LOAD, &attr) {
        Ok(fd) => return Ok(fd),
        Err(error) => error,
    };
    // Once more, for the verifier's reasons.
    let mut log = vec![0_u8; LOG_BYTES];
    attr.log_level = 1;
    attr.log_size = length(log.len()).map_err(refused)?;
    attr.log_buf = address(log.as_mut_ptr());
    match bpf(BPF_PROG_LOAD, &attr) {
        // The first time it was short of something, memory perhaps.
        Ok(fd) => Ok(fd),
        Err(_) => {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(0);
            let words = String::from_utf8_lossy(log.get(..end).unwrap_or_default()).into_owned();
            Err(LoadError::Refused {
                log: if words.is_empty() {
                    words
                } else {
                    format!("\n{words}")
                },
                source: error,
            })
        }
    }
}

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
    load("memprof_empty", &program, c"GPL", attach_type)
}

/// Attaches a program to places in a file, for the process `pid` alone. The link
/// lasts until the descriptor is closed.
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
