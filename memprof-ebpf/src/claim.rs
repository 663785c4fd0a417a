//! Whose call it is, where a probe is every process's.
//!
//! A process that is met for the first time takes a slot of those that the daemon has made
//! ready. The daemon would be too late: a program of a few milliseconds would be over before
//! it heard of it.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_comm, bpf_get_current_pid_tgid},
};
use memprof_common::{config::NO_SLOT, events::COMM_BYTES};

use crate::{
    atomic, emit,
    maps::{FREE_SLOTS, SLOTS, UNCLAIMED_CALLS},
};

/// The current process.
#[inline(always)]
pub(crate) fn current_process() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// The slot of a process, which is the current one; none if it is to be left alone.
#[inline(always)]
pub(crate) fn slot_of(process: u32) -> Option<u32> {
    // SAFETY: a number, which is copied. The daemon removes it when the process is gone, and
    // changes it to the one that stands for none.
    let slot = match unsafe { SLOTS.get(process) } {
        Some(&slot) => slot,
        None => claim(process),
    };
    (slot != NO_SLOT).then_some(slot)
}

/// Takes a free slot for the current process.
#[inline(always)]
fn claim(process: u32) -> u32 {
    let Ok(Some(slot)) = FREE_SLOTS.pop() else {
        count_unclaimed();
        return NO_SLOT;
    };
    // Room in the ring first: records are read in the order in which room for them was taken.
    // So this one is read before those of samples, which other threads may take from the
    // moment at which the slot is known.
    let Some(event) = emit::reserve_claim() else {
        give_back(slot);
        count_unclaimed();
        return NO_SLOT;
    };
    if SLOTS.insert(process, slot, BPF_NOEXIST as u64).is_err() {
        event.discard(0);
        give_back(slot);
        // Another thread was first; or there is no memory.
        // SAFETY: as in `slot_of`.
        return match unsafe { SLOTS.get(process) } {
            Some(&slot) => slot,
            None => {
                count_unclaimed();
                NO_SLOT
            }
        };
    }
    let comm = bpf_get_current_comm().unwrap_or([0; COMM_BYTES]);
    emit::submit_claim(event, process, slot, comm);
    slot
}

/// There is room: the slot came from there.
#[inline(always)]
fn give_back(slot: u32) {
    let _ = FREE_SLOTS.push(slot, 0);
}

#[inline(always)]
fn count_unclaimed() {
    if let Some(calls) = UNCLAIMED_CALLS.get_ptr_mut(0) {
        // SAFETY: the pointer is to a map value.
        unsafe { atomic::add(calls, 1) };
    }
}
