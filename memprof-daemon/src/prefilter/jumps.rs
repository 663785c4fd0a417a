//! Leads functions to their stubs, with all threads stopped and none in the way.

use std::{
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use memprof_common::prefilter::PRIVATE_ENABLED;

use super::{
    attach::{DataPlace, Grip, Image, Order, StoppedTime},
    detach,
    error::PrefilterError,
    moves, remote,
    step::{self, Step},
    stop::{Stopped, Thread},
    stop_error::StopError,
    tracer::Tracer,
    within::is_within,
};
use crate::process::{exit::ExitWatch, info::ProcessError};

/// From one try to stop the process where nobody is in the way to the next.
pub(super) const RETRY: Duration = Duration::from_millis(5);

/// Stops a process that may just have begun: a thread that its C library has not set up yet
/// is given the time for it.
pub(super) fn once_set_up(
    order: &Order<'_>,
    stop: impl Fn() -> Result<Stopped, StopError>,
) -> Result<Stopped, StopError> {
    loop {
        match stop() {
            Err(StopError::NoThreadPointer { .. })
                if order.grip == Grip::Seize && Instant::now() + RETRY < order.deadline =>
            {
                thread::sleep(RETRY);
            }
            stopped => return stopped,
        }
    }
}

/// Stopped, it cannot end and give its pid to another.
pub(super) fn require_alive(process: &ExitWatch) -> Result<(), PrefilterError> {
    if process.is_alive().unwrap_or(true) {
        Ok(())
    } else {
        let pid = process.pid();
        Err(ProcessError::NotFound { pid }.into())
    }
}

/// With all threads stopped and none in the way, leads the functions to the stubs, and
/// switches those on.
pub(super) fn write_jumps(
    tracer: &Tracer,
    order: &Order<'_>,
    image: &Image,
    stopped_time: &mut StoppedTime,
) -> Result<(), PrefilterError> {
    let pid = order.process.pid();
    let displaced: Vec<Range<u64>> = image
        .patches
        .iter()
        .map(|patch| patch.address..patch.address + patch.original.len() as u64)
        .collect();
    loop {
        let mut stopped = once_set_up(order, || order.grip.all(tracer, pid, order.deadline))?;
        let written = require_alive(order.process)
            .and_then(|()| write_where_nobody_is(&mut stopped, image, &displaced));
        stopped_time.add(stopped.release()?);
        match written {
            Ok(true) => return Ok(()),
            // Somebody is in the way.
            Ok(false) | Err(PrefilterError::Stop(StopError::InTheWay { .. })) => {}
            Err(error) => return Err(error),
        }
        if Instant::now() + RETRY >= order.deadline || order.grip == Grip::Held {
            return Err(PrefilterError::Busy);
        }
        thread::sleep(RETRY);
    }
}

/// Leads threads out of the displaced instructions, and writes the jumps if none comes back
/// there.
fn write_where_nobody_is(
    stopped: &mut Stopped,
    image: &Image,
    displaced: &[Range<u64>],
) -> Result<bool, PrefilterError> {
    let goal = |place: u64| {
        is_within(displaced, place)
            .then(|| moves::into_image(&image.moves, place))
            .flatten()
    };
    let is_stuck = |thread: &Thread| {
        let place = thread.registers.rip;
        is_within(displaced, place) && goal(place).is_none()
    };
    stopped.let_run(is_stuck)?;
    if !detach::is_in(stopped, image) {
        // With the program that it was put into.
        return Err(PrefilterError::Stale);
    }
    if stopped.threads().any(&is_stuck) || stopped.may_anyone_return(displaced)? {
        return Ok(false);
    }
    let moved = stopped.move_threads(goal)?;
    let written = write_all(stopped, image);
    if written.is_err() {
        stopped.move_back(moved)?;
    }
    written.map(|()| true)
}

/// In the order of the patches: what gives blocks up first. All or none.
fn write_all(stopped: &Stopped, image: &Image) -> Result<(), PrefilterError> {
    let mut written = Ok(());
    for (number, patch) in image.patches.iter().enumerate() {
        written = stopped
            .write_code(patch.address, &patch.original, &patch.jump)
            .map_err(PrefilterError::from);
        if written.is_err() {
            let done = image.patches.get(..number).unwrap_or_default();
            detach::restore(stopped, done)?;
            break;
        }
    }
    written?;
    if image.owns_data {
        let enabled = set_enabled(stopped, &image.data, true);
        if enabled.is_err() {
            detach::restore(stopped, &image.patches)?;
        }
        enabled?;
        step::done(Step::Enabled);
    }
    Ok(())
}

/// Switches the stubs on or off.
pub(super) fn set_enabled(
    stopped: &Stopped,
    data: &DataPlace,
    enabled: bool,
) -> Result<(), StopError> {
    let word = u64::from(enabled).to_ne_bytes();
    let tid = stopped.any_tid();
    remote::write(tid, data.private + PRIVATE_ENABLED as u64, &word)
        .map_err(|error| StopError::trace(stopped.pid(), tid, "write its memory", error))
}
