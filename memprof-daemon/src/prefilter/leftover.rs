//! Images that an earlier memprof has left: it was killed, or the process is a forked
//! child of one that was traced.
//!
//! Such an image is harmless: without a daemon it falls asleep, and a child's is switched
//! off. But a uprobe on a function that jumps into it would execute the file's instruction
//! and go on in the middle of the jump. So nothing else is attached before it is gone.

use std::{
    fs::File,
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    time::Instant,
};

use memprof_common::prefilter::PRIVATE_ENABLED;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{
    attach::{DataPlace, Image, StoppedTime},
    detach::detach,
    error::DetachError,
    header::ImageHeader,
    image::read_header,
    map::{FILE_NAME, PAGE_BYTES},
    tracer::Tracer,
};
use crate::process::{
    exit::ExitWatch,
    maps::{MapsEntry, read_maps},
};

/// An image that is mapped into a process.
#[derive(Debug)]
pub struct Leftover {
    image: Image,
    /// Its stubs are switched on, and the daemon that has made it lives.
    pub in_use: bool,
}

impl Leftover {
    /// Where its data is: images with the same are one engine's.
    #[must_use]
    pub fn functions(&self) -> usize {
        self.image.patches.len()
    }
}

/// The image in a process, if there is one.
///
/// # Errors
///
/// [`DetachError`]: the process is gone, or the memory is not as memprof makes it.
pub fn find(pid: u32) -> Result<Option<Leftover>, DetachError> {
    let maps = read_maps(pid)?;
    let ours: Vec<&MapsEntry> = maps
        .iter()
        .filter(|entry| entry.path.as_os_str().as_bytes() == FILE_NAME.as_bytes())
        .collect();
    if ours.is_empty() {
        return Ok(None);
    }
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(io("open its memory"))?;
    let mut image: Option<Image> = None;
    for entry in ours.iter().filter(|entry| entry.executable) {
        let header = header_of(&memory, entry)?;
        let data = data_of(&header, &maps)?;
        let later = Image::new(
            data,
            true,
            std::iter::once(entry.start.0..entry.end.0).collect(),
            header.patches,
        );
        match &mut image {
            None => image = Some(later),
            Some(image) if image.data == later.data => image.absorb(later),
            Some(_) => return Err(DetachError::Malformed("it has two parts of data")),
        }
    }
    let Some(mut image) = image else {
        // The daemon was killed before it had mapped code; or somebody else's file.
        return Err(DetachError::Malformed("data is mapped, and no code"));
    };
    let mut enabled = [0; 8];
    memory
        .read_exact_at(&mut enabled, image.data.private + PRIVATE_ENABLED as u64)
        .map_err(io("read its memory"))?;
    image.is_wiped = enabled == [0; 8];
    let in_use = enabled != [0; 8] && is_locked(pid, &ours)?;
    Ok(Some(Leftover { image, in_use }))
}

/// Takes an image out that nobody uses.
///
/// # Errors
///
/// [`DetachError`].
pub fn remove(
    tracer: &Tracer,
    process: &ExitWatch,
    leftover: &Leftover,
    deadline: Instant,
) -> Result<StoppedTime, DetachError> {
    if leftover.in_use {
        return Err(DetachError::InUse);
    }
    detach(tracer, process, &leftover.image, deadline)
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> DetachError {
    move |source| DetachError::Io { what, source }
}

fn header_of(memory: &File, entry: &MapsEntry) -> Result<ImageHeader, DetachError> {
    // The whole image: a header says how long it is.
    let length = (entry.end.0 - entry.start.0).min(16 * PAGE_BYTES);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    memory
        .read_exact_at(&mut bytes, entry.start.0)
        .map_err(io("read its memory"))?;
    let header = read_header(&bytes).map_err(|_| DetachError::Malformed("its header is none"))?;
    if header.code.start != entry.start.0 {
        return Err(DetachError::Malformed("its header is another image's"));
    }
    Ok(header)
}

/// The process can have written anything into its own memory: what is unmapped must be
/// ours by the kernel's word.
fn data_of(header: &ImageHeader, maps: &[MapsEntry]) -> Result<DataPlace, DetachError> {
    let shared = maps
        .iter()
        .find(|entry| entry.start.0 == header.data.start)
        .filter(|entry| entry.path.as_os_str().as_bytes() == FILE_NAME.as_bytes())
        .ok_or(DetachError::Malformed("its data is not where it says"))?;
    let private = maps
        .iter()
        .find(|entry| entry.start == shared.end)
        .filter(|entry| !entry.is_file() && entry.end.0 == header.data.end)
        .ok_or(DetachError::Malformed("its data is not as long as it says"))?;
    Ok(DataPlace {
        range: header.data.clone(),
        private: private.start.0,
        geometry: header.geometry,
    })
}

/// Whether a living daemon holds the file: it has locked it.
fn is_locked(pid: u32, ours: &[&MapsEntry]) -> Result<bool, DetachError> {
    let Some(entry) = ours.first() else {
        return Ok(false);
    };
    let path = format!(
        "/proc/{pid}/map_files/{:x}-{:x}",
        entry.start.0, entry.end.0
    );
    let file = File::open(path).map_err(io("open its memory file"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(io("lock its memory file")(error.into())),
    }
}
