//! An allocator that hands out addresses nobody uses.

use std::cell::Cell;

use memprof_common::function::Function;

use super::rig::{Rig, call};

thread_local! {
    static NEXT: Cell<u64> = const { Cell::new(0) };
    static FAILS: Cell<bool> = const { Cell::new(false) };
    /// Patched functions to call inside: `malloc` and `free`.
    static INSIDE: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
}

/// Makes this thread's allocating calls fail, or not.
pub(super) fn fail(fails: bool) {
    FAILS.set(fails);
}

/// Makes this thread's `calloc` and `realloc` call the patched `malloc` and `free`.
pub(super) fn nest(rig: &Rig) {
    INSIDE.set(Some((
        rig.function(Function::Malloc),
        rig.function(Function::Free),
    )));
}

/// The next address, another for each thread; 0 if it is to fail.
fn hand_out() -> u64 {
    if FAILS.get() {
        return 0;
    }
    if NEXT.get() == 0 {
        let thread = super::rig::thread_pointer();
        NEXT.set((thread & 0xffff_ffff_f000) << 8 | 0x10);
    }
    NEXT.set(NEXT.get() + 64);
    NEXT.get()
}

extern "C" fn plain() -> u64 {
    hand_out()
}

extern "C" fn calloc(count: u64, size: u64) -> u64 {
    match INSIDE.get() {
        Some((malloc, _)) => call(malloc, [count * size, 0, 0]),
        None => hand_out(),
    }
}

extern "C" fn realloc(old: u64, size: u64) -> u64 {
    if FAILS.get() {
        return 0;
    }
    match INSIDE.get() {
        Some((malloc, free)) => {
            let new = call(malloc, [size, 0, 0]);
            call(free, [old, 0, 0]);
            new
        }
        None if size == 0 => 0,
        None => hand_out(),
    }
}

extern "C" fn reallocf(_: u64, size: u64) -> u64 {
    if size == 0 { 0 } else { hand_out() }
}

extern "C" fn heap_realloc(_: u64, old: u64, size: u64) -> u64 {
    realloc(old, size)
}

/// Has grown, or has half of what is asked for.
extern "C" fn xallocx(_: u64, size: u64) -> u64 {
    if FAILS.get() { size / 2 } else { size + 7 }
}

extern "C" fn posix_memalign(out: &mut u64) -> u64 {
    // An int: the upper half of the register is anything.
    let upper = 0xdead_beef_0000_0000;
    if FAILS.get() {
        return upper | libc::ENOMEM as u64;
    }
    *out = hand_out();
    upper
}

extern "C" fn free() {}

/// All functions.
pub(super) fn all() -> Vec<(Function, usize)> {
    Function::ALL
        .iter()
        .map(|&function| {
            let rust = match function {
                Function::Calloc => calloc as *const (),
                Function::Realloc | Function::Reallocarray => realloc as *const (),
                Function::Reallocf => reallocf as *const (),
                Function::HeapRealloc | Function::HeapReallocn => heap_realloc as *const (),
                Function::Xallocx => xallocx as *const (),
                Function::PosixMemalign => posix_memalign as *const (),
                _ if function.is_free() => free as *const (),
                _ => plain as *const (),
            };
            (function, rust.expose_provenance())
        })
        .collect()
}

/// All functions in front of this allocator, and a gap that nobody uses up.
pub(super) fn rig() -> Rig {
    let rig = Rig::new(&all());
    rig.fill(&[(super::rig::NEVER, 512)]);
    rig
}

/// All functions, with these gaps of one interval.
pub(super) fn rig_with_gaps(gaps: &[u64]) -> Rig {
    with_gaps(&all(), gaps)
}

/// A function of each kind, with these gaps: faster to make.
pub(super) fn small_rig_with_gaps(gaps: &[u64]) -> Rig {
    let mut functions = all();
    functions.retain(|(function, _)| {
        matches!(
            function,
            Function::Malloc
                | Function::Calloc
                | Function::Realloc
                | Function::Valloc
                | Function::Free
        )
    });
    with_gaps(&functions, gaps)
}

fn with_gaps(functions: &[(Function, usize)], gaps: &[u64]) -> Rig {
    let rig = Rig::new(functions);
    let gaps: Vec<_> = gaps.iter().map(|&gap| (gap, 512)).collect();
    rig.fill(&gaps);
    rig
}
