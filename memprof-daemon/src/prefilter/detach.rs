//! Takes the prefilter out of a process.
//!
//! The functions get their bytes back at once. The memory goes when no thread is within
//! it, nor will return to it.

use std::{
    fs,
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use super::{
    attach::{Grip, Image, StoppedTime},
    error::DetachError,
    image::{Patch, read_header},
    inject::InjectError,
    jumps::set_enabled,
    map::PAGE_BYTES,
    moves,
    occupants::{is_anyone_in, is_passing},
    remote,
    step::{self, Step},
    stop::Stopped,
    stop_error::StopError,
    tracer::Tracer,
};
use crate::process::exit::ExitWatch;

/// The first wait for threads to leave the stubs; it doubles up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LAST_RETRY: Duration = Duration::from_millis(100);

/// For unmapping what no thread has seen.
const UNMAP_LIMIT: Duration = Duration::from_secs(2);

/// Restores the functions of the process and unmaps `image`; tries until `deadline`.
/// A process that has ended is done with.
///
/// # Errors
///
/// [`DetachError`]; what could not be undone is still there.
pub fn detach(
    tracer: &Tracer,
    process: &ExitWatch,
    image: &Image,
    deadline: Instant,
) -> Result<StoppedTime, DetachError> {
    let pid = process.pid();
    let mut time = StoppedTime::default();
    let mut wait = FIRST_RETRY;
    let mut restored = false;
    if !is_there(pid, image) {
        return Ok(time);
    }
    loop {
        let mut stopped = match Stopped::all(tracer, pid, deadline) {
            Ok(stopped) => stopped,
            Err(_) if has_ended(process) => return Ok(time),
            // A debugger may go before the time is over.
            Err(StopError::Traced { .. }) if Instant::now() + wait < deadline => {
                thread::sleep(wait);
                wait = (2 * wait).min(LAST_RETRY);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if has_ended(process) || !is_there(pid, image) {
            stopped.release()?;
            return Ok(time);
        }
        let gone = undo(&mut stopped, image, &mut restored);
        time.add(stopped.release()?);
        if gone? {
            return Ok(time);
        }
        if Instant::now() + wait >= deadline {
            return Err(switch_off(tracer, process, image));
        }
        thread::sleep(wait);
        wait = (2 * wait).min(LAST_RETRY);
    }
}

/// What stays is switched off.
fn switch_off(tracer: &Tracer, process: &ExitWatch, image: &Image) -> DetachError {
    // Zeros are off.
    if image.is_wiped {
        return DetachError::Busy;
    }
    let switched_off = Stopped::all(tracer, process.pid(), Instant::now()).and_then(|stopped| {
        if is_in(&stopped, image) && !has_ended(process) {
            set_enabled(&stopped, &image.data, false)?;
        }
        stopped.release()
    });
    match switched_off {
        Ok(_) => DetachError::Busy,
        Err(error) => error.into(),
    }
}

/// Does what can be done now; whether that was all.
fn undo(stopped: &mut Stopped, image: &Image, restored: &mut bool) -> Result<bool, DetachError> {
    let mut is_original = false;
    if !*restored {
        is_original = restore(stopped, &image.patches)?;
        step::done(Step::Restored);
        *restored = true;
    }
    if is_original {
        // Else the text may have got another jump since, in the midst of which they would be.
        stopped.move_threads(|place| moves::into_text(&image.moves, place))?;
    }
    // Nothing leads to the stubs any more, and they are soon passed through. They are not
    // switched off: the ends of the calls that they follow are to be told, too.
    let maps = stopped.maps()?;
    let ran = match stopped.let_run(|thread| is_passing(image, &maps, thread)) {
        Err(StopError::InTheWay { .. }) => return Ok(false),
        ran => ran?,
    };
    if ran && !is_in(stopped, image) {
        // One has replaced the program.
        return Ok(true);
    }
    if is_anyone_in(stopped, image)? {
        return Ok(false);
    }
    unmap_in(stopped, image)?;
    Ok(true)
}

/// Whether the image is in a process that stands still.
pub(super) fn is_in(stopped: &Stopped, image: &Image) -> bool {
    let mut ranges = image.code.iter();
    ranges.any(|range| is_image_of(stopped.any_tid(), range, image))
}

fn is_image_of(tid: u32, range: &Range<u64>, image: &Image) -> bool {
    let mut header = vec![0; PAGE_BYTES as usize];
    remote::read(tid, range.start, &mut header).is_ok()
        && read_header(&header).is_ok_and(|header| header.data == image.data.range)
}

/// Not if the process has replaced its program.
fn is_there(pid: u32, image: &Image) -> bool {
    // Any thread: the first may have ended before the others.
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let mut threads = threads.into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.parse::<u32>().ok()
    });
    threads.any(|tid| {
        let mut ranges = image.code.iter();
        ranges.any(|range| is_image_of(tid, range, image))
    })
}

fn has_ended(process: &ExitWatch) -> bool {
    !process.is_alive().unwrap_or(true)
}

/// Writes the original bytes back, unless somebody else has written there since: what
/// allocates first, so that no sampled block's free is missed. Whether all have them.
pub(super) fn restore(stopped: &Stopped, patches: &[Patch]) -> Result<bool, StopError> {
    let mut is_original = true;
    for patch in patches.iter().rev() {
        let mut bytes = [0; 5];
        stopped.read(patch.address, &mut bytes)?;
        if bytes == patch.jump {
            stopped.write_code(patch.address, &patch.jump, &patch.original)?;
        } else {
            is_original &= bytes == patch.original;
        }
    }
    Ok(is_original)
}

/// The data first, in one call: its private part has no name to be known by. What may be
/// left behind it by a daemon that dies now is known by its name.
fn unmap_in(stopped: &mut Stopped, image: &Image) -> Result<(), InjectError> {
    let data = image.owns_data.then(|| image.data.range.clone());
    let ranges: Vec<Range<u64>> = data.into_iter().chain(image.code.iter().cloned()).collect();
    unmap_ranges(stopped, &ranges)
}

/// Unmaps `ranges`, in their order.
pub(super) fn unmap_ranges(
    stopped: &mut Stopped,
    ranges: &[Range<u64>],
) -> Result<(), InjectError> {
    stopped.inject(|calls| {
        for range in ranges {
            let length = range.end - range.start;
            calls.call(libc::SYS_munmap, [range.start, length, 0, 0, 0, 0])?;
            step::done(Step::Unmapped);
        }
        Ok(())
    })
}

/// Unmaps an image that no function leads to.
pub(super) fn unmap(
    tracer: &Tracer,
    process: &ExitWatch,
    grip: Grip,
    image: &Image,
) -> Result<(), DetachError> {
    let pid = process.pid();
    let deadline = Instant::now() + UNMAP_LIMIT;
    if has_ended(process) {
        return Ok(());
    }
    let mut stopped = match grip.all(tracer, pid, deadline) {
        Err(_) if has_ended(process) => return Ok(()),
        stopped => stopped?,
    };
    // Gone with the program, if that was replaced.
    let unmapped = if is_in(&stopped, image) {
        unmap_in(&mut stopped, image)
    } else {
        Ok(())
    };
    stopped.release()?;
    Ok(unmapped?)
}
