//! Why the prefilter is not in a process, or not out of it.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::{hooks::HookError, image::ImageError, inject::InjectError, stop_error::StopError};
use crate::{probe::attach::AttachError, process::info::ProcessError};

/// Why a process does not get the prefilter. It is as it was before.
#[derive(Debug, Error)]
pub enum PrefilterError {
    /// The stubs find a size's class by an instruction of newer processors.
    #[error("this processor has no LZCNT instruction")]
    NoLzcnt,
    /// Nobody stops himself.
    #[error("memprof does not stop itself")]
    Myself,
    /// A tracer has it.
    #[error("it is traced by {name} (pid {pid})")]
    Traced {
        /// The tracer's name.
        name: String,
        /// The tracer's pid.
        pid: u32,
    },
    /// The command cannot be made to do calls where it is held.
    #[error("the command begins as no program of a known C library does")]
    UnknownStart,
    /// Functions are to be traced that the prefilter has no stubs for.
    #[error("functions named by --function are traced by uprobes: {0}")]
    Pools(String),
    /// A function cannot be hooked.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// No code of its allocators is mapped.
    #[error("its allocator is not mapped any more")]
    NotMapped,
    /// The memory around an allocator is full.
    #[error("no memory is free within 2 GiB of {}", module.display())]
    NoPlace {
        /// The file.
        module: PathBuf,
    },
    /// Some thread was always there.
    #[error("threads were within the first instructions of its allocator all the time")]
    Busy,
    /// What was planned is not for the program that is there, or not for its memory as it is.
    #[error("its program was replaced, or its memory changed, again and again meanwhile")]
    Stale,
    /// The process could not be stopped.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// It could not be made to do calls.
    #[error("cannot have it map memory: {0}")]
    Inject(#[from] InjectError),
    /// The stubs could not be put together.
    #[error("cannot make its stubs: {0}")]
    Image(#[from] ImageError),
    /// Something of ours failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The sites could not be probed.
    #[error("cannot probe its stubs: {0}")]
    Sites(#[source] AttachError),
    /// About the process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Of ours, to do it.
    #[error("no thread is left to stop it, or it has ended")]
    NoThread,
}

impl PrefilterError {
    /// Of a call of ours.
    pub(super) fn io(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// Why an image is still, or still partly, in a process.
#[derive(Debug, Error)]
pub enum DetachError {
    /// Somebody uses it.
    #[error("another memprof uses it")]
    InUse,
    /// Threads were within it all the time: it is switched off, and mapped.
    #[error("threads were within it all the time; it is switched off, and its memory stays mapped")]
    Busy,
    /// What is there makes no sense.
    #[error("its memory is not as memprof makes it: {0}")]
    Malformed(&'static str),
    /// The process could not be stopped.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// It could not be made to do calls.
    #[error("cannot have the process unmap it: {0}")]
    Inject(#[from] InjectError),
    /// Something of ours failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// About the process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}
