//! The live map and its agreement with the daemon.
//!
//! The map is the truth: a block is in it from its sampled allocation to its
//! free, whether or not the ring had room for the events. The daemon reads it to
//! find out what the ring could not tell:
//!
//! - no room for the alloc event: the block is marked [`FLAG_UNSENT`]; the
//!   event is sent with the free, or the daemon finds the mark;
//! - no room for the free event: the block is gone from the map, and the daemon
//!   finds it missing.

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST};
use memprof_common::{
    counters::DropReason,
    live::{FLAG_RESTORED, FLAG_UNSENT, LiveKey, LiveValue, POOL_BLOCK},
};

use crate::{counters::count, emit, hit::Hit, maps::LIVE, occupancy};

/// Puts a block into the map; false if there is no room.
#[inline(always)]
fn put(key: &LiveKey, value: &LiveValue) -> bool {
    occupancy::enter(key);
    if LIVE.insert(key, value, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    // There already, if its free was missed; or the map is full. Counted it was
    // in the first case, and is not to be in the second.
    occupancy::leave(key);
    LIVE.insert(key, value, BPF_EXIST as u64).is_ok()
}

/// Adds a block and tells the daemon.
#[inline(always)]
pub(crate) fn insert(slot: u32, key: &LiveKey, value: &mut LiveValue) {
    let Some(event) = emit::reserve_alloc() else {
        value.flags |= FLAG_UNSENT;
        let reason = if put(key, value) {
            DropReason::AllocRingFull
        } else {
            DropReason::LiveMapFull
        };
        // Only now: the count makes the daemon read the map, and if nothing else
        // is lost it reads it once.
        count(slot, reason);
        return;
    };
    // The map first: an event for a block that is not in the map would never be
    // followed by its free.
    if !put(key, value) {
        event.discard(0);
        count(slot, DropReason::LiveMapFull);
        return;
    }
    emit::submit_alloc(event, key, value);
}

/// The block at `addr` that a function of an allocator is given. It may be one of a pool, if
/// the pool has its blocks from that allocator, one by one.
#[inline(always)]
pub(crate) fn key_of(hit: &Hit, addr: u64) -> LiveKey {
    let key = hit.live_key(addr);
    if hit.target.pools == 0 {
        return key;
    }
    let pooled = hit.live_key(addr | POOL_BLOCK);
    // The first block of a piece of memory is not given up before that is.
    if occupancy::may_have(&pooled) && LIVE.get_ptr(key).is_none() {
        return pooled;
    }
    key
}

/// Takes a block out and tells the daemon. None if it was never sampled; else
/// what the map held.
#[inline(always)]
pub(crate) fn remove(slot: u32, key: &LiveKey) -> Option<LiveValue> {
    if !occupancy::may_have(key) {
        return None;
    }
    // SAFETY: the value is only copied; if another thread frees the same block
    // at this moment, the removal below fails for one of the two.
    let mut value = *unsafe { LIVE.get(key) }?;
    if LIVE.remove(key).is_err() {
        return None;
    }
    occupancy::leave(key);
    if value.flags & FLAG_UNSENT != 0 {
        match emit::reserve_alloc() {
            Some(event) => {
                value.flags &= !FLAG_UNSENT;
                emit::submit_alloc(event, key, &value);
            }
            None => count(slot, DropReason::AllocUnreported),
        }
    }
    if !emit::free(key, value.timestamp_ns) {
        count(slot, DropReason::FreeRingFull);
    }
    Some(value)
}

/// Puts back a block that [`remove`] took, because it was not freed after all.
#[inline(always)]
pub(crate) fn restore(slot: u32, key: &LiveKey, value: &mut LiveValue) {
    // Unsent still: the daemon has never heard of it, so to it this is an
    // allocation like any other.
    if value.flags & FLAG_UNSENT == 0 {
        value.flags |= FLAG_RESTORED;
    }
    value.flags &= !FLAG_UNSENT;
    insert(slot, key, value);
}
