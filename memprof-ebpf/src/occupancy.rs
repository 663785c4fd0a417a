//! Where the live map has blocks: [`memprof_common::occupancy`].

use memprof_common::{live::LiveKey, occupancy::occupancy_place};

use crate::{atomic, maps::OCCUPANCY};

/// The count at a block's place.
#[inline(always)]
fn count(key: &LiveKey) -> Option<*mut u32> {
    let table = OCCUPANCY.get_ptr_mut(0)?;
    // SAFETY: a map value, and the place is in bounds.
    Some(unsafe { &raw mut (*table)[occupancy_place(key)] })
}

/// Whether the live map may have the block.
#[inline(always)]
pub(crate) fn may_have(key: &LiveKey) -> bool {
    // SAFETY: a map value. Whoever frees a block has been given it after it was
    // counted.
    count(key).is_none_or(|count| unsafe { count.read_volatile() } != 0)
}

/// Before a block goes into the live map.
#[inline(always)]
pub(crate) fn enter(key: &LiveKey) {
    if let Some(count) = count(key) {
        // SAFETY: a map value.
        unsafe { atomic::add_u32(count, 1) };
    }
}

/// After a block was taken out of the live map, or did not get in.
#[inline(always)]
pub(crate) fn leave(key: &LiveKey) {
    if let Some(count) = count(key) {
        // SAFETY: a map value.
        unsafe { atomic::add_u32(count, u32::MAX) };
    }
}
