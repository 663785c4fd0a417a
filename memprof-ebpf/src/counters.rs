//! Losses, counted by cause for each target.

use memprof_common::counters::DropReason;

use crate::{atomic, maps::COUNTERS};

/// Counts one loss of the target in `slot`. Not on any path that loses nothing.
#[inline(always)]
pub(crate) fn count(slot: u32, reason: DropReason) {
    if let Some(counters) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: the pointer is to a map value, and `DropReason` is an index
        // within `dropped`. Atomic, since a task that preempts this one on the
        // same CPU counts in the same word.
        unsafe { atomic::add(&raw mut (*counters).dropped[reason as usize], 1) };
    }
}
