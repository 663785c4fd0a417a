//! Walks the stack by the tables in the arena.

use core::ffi::c_void;

use aya_ebpf::helpers::{
    bpf_probe_read_user,
    generated::{bpf_loop, bpf_map_lookup_elem},
};
use memprof_common::{
    config::Unwind,
    limits::MAX_STACK_DEPTH,
    stack::{StackHasher, StackKey, StackRecord},
    unwind::{
        cache::{RuleCache, Source},
        rule::Rule,
        table::{MappingList, SLAB_SHIFT, SLAB_WORDS},
        walk::{END_MASK, KnownRules, Memory, StackEnd, Walk},
    },
};

use crate::{
    emit,
    hit::Hit,
    maps::{ARENA, ARENA_REUSES},
    stack::{Capture, Start},
};

/// The arena, and the memory of the task that runs.
struct Current;

impl Memory for Current {
    #[inline(always)]
    fn word(&self, place: u32) -> Option<u64> {
        let slab = ARENA.get_ptr_mut(place >> SLAB_SHIFT)?;
        let key = place & (SLAB_WORDS - 1);
        // SAFETY: what the array of maps holds is a map, of this key and value.
        unsafe {
            let word = bpf_map_lookup_elem(slab.cast(), (&raw const key).cast()).cast::<u64>();
            if word.is_null() { None } else { Some(*word) }
        }
    }

    #[inline(always)]
    fn pair(&self, address: u64) -> Option<[u64; 2]> {
        // SAFETY: reads the target's memory, and says so if that fails.
        unsafe { bpf_probe_read_user(address as *const [u64; 2]) }.ok()
    }

    #[inline(always)]
    fn single(&self, address: u64) -> Option<u64> {
        // SAFETY: as above.
        unsafe { bpf_probe_read_user(address as *const u64) }.ok()
    }
}

/// What other walks have found. Not for walks by tail calls: of each frame the verifier would
/// see twice as much.
struct Cached {
    /// Of the buffer that the walk is in, and so nobody else's meanwhile.
    rules: *mut RuleCache,
    source: Source,
}

impl KnownRules for Cached {
    #[inline(always)]
    fn recall(&self, pc: u64) -> Rule {
        // SAFETY: a map value.
        unsafe { (*self.rules).recall(self.source, pc) }
    }

    #[inline(always)]
    fn remember(&self, pc: u64, rule: Rule) {
        // SAFETY: as above; the buffer is ours.
        unsafe { (*self.rules).remember(self.source, pc, rule) };
    }
}

/// Not 0 if the kernel has `bpf_loop` (Linux 5.17). A constant to the verifier.
#[unsafe(no_mangle)]
static HAS_LOOP: u8 = 0;

/// Whether this kernel lets stacks be walked in a loop.
#[inline(always)]
pub(crate) fn is_possible() -> bool {
    // SAFETY: a valid static; volatile, since the loader changes it.
    unsafe { (&raw const HAS_LOOP).read_volatile() != 0 }
}

/// A walk and the hash of its frames, in a map: what a loop keeps on its stack the
/// verifier would follow from step to step.
#[repr(C)]
pub(crate) struct Walking {
    walk: Walk,
    hasher: StackHasher,
    /// Of a walk in a loop, whose steps have little stack to share.
    plan: Plan,
}

impl Walking {
    /// Ends the walk, though there is another frame.
    #[inline(always)]
    pub(crate) fn cut(&mut self) {
        self.walk.stopped = StackEnd::Truncated as u32;
    }
}

/// What stays the same over a walk.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Plan {
    mappings: MappingList,
    /// [`reuses`] when it began.
    reuses: u64,
    most: u32,
    frame_pointers: u32,
}

/// What each step of the loop is given.
struct Steps {
    capture: *mut Capture,
    rules: *mut RuleCache,
}

