//! Exact totals, added to at every call.
//!
//! Per-CPU, so that no two CPUs wait for each other; atomically, since a task
//! that preempts this one on the same CPU adds to the same words.

use memprof_common::totals::{IMPOSSIBLE_BYTES, SIZE_CLASSES, size_class};

use crate::{atomic, hit::Hit, maps::TOTALS};

/// Counts a call that asks for a block.
#[inline(always)]
pub(crate) fn count_alloc(hit: &Hit, size_bytes: u64) {
    let Some(totals) = TOTALS.get_ptr_mut(hit.totals_index()) else {
        return;
    };
    let class = size_class(size_bytes);
    // What `size_class` ensures, in words that the verifier follows.
    if class >= SIZE_CLASSES {
        return;
    }
    // SAFETY: the pointer is to a map value, and the index is in bounds.
    unsafe {
        atomic::add(&raw mut (*totals).alloc_calls[class], 1);
        if size_bytes < IMPOSSIBLE_BYTES {
            atomic::add(&raw mut (*totals).alloc_bytes, size_bytes);
        }
    }
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
