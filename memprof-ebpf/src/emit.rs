//! Events into the ring.

use aya_ebpf::maps::ring_buf::RingBufEntry;
use memprof_common::{
    events::{AllocEvent, COMM_BYTES, ExecEvent, FreeEvent, KIND_ALLOC, KIND_EXEC, KIND_FREE},
    live::{LiveKey, LiveValue},
};

use crate::maps::EVENTS;

/// Room for an alloc event, if there is any.
#[inline(always)]
pub(crate) fn reserve_alloc() -> Option<RingBufEntry<AllocEvent>> {
    EVENTS.reserve::<AllocEvent>(0)
}

/// Fills and sends an alloc event.
#[inline(always)]
pub(crate) fn submit_alloc(mut event: RingBufEntry<AllocEvent>, key: &LiveKey, value: &LiveValue) {
    event.write(AllocEvent {
        kind: KIND_ALLOC,
        reserved: 0,
        key: *key,
        value: *value,
    });
    event.submit(0);
}

/// Sends a free event; false if there is no room.
#[inline(always)]
pub(crate) fn free(key: &LiveKey, alloc_timestamp_ns: u64) -> bool {
    let Some(mut event) = EVENTS.reserve::<FreeEvent>(0) else {
        return false;
    };
    event.write(FreeEvent {
        kind: KIND_FREE,
        reserved: 0,
        key: *key,
        alloc_timestamp_ns,
    });
    event.submit(0);
    true
}

/// Sends an exec event; false if there is no room.
#[inline(always)]
pub(crate) fn exec(pid: u32, epoch: u32, by_other_thread: bool, comm: [u8; COMM_BYTES]) -> bool {
    let Some(mut event) = EVENTS.reserve::<ExecEvent>(0) else {
        return false;
    };
    event.write(ExecEvent {
        kind: KIND_EXEC,
        pid,
        epoch,
        by_other_thread: u32::from(by_other_thread),
        comm,
    });
    event.submit(0);
    true
}
