//! Exact totals, added to at every call.
//!
//! Per-CPU, so that no two CPUs wait for each other; atomically, since a task
//! that preempts this one on the same CPU adds to the same words.

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use memprof_common::{
    random::{Draws, Stream},
    totals::{IMPOSSIBLE_BYTES, SIZE_CLASSES, size_class},
};

use crate::{atomic, hit::Hit, maps::TOTALS};

/// Counts a call that asks for a block, and gives it its random bits.
#[inline(always)]
pub(crate) fn count_alloc(hit: &Hit, size_bytes: u64) -> Option<Draws> {
    let totals = TOTALS.get_ptr_mut(hit.totals_index())?;
    let class = size_class(size_bytes);
    // What `size_class` ensures, in words that the verifier follows.
    if class >= SIZE_CLASSES {
        return None;
    }
    // SAFETY: the pointer is to a map value, and the index is in bounds.
    let call = unsafe {
        if size_bytes < IMPOSSIBLE_BYTES {
            atomic::add(&raw mut (*totals).alloc_bytes, size_bytes);
        }
        atomic::fetch_add(&raw mut (*totals).alloc_calls[class], 1)
    };
    let stream = Stream {
        seed: hit.target.sample_seed,
        epoch: hit.epoch,
        // Not another CPU's than that of `totals`: programs do not migrate.
        //
        // SAFETY: takes nothing, returns a number.
        cpu: unsafe { bpf_get_smp_processor_id() },
        class,
    };
    Some(Draws::new(stream, call))
}

/// Counts a call that gives a block up.
#[inline(always)]
pub(crate) fn count_free(hit: &Hit) {
    add_frees(hit, 1);
}

/// Takes back what [`count_free`] counted: a failed `realloc` has freed nothing.
#[inline(always)]
pub(crate) fn uncount_free(hit: &Hit) {
    add_frees(hit, u64::MAX);
}

#[inline(always)]
fn add_frees(hit: &Hit, calls: u64) {
    if let Some(totals) = TOTALS.get_ptr_mut(hit.totals_index()) {
        // SAFETY: the pointer is to a map value.
        unsafe { atomic::add(&raw mut (*totals).free_calls, calls) };
    }
}
