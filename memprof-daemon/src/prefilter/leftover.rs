//! What an earlier memprof has left: it was killed, or the process is a forked child of one
//! that was traced.
//!
//! An image is harmless: without a daemon it falls asleep, and a child's is switched off. But
//! a uprobe on a function that jumps into it would execute the file's instruction and go on
//! in the middle of the jump. So nothing else is attached before it is gone.
//!
//! A daemon that was killed amid its calls may have left parts that no code leads to yet: all
//! of them have the file's name (`map.rs` sees to it), and so has the descriptor.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    path::Path,
    time::Instant,
};

use memprof_common::prefilter::PRIVATE_ENABLED;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{
    attach::{DataPlace, Image, StoppedTime},
    detach::{detach, unmap_ranges},
    error::DetachError,
    header::ImageHeader,
    image::read_header,
    map::{FILE_NAME, PAGE_BYTES},
    stop::Stopped,
    tracer::Tracer,
};
use crate::process::{
    exit::ExitWatch,
    maps::{MapsEntry, read_maps, split_deleted},
};

/// What is in a process.
#[derive(Debug)]
pub struct Leftover {
    /// Code, and what belongs to it.
    image: Option<Image>,
    /// Mappings that no code belongs to.
    loose: Vec<Range<u64>>,
    /// Descriptors of the memory file.
    files: Vec<u64>,
    /// The daemon that has made it lives, and it is not a forked child's copy.
    pub in_use: bool,
}

impl Leftover {
    /// How many functions may lead to it.
    #[must_use]
    pub fn functions(&self) -> usize {
        self.image.as_ref().map_or(0, |image| image.patches.len())
    }
}

/// What is in a process, if there is something.
///
/// # Errors
///
/// [`DetachError`]: the process is gone, or the memory is not as memprof makes it.
pub fn find(pid: u32) -> Result<Option<Leftover>, DetachError> {
    let maps = read_maps(pid)?;
    let ours: Vec<&MapsEntry> = maps.iter().filter(|entry| is_ours(entry)).collect();
    let files = descriptors(pid);
    let Some(mapped) = ours.first() else {
        return only_files(pid, files);
    };
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(io("open its memory"))?;
    let mut image: Option<Image> = None;
    for entry in ours.iter().filter(|entry| entry.executable) {
        let header = header_of(&memory, entry)?;
        let data = data_of(&header, &maps)?;
        let later = Image::new(
            data.place,
            data.is_there,
            std::iter::once(entry.start.0..entry.end.0).collect(),
            header.patches,
        );
        match &mut image {
            None => image = Some(later),
            Some(image) if image.data == later.data => image.absorb(later),
            Some(_) => return Err(DetachError::Malformed("it has two parts of data")),
        }
    }
    let path = format!(
        "/proc/{pid}/map_files/{:x}-{:x}",
        mapped.start.0, mapped.end.0
    );
    let is_locked = is_locked(&path)?;
    let Some(mut image) = image else {
        return Ok(Some(Leftover {
            image: None,
            loose: ours.iter().map(|entry| range(entry)).collect(),
            files,
            in_use: is_locked,
        }));
    };
    let data = image.owns_data.then_some(&image.data.range);
    let belongs = |part: &Range<u64>| {
        image.code.contains(part) || data.is_some_and(|data| data.contains(&part.start))
    };
    let parts = ours.iter().map(|entry| range(entry));
    let loose = parts.filter(|part| !belongs(part)).collect();
    let mut enabled = [0; 8];
    // Not there if the daemon was killed before it was mapped, or after it was unmapped.
    let at = image.data.private + PRIVATE_ENABLED as u64;
    let is_enabled = image.owns_data
        && maps
            .iter()
            .any(|entry| entry.start.0 == image.data.private && !is_ours(entry))
        && memory.read_exact_at(&mut enabled, at).is_ok()
        && enabled != [0; 8];
    image.is_wiped = !is_enabled;
    Ok(Some(Leftover {
        image: Some(image),
        loose,
        files,
        in_use: is_enabled && is_locked,
    }))
}