/// Fills the record of `capture`, and returns its name.
#[inline(always)]
pub(crate) fn walk(
    start: &Start,
    hit: &Hit,
    capture: &mut Capture,
    rules: *mut RuleCache,
) -> StackKey {
    let Capture { walking, record } = capture;
    walking.plan = begin(start, hit, walking, record);
    let mut steps = Steps { capture, rules };
    // SAFETY: the callback takes what it is given here.
    unsafe {
        bpf_loop(
            MAX_STACK_DEPTH as u32 + 1,
            loop_step as *mut c_void,
            (&raw mut steps).cast(),
            0,
        )
    };
    let Capture { walking, record } = capture;
    let plan = walking.plan;
    end(hit, walking, record, &plan)
}

/// Begins in the frame that the probed call returns to, or that of the function which was
/// called. Its caller is known without a step, and is wanted in any case.
#[inline(always)]
pub(crate) fn begin(
    start: &Start,
    hit: &Hit,
    walking: &mut Walking,
    record: &mut StackRecord,
) -> Plan {
    let target = hit.target;
    // In this order: what the list leads to is in use when it is read, and stays as it
    // is until the count changes.
    let reuses = reuses();
    // SAFETY: a map value. Volatile: the daemon changes it.
    let (mappings, epoch) = unsafe {
        (
            (&raw const target.mappings).read_volatile(),
            (&raw const target.mappings_epoch).read_volatile(),
        )
    };
    let mappings = if epoch == hit.epoch { mappings } else { 0 };
    walking.walk.begin(start.ip, start.sp, start.bp);
    walking.hasher = StackHasher::new(target.stack_seed);
    let mut most = target.stack_depth;
    if start.leaf != 0 {
        record.frames[0] = start.leaf;
        walking.hasher.push(start.leaf);
        walking.walk.depth = 1;
        most += 1;
    }
    Plan {
        mappings: MappingList(mappings),
        reuses,
        most,
        frame_pointers: u32::from(target.unwind == Unwind::Auto as u32),
    }
}

/// One frame; not 0 ends the loop.
unsafe extern "C" fn loop_step(_index: u32, steps: *mut Steps) -> u64 {
    // SAFETY: `walk` gives what nobody else uses meanwhile.
    let (Capture { walking, record }, rules) = unsafe {
        let steps = &*steps;
        (&mut *steps.capture, steps.rules)
    };
    let plan = walking.plan;
    let known = Cached {
        rules,
        source: Source::new(plan.mappings, plan.reuses),
    };
    u64::from(!step_by(&known, walking, record, &plan))
}

/// One frame. False if it was the last.
#[inline(always)]
pub(crate) fn step(walking: &mut Walking, record: &mut StackRecord, plan: &Plan) -> bool {
    step_by(&(), walking, record, plan)
}

#[inline(always)]
fn step_by(
    known: &impl KnownRules,
    walking: &mut Walking,
    record: &mut StackRecord,
    plan: &Plan,
) -> bool {
    let walk = &mut walking.walk;
    if !walk.frame(&Current, known, plan.mappings, plan.most) {
        return false;
    }
    let index = walk.depth as usize;
    if index >= MAX_STACK_DEPTH {
        return false;
    }
    record.frames[index] = walk.ip;
    walking.hasher.push(walk.ip);
    walk.next(&Current, known, plan.mappings, plan.frame_pointers != 0)
}

/// The walk is over: completes `record`, and returns its name.
#[inline(always)]
pub(crate) fn end(
    hit: &Hit,
    walking: &mut Walking,
    record: &mut StackRecord,
    plan: &Plan,
) -> StackKey {
    // What was read may have been another table's by then.
    if reuses() != plan.reuses {
        walking.walk.stopped = StackEnd::StaleTables as u32;
    }
    record.depth = walking.walk.depth;
    record.end = walking.walk.end_code();
    if record.end & END_MASK == StackEnd::UnknownMapping as u32 {
        emit::unknown_code(hit, walking.walk.ip);
    }
    walking.hasher.finish(record.depth, record.end)
}

#[inline(always)]
fn reuses() -> u64 {
    match ARENA_REUSES.get_ptr(0) {
        // SAFETY: a map value. Volatile: the daemon changes it.
        Some(reuses) => unsafe { reuses.read_volatile() },
        None => 0,
    }
}
