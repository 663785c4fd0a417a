//! Atomic operations on map values.
//!
//! `core::sync::atomic` has no read-modify-write operations for BPF: the target
//! says it has no compare-and-swap. The machine has them (`xadd` always,
//! `xchg` since Linux 5.12), so they are spelled in assembly.

use core::arch::asm;

/// Adds `amount` to `*word`.
///
/// # Safety
///
/// `word` must point to an aligned `u64` that the verifier lets the program
/// write, in a map value.
#[inline(always)]
pub(crate) unsafe fn add(word: *mut u64, amount: u64) {
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        asm!(
            "lock *(u64 *)({word} + 0) += {amount}",
            word = in(reg) word,
            amount = in(reg) amount,
        );
    }
}

/// Adds `amount` to `*word` and returns what was there.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
pub(crate) unsafe fn fetch_add(word: *mut u64, amount: u64) -> u64 {
    let mut value = amount;
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
            word = in(reg) word,
            value = inout(reg) value,
        );
    }
    value
}

/// As [`add`], of half a word.
///
/// # Safety
///
/// As for [`add`], of a `u32`.
#[inline(always)]
pub(crate) unsafe fn add_u32(word: *mut u32, amount: u32) {
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        asm!(
            "lock *(u32 *)({word} + 0) += {amount}",
            word = in(reg) word,
            amount = in(reg) u64::from(amount),
        );
    }
}

/// Sets `*word` to 1 and returns what was there.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
pub(crate) unsafe fn claim(word: *mut u64) -> u64 {
    let mut value = 1_u64;
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        asm!(
            "{value} = xchg_64({word} + 0, {value})",
            word = in(reg) word,
            value = inout(reg) value,
        );
    }
    value
}