/// A descriptor alone is in nobody's way: a child may have one, forked while the daemon had
/// its parent make the file.
fn only_files(pid: u32, files: Vec<u64>) -> Result<Option<Leftover>, DetachError> {
    let Some(file) = files.first() else {
        return Ok(None);
    };
    if is_locked(&format!("/proc/{pid}/fd/{file}"))? {
        return Ok(None);
    }
    Ok(Some(Leftover {
        image: None,
        loose: Vec::new(),
        files,
        in_use: false,
    }))
}

/// Takes out what nobody uses.
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
    let mut time = StoppedTime::default();
    if let Some(image) = &leftover.image {
        time.join(detach(tracer, process, image, deadline)?);
    }
    let is_done = leftover.loose.is_empty() && leftover.files.is_empty();
    if is_done || !process.is_alive().unwrap_or(true) {
        return Ok(time);
    }
    let pid = process.pid();
    let mut stopped = Stopped::all(tracer, pid, deadline)?;
    let removed = remove_parts(&mut stopped, leftover);
    time.add(stopped.release()?);
    removed.map(|()| time)
}

/// What is still there, now that nobody can change it.
fn remove_parts(stopped: &mut Stopped, leftover: &Leftover) -> Result<(), DetachError> {
    let maps = stopped.maps()?;
    let loose: Vec<Range<u64>> = maps
        .iter()
        .filter(|entry| is_ours(entry))
        .map(range)
        .filter(|range| leftover.loose.contains(range))
        .collect();
    let files: Vec<u64> = descriptors(stopped.pid())
        .into_iter()
        .filter(|file| leftover.files.contains(file))
        .collect();
    unmap_ranges(stopped, &loose)?;
    stopped.inject(|calls| {
        for &file in &files {
            calls.call(libc::SYS_close, [file, 0, 0, 0, 0, 0])?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Whether it is a part of the prefilter.
#[must_use]
pub fn is_ours(entry: &MapsEntry) -> bool {
    entry.path.as_os_str().as_bytes() == FILE_NAME.as_bytes()
}

fn range(entry: &MapsEntry) -> Range<u64> {
    entry.start.0..entry.end.0
}

/// The process's descriptors of a memory file of ours.
fn descriptors(pid: u32) -> Vec<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let entries = entries.into_iter().flatten().flatten();
    let ours = entries.filter(|entry| {
        let file = fs::read_link(entry.path()).unwrap_or_default();
        split_deleted(file.as_os_str().as_bytes()).0 == FILE_NAME.as_bytes()
    });
    ours.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
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

/// Where the data is, and whether it is there.
struct Data {
    place: DataPlace,
    is_there: bool,
}

/// The process can have written anything into its own memory: what is unmapped must be
/// ours by the kernel's word.
fn data_of(header: &ImageHeader, maps: &[MapsEntry]) -> Result<Data, DetachError> {
    let (shared_bytes, private_bytes) = (
        header.geometry.shared_bytes() as u64,
        header.geometry.private_bytes() as u64,
    );
    let private = header.data.start.saturating_add(shared_bytes);
    if private.saturating_add(private_bytes) != header.data.end {
        return Err(DetachError::Malformed("its data is not as long as it says"));
    }
    let place = DataPlace {
        range: header.data.clone(),
        private,
        geometry: header.geometry,
    };
    let shared = maps.iter().find(|entry| entry.start.0 == header.data.start);
    let Some(shared) = shared.filter(|entry| is_ours(entry)) else {
        // It is unmapped before the code.
        let is_there = false;
        return Ok(Data { place, is_there });
    };
    // The file's too, as long as it is only reserved. Memory of the program's may have come to
    // be behind it, of the same kind: the kernel shows that as one.
    let is_behind = maps.iter().any(|entry| {
        entry.start.0 == private
            && entry.end.0 >= header.data.end
            && (is_ours(entry) || !entry.is_file())
    });
    if shared.end.0 != private || !is_behind {
        return Err(DetachError::Malformed("its data is not where it says"));
    }
    let is_there = true;
    Ok(Data { place, is_there })
}

/// Whether a living daemon holds the file: it has locked it.
fn is_locked(path: &str) -> Result<bool, DetachError> {
    let file = File::open(Path::new(path)).map_err(io("open its memory file"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(io("lock its memory file")(error.into())),
    }
}
