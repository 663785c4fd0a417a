//! Events into the ring.

use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{bpf_get_current_pid_tgid, generated::bpf_ktime_get_ns},
    maps::ring_buf::RingBufEntry,
};
use memprof_common::{
    events::{
        AllocEvent, COMM_BYTES, ClaimEvent, ExecEvent, FreeEvent, KIND_ALLOC, KIND_CLAIM,
        KIND_EXEC, KIND_FREE, KIND_UNKNOWN_CODE, UnknownCodeEvent,
    },
    live::{LiveKey, LiveValue},
};

use crate::{hit::Hit, maps::EVENTS};

/// How full the ring is, in bytes, when its reader is woken. Set by the loader; a constant
/// to the verifier.
#[unsafe(no_mangle)]
static WAKE_BYTES: u64 = 0;

/// How to send what the daemon must act on at once.
const URGENT: u64 = BPF_RB_FORCE_WAKEUP as u64;

/// How to send what can wait: the reader comes by itself, a few times a second, and is woken
/// only if the ring might be full by then. A wake-up for each event would be most of what a
/// sample costs its thread.
#[inline(always)]
fn unhurried() -> u64 {
    // SAFETY: a valid static; volatile, since the loader changes it.
    let wake_bytes = unsafe { (&raw const WAKE_BYTES).read_volatile() };
    if EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) >= wake_bytes {
        u64::from(BPF_RB_FORCE_WAKEUP)
    } else {
        u64::from(BPF_RB_NO_WAKEUP)
    }
}

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
    event.submit(unhurried());
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
    event.submit(unhurried());
    true
}

/// Room for a claim event, if there is any.
#[inline(always)]
pub(crate) fn reserve_claim() -> Option<RingBufEntry<ClaimEvent>> {
    EVENTS.reserve::<ClaimEvent>(0)
}

/// Fills and sends a claim event of the current thread.
#[inline(always)]
pub(crate) fn submit_claim(
    mut event: RingBufEntry<ClaimEvent>,
    pid: u32,
    slot: u32,
    comm: [u8; COMM_BYTES],
) {
    event.write(ClaimEvent {
        kind: KIND_CLAIM,
        pid,
        tid: bpf_get_current_pid_tgid() as u32,
        slot,
        // SAFETY: takes nothing, returns a number.
        timestamp_ns: unsafe { bpf_ktime_get_ns() },
        comm,
    });
    event.submit(URGENT);
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
    event.submit(URGENT);
    true
}

/// Nanoseconds between two words about unknown code of one target: the daemon looks
/// at all of it each time.
const TELL_EVERY_NS: u64 = 5_000_000;

/// Sends an event about code that the daemon has not told of, unless it was told a
/// moment ago. What is lost for lack of room is sent at the next occasion.
#[inline(always)]
pub(crate) fn unknown_code(hit: &Hit, address: u64) {
    // SAFETY: takes nothing, returns a number.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a map value.
    let told_ns = unsafe { &raw mut (*hit.state).told_ns };
    // SAFETY: as above; two tasks that both tell do no harm.
    if now.wrapping_sub(unsafe { told_ns.read_volatile() }) < TELL_EVERY_NS {
        return;
    }
    let Some(mut event) = EVENTS.reserve::<UnknownCodeEvent>(0) else {
        return;
    };
    event.write(UnknownCodeEvent {
        kind: KIND_UNKNOWN_CODE,
        pid: hit.pid,
        epoch: hit.epoch,
        reserved: 0,
        address,
    });
    event.submit(URGENT);
    // SAFETY: as above.
    unsafe { told_ns.write_volatile(now) };
}
