//! Signal handlers that allocate inside a stub: at each of its instructions.

use std::{cell::Cell, ptr};

use memprof_common::{function::Function, prefilter::SiteKind};

use super::{
    fakes,
    rig::{Rig, call, thread_pointer},
    sites::hits,
};

/// A handler as the kernel calls it.
pub(super) type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Handles a signal, also while it is handled.
pub(super) fn handle(signal: i32, handler: Handler) {
    // SAFETY: an action of zeros is one; the handler has the type that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = (handler as *const ()).expose_provenance();
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        assert_eq!(
            libc::sigaction(signal, &raw const action, ptr::null_mut()),
            0
        );
    }
}

/// What to do at which step.
#[derive(Clone, Copy)]
struct Plan {
    rig: *const Rig,
    /// Steps inside the image until then.
    left: u32,
    /// What the handler's calls were: inside another call, or counted.
    nested: Option<bool>,
    /// A shard that is given back at that step.
    given_back: Option<usize>,
}

thread_local! {
    static PLAN: Cell<Option<Plan>> = const { Cell::new(None) };
}

/// A single step has been made.
pub(super) fn on_step(registers: &mut [libc::greg_t; 23]) {
    super::walks::on_step(registers);
    let at = registers[libc::REG_RIP as usize].cast_unsigned();
    let Some(mut plan) = PLAN.get() else {
        return;
    };
    // SAFETY: the test that has made the plan holds the rig, on this very thread.
    let rig = unsafe { &*plan.rig };
    if plan.nested.is_some() {
        registers[libc::REG_EFL as usize] &= !0x100;
        return;
    }
    if !rig.is_code(at) {
        return;
    }
    if plan.left > 0 {
        plan.left -= 1;
        PLAN.set(Some(plan));
        return;
    }
    if let Some(shard) = plan.given_back {
        rig.give_back(shard);
    }
    plan.nested = Some(rig.own_shard().is_some() && rig.call_frame().unwrap_or(0) != 0);
    PLAN.set(Some(plan));
    let block = rig.malloc(16);
    rig.free(block);
}

/// Makes a call, and interrupts it at the step with this number of those inside the image.
/// Whether the handler's calls were inside another; `None` if the call had fewer steps.
fn interrupt(rig: &Rig, function: Function, arguments: [u64; 3], step: u32) -> Option<bool> {
    interrupt_and_give_back(rig, function, arguments, step, None)
}

/// As [`interrupt`]; besides, a shard is given back at that step.
pub(super) fn interrupt_and_give_back(
    rig: &Rig,
    function: Function,
    arguments: [u64; 3],
    step: u32,
    given_back: Option<usize>,
) -> Option<bool> {
    let function = rig.function(function);
    PLAN.set(Some(Plan {
        rig,
        left: step,
        nested: None,
        given_back,
    }));
    // SAFETY: sets the trap flag, and clears it again; the handler passes over steps
    // outside of the image.
    unsafe { std::arch::asm!("pushfq", "orq $0x100, (%rsp)", "popfq", options(att_syntax)) };
    call(function, arguments);
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "pushfq",
            "andq $~0x100, (%rsp)",
            "popfq",
            options(att_syntax)
        )
    };
    PLAN.take().and_then(|plan| plan.nested)
}

/// Runs a call once for each of its steps in the image; what to do before, the arguments
/// and the bytes and frees of the call. How many steps there were.
fn at_each_step(
    gaps: &[u64],
    function: Function,
    prepare: impl Fn(&Rig) -> [u64; 3],
    bytes: u64,
    frees: i64,
) -> u32 {
    for step in 0.. {
        let rig = fakes::small_rig_with_gaps(gaps);
        let arguments = prepare(&rig);
        let before = rig.totals();
        let interrupted = interrupt(&rig, function, arguments, step);
        let context = format!("{function:?}, gaps {gaps:?}, step {step}, {interrupted:?}");
        let by_handler = u64::from(interrupted == Some(false));
        let calls = u64::from(!function.is_free());
        let expected = (
            before.0 + calls + by_handler,
            before.1 + bytes + 16 * by_handler,
            before.2 + frees + by_handler.cast_signed(),
        );
        assert_eq!(rig.totals(), expected, "{context}");
        assert_eq!(rig.call_frame(), None, "{context}");
        assert_eq!(rig.unsharded(), 0, "{context}");
        let owned = (0..rig.geometry.shards as usize)
            .filter(|&shard| rig.owner(shard) == thread_pointer())
            .count();
        assert_eq!(owned, 1, "{context}");

        // What the sites have told is what is in the set.
        let mut told = Vec::new();
        for hit in hits() {
            match hit.kind {
                SiteKind::Alloc => told.push(hit.frame.address),
                SiteKind::Restore => told.push(hit.frame.old_pointer),
                SiteKind::Free | SiteKind::Take => told.retain(|&address| address != hit.rdi),
            }
        }
        told.sort_unstable();
        let mut set = rig.counted_set();
        set.sort_unstable();
        assert_eq!(set, told, "{context}");
        assert_eq!(rig.occupied(), set.len(), "{context}");
        if interrupted.is_none() {
            return step;
        }
    }
    unreachable!("calls end")
}

