//! Shards of threads that have ended, for threads to come.
//!
//! A thread takes a shard at its first call, and nobody notices its end. A program that starts
//! a thread for each connection may come to have all of them taken. Then calls are not counted,
//! which the stubs tell; and that is when the process is stopped, and what belongs to none of
//! its threads is given back.
//!
//! A shard is known by its owner's thread pointer, and so are threads. What has none of a
//! thread's is marked as given back ([`OWNER_GONE`]), not as never taken: a thread searches for
//! its own from its home on until the first that was never taken, and must find it wherever it
//! stands in that search. So it does not matter what the threads are at. What the shard has
//! counted stays there: the totals are sums over all.
//!
//! ```text
//!             home of c
//!                 │
//!   ... │ 0 │ a │ b │ c │ 0 │ ...     b ends
//!   ... │ 0 │ a │ 1 │ c │ 0 │ ...     c goes past it; d, at home there, takes it
//!   ... │ 0 │ a │ d │ c │ 0 │ ...
//! ```

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use memprof_common::prefilter::OWNER_GONE;

use super::{
    attach::{Image, StoppedTime},
    detach::is_in,
    halt::living_thread,
    remote,
    step::{self, Step},
    stop::Stopped,
    stop_error::StopError,
    tracer::Tracer,
};
use crate::process::exit::ExitWatch;

/// From one stop to the next, if the shards are not taken again at once, and at most.
const SHORTEST_WAIT: Duration = Duration::from_secs(10);
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GivenBack {
    /// How many shards.
    pub shards: u64,
    /// How long the process stood still.
    pub stopped: StoppedTime,
}

/// Gives back the shards of threads that have ended. None if the image is not in the process any
/// more.
///
/// # Errors
///
/// [`StopError`]; what is given back by then stays so.
pub fn give_back(
    tracer: &Tracer,
    process: &ExitWatch,
    image: &Image,
) -> Result<GivenBack, StopError> {
    let pid = process.pid();
    // A child's are zeros, and nothing of its is counted.
    if image.is_wiped {
        return Ok(GivenBack::default());
    }
    // Before the stop, so that it is short: an owner stays the same until this changes it.
    let owners = owners(pid, image)?;
    // Not for long: a thread that cannot be stopped now is for another time.
    let stopped = Stopped::all(tracer, pid, Instant::now())?;
    let shards = if process.is_alive().unwrap_or(true) && is_in(&stopped, image) {
        mark_ended(&stopped, &owners)
    } else {
        Ok(0)
    };
    let mut time = StoppedTime::default();
    time.add(stopped.release()?);
    Ok(GivenBack {
        shards: shards?,
        stopped: time,
    })
}

/// Where the owner of a shard is, and who that is.
type Owner = (u64, u64);

/// The shards that have an owner.
fn owners(pid: u32, image: &Image) -> Result<Vec<Owner>, StopError> {
    let tid = living_thread(pid)?;
    let shards = 0..image.data.geometry.shards as usize;
    let places: Vec<u64> = shards.map(|shard| image.data.owner_at(shard)).collect();
    let owners = remote::read_words(tid, &places)
        .map_err(|error| StopError::trace(pid, tid, "read its memory", error))?;
    let owned = places.into_iter().zip(owners);
    Ok(owned
        .filter(|&(_, owner)| owner != 0 && owner != OWNER_GONE)
        .collect())
}

/// Marks those whose owner is no thread of the process.
fn mark_ended(stopped: &Stopped, owners: &[Owner]) -> Result<u64, StopError> {
    let living = stopped.threads().map(|thread| thread.registers.fs_base);
    let ended = of_none(owners, &living.collect());
    let tid = stopped.any_tid();
    // In no call: a thread at home there would take the shard of one with its pointer for its own.
    remote::write_pairs(tid, &ended, [OWNER_GONE, 0])
        .map_err(|error| StopError::trace(stopped.pid(), tid, "write its memory", error))?;
    step::done(Step::ShardsGivenBack);
    Ok(ended.len() as u64)
}

fn of_none(owners: &[Owner], living: &HashSet<u64>) -> Vec<u64> {
    let ended = owners.iter().filter(|(_, owner)| !living.contains(owner));
    ended.map(|&(place, _)| place).collect()
}

/// When to look for such shards: as soon as calls are not counted, but less and less often if
/// that does not help for long. A stop has the time-outs of some calls begin anew, which must
/// come to their end nevertheless.
#[derive(Debug)]
pub struct Pace {
    /// Calls that were not counted, when that was last looked after.
    seen: u64,
    last: Option<Instant>,
    wait: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            seen: 0,
            last: None,
            wait: SHORTEST_WAIT,
        }
    }
}

impl Pace {
    /// Whether it is time, given how many calls were not counted so far. If so, the next one
    /// waits.
    pub fn is_due(&mut self, unsharded: u64, now: Instant) -> bool {
        if unsharded == self.seen {
            return false;
        }
        if let Some(last) = self.last {
            let since = now.saturating_duration_since(last);
            if since < self.wait {
                return false;
            }
            self.wait = if since < 2 * self.wait {
                (2 * self.wait).min(LONGEST_WAIT)
            } else {
                SHORTEST_WAIT
            };
        }
        self.last = Some(now);
        self.seen = unsharded;
        true
    }
}

#[cfg(test)]
#[path = "reclaim_tests.rs"]
mod tests;
