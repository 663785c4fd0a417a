//! Walks from within the image to the caller, by its rows.

use std::{cell::Cell, ptr};

use iced_x86::{Code, Decoder, DecoderOptions};
use memprof_common::{
    function::Function,
    unwind::rule::{BpRule, Rule, RuleKind},
};

use super::{
    fakes,
    rig::{NEVER, Rig, call},
    sites::hits,
};
use crate::prefilter::{header, image::CodeImage};

/// A frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    at: u64,
    sp: u64,
    bp: u64,
}

#[derive(Clone, Copy)]
struct Plan {
    rig: *const Rig,
    function: u64,
    /// What the function returns to.
    caller: Option<Frame>,
    steps: u32,
    /// Frames of the image in one walk, at most.
    most: u32,
    /// Where a walk led elsewhere first.
    wrong: Option<(u64, Frame)>,
}

thread_local! {
    static PLAN: Cell<Option<Plan>> = const { Cell::new(None) };
}

/// A word of this thread's stack.
fn word(at: u64) -> u64 {
    // SAFETY: the rows, or the entry of a function, say that the stack has one there.
    unsafe { ptr::with_exposed_provenance::<u64>(at as usize).read() }
}

/// The caller of a frame at an instruction of the image.
fn caller(rig: &Rig, frame: Frame, instruction: u64) -> Option<Frame> {
    let rule = rig.rule_at(instruction);
    if rule.kind() != RuleKind::Sp as u32 {
        return None;
    }
    let cfa = frame.sp + rule.cfa_offset();
    let bp = if rule.bp() == BpRule::AtCfa as u32 {
        word(cfa - rule.bp_below_cfa())
    } else {
        frame.bp
    };
    Some(Frame {
        at: word(cfa - 8),
        sp: cfa,
        bp,
    })
}

/// A single step has been made.
pub(super) fn on_step(registers: &[libc::greg_t; 23]) {
    let Some(mut plan) = PLAN.get() else {
        return;
    };
    let register = |index: i32| registers[index as usize].cast_unsigned();
    let mut frame = Frame {
        at: register(libc::REG_RIP),
        sp: register(libc::REG_RSP),
        bp: register(libc::REG_RBP),
    };
    // SAFETY: the test that has made the plan holds the rig, on this very thread.
    let rig = unsafe { &*plan.rig };
    if frame.at == plan.function && plan.caller.is_none() {
        plan.caller = Some(Frame {
            at: word(frame.sp),
            sp: frame.sp + 8,
            bp: frame.bp,
        });
    } else if rig.is_code(frame.at) {
        plan.steps += 1;
        let begun = frame.at;
        let (mut frames, mut instruction) = (0, frame.at);
        while rig.is_code(frame.at) {
            frames += 1;
            let Some(next) = caller(rig, frame, instruction) else {
                break;
            };
            frame = next;
            // The call.
            instruction = frame.at - 1;
        }
        plan.most = plan.most.max(frames);
        if plan.wrong.is_none() && Some(frame) != plan.caller {
            plan.wrong = Some((begun, frame));
        }
    }
    PLAN.set(Some(plan));
}

/// Makes a call, and walks from each of its steps in the image; how many there were, and the most
/// frames of the image on the way.
fn walk_from_each_step(rig: &Rig, function: Function, arguments: [u64; 3]) -> (u32, u32) {
    let at = rig.function(function);
    PLAN.set(Some(Plan {
        rig,
        function: at as u64,
        caller: None,
        steps: 0,
        most: 0,
        wrong: None,
    }));
    // SAFETY: sets the trap flag, and clears it again below.
    unsafe { std::arch::asm!("pushfq", "orq $0x100, (%rsp)", "popfq", options(att_syntax)) };
    call(at, arguments);
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "pushfq",
            "andq $~0x100, (%rsp)",
            "popfq",
            options(att_syntax)
        )
    };
    let plan = PLAN.take().unwrap();
    assert_eq!(plan.wrong, None, "{function:?}: {:?}", plan.caller);
    (plan.steps, plan.most)
}

/// Check that from each instruction that calls execute in the image a walk leads to their caller,
/// with its stack pointer and its rbp: calls that are sampled or not, first ones, ones that fail,
/// of all functions, whose first instructions are all displaced or not.
#[test]
fn each_step_leads_to_the_caller() {
    let out = Box::leak(Box::new(0_u64));
    let out = ptr::from_mut(out).expose_provenance() as u64;
    let (mut steps, mut most) = (0, 0);
    for make in [Rig::new, Rig::behind_first] {
        for gaps in [&[(NEVER, 512)][..], &[(1, 512); 64]] {
            let rig = make(&fakes::all());
            rig.fill(gaps);
            for &function in Function::ALL {
                let arguments = match function {
                    Function::PosixMemalign => [out, 64, 100],
                    _ if function.is_free() => [0x1230, 0, 0],
                    _ => [0, 100, 100],
                };
                for fails in [false, true] {
                    fakes::fail(fails);
                    let walked = walk_from_each_step(&rig, function, arguments);
                    assert!(walked.0 >= 3, "{function:?}: {walked:?}");
                    (steps, most) = (steps + walked.0, most.max(walked.1));
                }
                fakes::fail(false);
            }
            // Of a block in the set.
            for function in [Function::Realloc, Function::Free] {
                for fails in [true, false] {
                    let block = rig.malloc(10);
                    fakes::fail(fails);
                    walk_from_each_step(&rig, function, [block, 100, 0]);
                    fakes::fail(false);
                }
            }
            hits();
        }
    }
    assert!(steps > 5000, "{steps}");
    // A routine of a routine of a stub, which another stub has called as its twin.
    assert_eq!(most, 4);
}

/// Check that each instruction of an image has a rule to follow, and nothing else has one.
#[test]
fn each_instruction_has_a_rule() {
    for make in [Rig::new, Rig::behind_first] {
        let rig = make(&fakes::all());
        let CodeImage { bytes, patches, .. } = &rig.image;
        let first = header::bytes(patches.len());
        assert_eq!(rig.image.rows[0], (0, Rule::NONE));
        let code = Decoder::with_ip(64, &bytes[first..], first as u64, DecoderOptions::NONE);
        for instruction in code {
            let rule = rig.rule_at(rig.image_at() + instruction.ip());
            if instruction.code() == Code::Int3 {
                assert_eq!(rule, Rule::NONE, "{:x}", instruction.ip());
            } else {
                assert_eq!(rule.kind(), RuleKind::Sp as u32, "{instruction}");
            }
        }
    }
}
