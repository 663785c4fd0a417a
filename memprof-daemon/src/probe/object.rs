//! Loading the object's probe programs.
//!
//! aya loads the object, its maps and its tracepoint programs. What it does not have is
//! done here: sessions, and maps within maps without type information. All that is
//! needed of `aya_obj` is in [`Object::parse`]: it reads the same object that aya has
//! loaded and points it at the maps that aya, or we, have made.

use std::{
    collections::HashSet,
    ffi::CStr,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use aya::{Ebpf, maps::Map};
use aya_obj::generated::bpf_insn;
use thiserror::Error;

use super::{
    function_types,
    syscall::{address, bpf, length},
};

/// `expected_attach_type` of a program, and type of its links
/// (`include/uapi/linux/bpf.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    /// By perf event: no type.
    Perf = 0,
    /// `BPF_TRACE_UPROBE_MULTI`, Linux 6.6.
    Multi = 48,
    /// `BPF_TRACE_UPROBE_SESSION`, Linux 6.13.
    Session = 57,
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
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
}

const _: () = assert!(size_of::<ProgLoad>() == 96);

const BPF_PROG_LOAD: u32 = 5;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
/// The kernel's own limit of a log (`kernel/bpf/verifier.c`) is far above.
const LOG_BYTES: usize = 1 << 20;

/// The object's programs, ready to be loaded.
pub struct Object {
    object: aya_obj::Object,
    btf: OwnedFd,
}

impl Object {
    /// Reads the object and points its programs at the maps of `ebpf`, which was
    /// loaded from it and still holds them all, or at those of `others` that are
    /// called the same.
    ///
    /// # Errors
    ///
    /// [`LoadError::Object`].
    pub fn parse(
        data: &[u8],
        ebpf: &Ebpf,
        others: &[(&str, BorrowedFd<'_>)],
    ) -> Result<Self, LoadError> {
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
                let fd = others
                    .iter()
                    .find(|(other, _)| other == name)
                    .map(|(_, fd)| *fd)
                    .or_else(|| ebpf.map(name).and_then(map_fd))
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
        let btf = function_types::load()
            .map_err(|error| LoadError::Object(format!("no types of functions: {error}")))?;
        Ok(Self { object, btf })
    }

    /// Loads one of its programs.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn load(&self, name: &str, attach_type: AttachType) -> Result<OwnedFd, LoadError> {
        let absent = || LoadError::Object(format!("no program `{name}`"));
        let program = self.object.programs.get(name).ok_or_else(absent)?;
        let function = self
            .object
            .functions
            .get(&program.function_key())
            .ok_or_else(absent)?;
        load(
            name,
            &function.instructions,
            &program.license,
            attach_type,
            Some(self.btf.as_fd()),
        )
    }
}

/// The descriptor of a map of one of the types in use.
pub(super) fn map_fd(map: &Map) -> Option<BorrowedFd<'_>> {
    let data = match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::PerCpuArray(data)
        | Map::Queue(data)
        | Map::ProgramArray(data)
        | Map::RingBuf(data) => data,
        _ => return None,
    };
    Some(data.fd().as_fd())
}

pub(super) fn load(
    name: &str,
    instructions: &[bpf_insn],
    license: &CStr,
    attach_type: AttachType,
    btf: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, LoadError> {
    let refused = |source| LoadError::Refused {
        log: String::new(),
        source,
    };
    let mut prog_name = [0; 16];
    for (to, from) in prog_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let functions = function_types::functions(instructions);
    let mut attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_KPROBE,
        insn_cnt: length(instructions.len()).map_err(refused)?,
        insns: address(instructions.as_ptr()),
        license: address(license.as_ptr()),
        prog_name,
        expected_attach_type: attach_type as u32,
        ..ProgLoad::default()
    };
    // Callbacks must have a type; kernels that lack them want none either.
    if let Some(btf) = btf.filter(|_| functions.len() > 1) {
        attr.prog_btf_fd = btf.as_raw_fd().cast_unsigned();
        attr.func_info_rec_size = size_of::<function_types::FunctionInfo>() as u32;
        attr.func_info = address(functions.as_ptr());
        attr.func_info_cnt = length(functions.len()).map_err(refused)?;
    }
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