/// Warmed up: the thread has its shard.
fn at_home(rig: &Rig) {
    let block = rig.malloc(1);
    rig.free(block);
}

/// Check that a handler that allocates and frees inside a call that is not sampled, at
/// any of its instructions, leaves exact totals and an idle thread.
#[test]
fn in_unsampled_calls() {
    let gaps = &[1 << 40];
    let malloc = |rig: &Rig| {
        at_home(rig);
        [100, 0, 0]
    };
    let steps = at_each_step(gaps, Function::Malloc, malloc, 100, 0);
    assert!((15..60).contains(&steps), "{steps} instructions");
    at_each_step(gaps, Function::Valloc, malloc, 100, 0);
    let free = |rig: &Rig| {
        at_home(rig);
        [0x1230, 0, 0]
    };
    at_each_step(gaps, Function::Free, free, 0, 1);
    let realloc = |rig: &Rig| {
        at_home(rig);
        [0x1230, 100, 0]
    };
    let steps = at_each_step(gaps, Function::Realloc, realloc, 100, 1);
    assert!((30..90).contains(&steps), "{steps} instructions");
    let calloc = |rig: &Rig| {
        at_home(rig);
        [10, 10, 0]
    };
    let steps = at_each_step(gaps, Function::Calloc, calloc, 100, 0);
    assert!((30..90).contains(&steps), "{steps} instructions");
}

/// Check the same for the first call of a thread, which takes a shard.
#[test]
fn in_first_calls() {
    at_each_step(&[1 << 40], Function::Malloc, |_| [100, 0, 0], 100, 0);
    at_each_step(&[1 << 40], Function::Free, |_| [0x1230, 0, 0], 0, 1);
    at_each_step(&[1, 1, 1 << 40], Function::Calloc, |_| [10, 10, 0], 100, 0);
}

/// Check the same for calls that are sampled, and for those of sampled blocks: the set is
/// what the sites have told.
#[test]
fn in_sampled_calls() {
    let always = &[1; 8];
    let malloc = |_: &Rig| [100, 0, 0];
    at_each_step(always, Function::Malloc, malloc, 100, 0);
    let one = &[1, 150, 1 << 40];
    let second = |rig: &Rig| {
        at_home(rig);
        [149, 0, 0]
    };
    at_each_step(one, Function::Malloc, second, 149, 0);
    let of_sampled = |rig: &Rig| [rig.malloc(1), 100, 0];
    at_each_step(one, Function::Free, of_sampled, 0, 1);
    at_each_step(always, Function::Realloc, of_sampled, 100, 1);
    at_each_step(one, Function::Realloc, of_sampled, 100, 1);
}

/// Check the same for a realloc of a sampled block that fails. The handler's malloc
/// fails, too; its free is of NULL.
#[test]
fn in_failing_realloc() {
    let prepare = |rig: &Rig| {
        fakes::fail(false);
        let block = rig.malloc(1);
        fakes::fail(true);
        [block, 100, 0]
    };
    for step in 0.. {
        let rig = fakes::small_rig_with_gaps(&[1, 1, 1 << 40]);
        let arguments = prepare(&rig);
        let interrupted = interrupt(&rig, Function::Realloc, arguments, step);
        assert_eq!(rig.counted_set(), [arguments[0]], "step {step}");
        assert_eq!(rig.occupied(), 1, "step {step}");
        assert_eq!(rig.totals().2, 0, "step {step}");
        assert_eq!(rig.call_frame(), None, "step {step}");
        hits();
        if interrupted.is_none() {
            return;
        }
    }
}
