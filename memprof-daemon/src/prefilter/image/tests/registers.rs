//! The register contract.

use std::arch::global_asm;

use memprof_common::{
    function::Function,
    prefilter::{SiteKind, home_shard},
};

use super::{
    fakes,
    rig::{GEOMETRY, Rig, thread_pointer},
    sites::hits,
};
use crate::prefilter::image::MallocNests;

/// All registers that a call may see or change, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(32))]
struct Registers {
    general: [u64; 16],
    vector: [[u64; 4]; 16],
}

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;
const CALLEE_SAVED: [usize; 6] = [RBX, RBP, 12, 13, 14, 15];

global_asm!(
    r#"
    .macro memprof_test_vectors move, base, from
        .set memprof_test_n, 0
        .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        .if \from
            vmovups 128+32*\n(\base), %ymm\n
        .else
            vmovups %ymm\n, 128+32*\n(\base)
        .endif
        .endr
    .endm
    .pushsection .text.memprof_test_call,"ax",@progbits
    # (%rdi = registers to enter with, %rsi = where to store them after, %rdx = function)
    .globl memprof_test_call
    .hidden memprof_test_call
    memprof_test_call:
        push %rbx
        push %rbp
        push %r12
        push %r13
        push %r14
        push %r15
        push %rsi
        push %rdx
        sub $8, %rsp
        memprof_test_vectors load, %rdi, 1
        mov (%rdi), %rax
        mov 8(%rdi), %rcx
        mov 16(%rdi), %rdx
        mov 24(%rdi), %rbx
        mov 40(%rdi), %rbp
        mov 48(%rdi), %rsi
        mov 64(%rdi), %r8
        mov 72(%rdi), %r9
        mov 80(%rdi), %r10
        mov 88(%rdi), %r11
        mov 96(%rdi), %r12
        mov 104(%rdi), %r13
        mov 112(%rdi), %r14
        mov 120(%rdi), %r15
        mov 56(%rdi), %rdi
        call *8(%rsp)
        mov %rax, (%rsp)
        mov 16(%rsp), %rax
        mov %rcx, 8(%rax)
        mov %rdx, 16(%rax)
        mov %rbx, 24(%rax)
        mov %rsp, 32(%rax)
        mov %rbp, 40(%rax)
        mov %rsi, 48(%rax)
        mov %rdi, 56(%rax)
        mov %r8, 64(%rax)
        mov %r9, 72(%rax)
        mov %r10, 80(%rax)
        mov %r11, 88(%rax)
        mov %r12, 96(%rax)
        mov %r13, 104(%rax)
        mov %r14, 112(%rax)
        mov %r15, 120(%rax)
        memprof_test_vectors store, %rax, 0
        mov (%rsp), %rcx
        mov %rcx, (%rax)
        vzeroupper
        add $24, %rsp
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %rbp
        pop %rbx
        ret
    .popsection

    # A real function: stores the registers it sees at the address that is written over
    # the number, and leaves those that are behind.
    .pushsection .rodata.memprof_test_real,"a",@progbits
    .globl memprof_test_real
    .hidden memprof_test_real
    memprof_test_real:
        .byte 0x0f, 0x1f, 0x44, 0, 0
        push %rax
        movabs $0x1122334455667788, %rax
        mov %rcx, 8(%rax)
        mov %rdx, 16(%rax)
        mov %rbx, 24(%rax)
        mov %rbp, 40(%rax)
        mov %rsi, 48(%rax)
        mov %rdi, 56(%rax)
        mov %r8, 64(%rax)
        mov %r9, 72(%rax)
        mov %r10, 80(%rax)
        mov %r11, 88(%rax)
        mov %r12, 96(%rax)
        mov %r13, 104(%rax)
        mov %r14, 112(%rax)
        mov %r15, 120(%rax)
        memprof_test_vectors store, %rax, 0
        pop (%rax)
        mov %rsp, 32(%rax)
        add $640, %rax
        memprof_test_vectors load, %rax, 1
        mov 8(%rax), %rcx
        mov 16(%rax), %rdx
        mov 48(%rax), %rsi
        mov 56(%rax), %rdi
        mov 64(%rax), %r8
        mov 72(%rax), %r9
        mov 80(%rax), %r10
        mov 88(%rax), %r11
        mov (%rax), %rax
        ret
    .globl memprof_test_real_end
    .hidden memprof_test_real_end
    memprof_test_real_end:
    .popsection
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    fn memprof_test_call(enter: *const Registers, after: *mut Registers, function: usize);
    static memprof_test_real: u8;
    static memprof_test_real_end: u8;
}

/// What the real function saw, and what it leaves.
#[repr(C)]
struct Real {
    seen: Registers,
    left: Registers,
}

/// The real function's code, with this record.
fn real_code(record: *mut Real) -> Vec<u8> {
    let (start, end) = (
        &raw const memprof_test_real,
        &raw const memprof_test_real_end,
    );
    // SAFETY: the two symbols are the bounds of read-only data.
    let code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) };
    let mut code = code.to_vec();
    let number = 0x1122_3344_5566_7788_u64.to_le_bytes();
    let at = code.windows(8).position(|bytes| bytes == number).unwrap();
    let address = record.expose_provenance() as u64;
    code[at..at + 8].copy_from_slice(&address.to_le_bytes());
    code
}

/// Another number in each register.
fn pattern(salt: u64) -> Registers {
    let number = |n: usize| (n as u64 + 1).wrapping_mul(0x0101_0101_0001_0203 ^ salt << 32);
    let mut registers = Registers {
        general: [0; 16],
        vector: [[0; 4]; 16],
    };
    for (n, register) in registers.general.iter_mut().enumerate() {
        *register = number(n);
    }
    for (n, word) in registers.vector.iter_mut().flatten().enumerate() {
        *word = number(16 + n);
    }
    registers
}

/// How the thread comes to the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Unsampled, the thread at home.
    Home,
    /// Unsampled, in another shard.
    Away,
    /// The first call of the thread.
    First,
    /// Sampled, and a block of the set as the first argument.
    Sampled,
    /// As a forked child.
    Off,
}

/// Check that, whichever way a call goes, the real function sees all registers as the
/// caller has left them (but `rax` where it returns its result there), with the stack
/// aligned, and that the caller finds all registers as the real function has left them.
#[test]
fn registers_are_preserved() {
    assert!(
        is_x86_feature_detected!("avx"),
        "the test looks at ymm registers"
    );
    let record = Box::leak(Box::new(Real {
        seen: pattern(0),
        left: pattern(0),
    }));
    let record = std::ptr::from_mut(record);
    let mut out = 0_u64;
    let out_at = std::ptr::from_mut(&mut out).expose_provenance() as u64;
    for nests in [MallocNests::No, MallocNests::Yes] {
        for way in [Way::Home, Way::Away, Way::First, Way::Sampled, Way::Off] {
            for &function in Function::ALL {
                let codes: Vec<_> = Function::ALL
                    .iter()
                    .map(|&function| (function, real_code(record)))
                    .collect();
                let rig = Rig::with_code(GEOMETRY, nests, &codes);
                let context = format!("{function:?}, {way:?}, {nests:?}");
                let enter = prepare(&rig, way, function, out_at);
                let left = left(way, function);
                let mut after = pattern(9);
                // SAFETY: the record is leaked, and nobody else has it; the function is
                // a fake one that goes on in `memprof_test_real`.
                let seen = unsafe {
                    (*record).left = left;
                    memprof_test_call(&raw const enter, &raw mut after, rig.function(function));
                    (*record).seen
                };
                check_hits(way, function, &context);
                // Its arguments are kept around the call of its twin.
                let mut left = left;
                if way == Way::Sampled && function.throws() {
                    for n in [RDI, RSI, RDX, RCX] {
                        left.general[n] = enter.general[n];
                    }
                }
                check(function, &enter, &seen, &left, &after, &context);
            }
        }
    }
}

/// Brings the thread there; the registers to enter with.
fn prepare(rig: &Rig, way: Way, function: Function, out_at: u64) -> Registers {
    let mut enter = pattern(1);
    let size = 1000;
    match function {
        Function::Malloc
        | Function::Mallocx
        | Function::Valloc
        | Function::Pvalloc
        | Function::New => {
            enter.general[RDI] = size;
        }
        Function::Calloc | Function::NewN => enter.general[RDI] = 3,
        Function::PosixMemalign => enter.general[RDI] = out_at,
        _ => {}
    }
    match function {
        Function::Reallocarray
        | Function::HeapCalloc
        | Function::HeapRealloc
        | Function::HeapNewN
        | Function::HeapReallocf => enter.general[RDX] = 5,
        Function::HeapReallocn => {
            enter.general[RDX] = 5;
            enter.general[RCX] = 7;
        }
        Function::PosixMemalign => enter.general[RDX] = size,
        _ => {}
    }
    enter.general[RSI] = 77;
    let home = home_shard(thread_pointer(), GEOMETRY.shards) as usize;
    match way {
        Way::Off => rig.enable(false),
        Way::First => rig.fill(&[(1 << 40, 1)]),
        Way::Home | Way::Away => {
            if way == Way::Away {
                rig.give_away(home);
            }
            rig.fill(&[(1 << 40, 1)]);
            rig.malloc(1);
        }
        Way::Sampled => {
            // The record of the fake malloc says which address.
            rig.fill(&[(1, 1), (1, 1), (1 << 40, 1)]);
            let block = rig.malloc(1);
            match function {
                Function::HeapRealloc | Function::HeapReallocn | Function::HeapReallocf => {
                    enter.general[RSI] = block;
                }
                _ if takes_block(function) => enter.general[RDI] = block,
                _ => {}
            }
        }
    }
    hits();
    enter
}

fn takes_block(function: Function) -> bool {
    function.is_free() || function.reallocates()
}

/// What the real function leaves: success, with another address for each.
fn left(way: Way, function: Function) -> Registers {
    let mut left = pattern(2 + way as u64);
    if function == Function::PosixMemalign {
        left.general[RAX] = 0x1234_5678_0000_0000;
    }
    left
}

fn check_hits(way: Way, function: Function, context: &str) {
    let kinds: Vec<_> = hits().iter().map(|hit| hit.kind).collect();
    let expected: &[SiteKind] = match way {
        Way::Sampled if function.is_free() => &[SiteKind::Free],
        Way::Sampled if takes_block(function) => &[SiteKind::Take, SiteKind::Alloc],
        Way::Sampled => &[SiteKind::Alloc],
        _ => &[],
    };
    // posix_memalign has stored no address: no block.
    let expected = if function == Function::PosixMemalign {
        &[]
    } else {
        expected
    };
    assert_eq!(kinds, expected, "{context}");
}

fn check(
    function: Function,
    enter: &Registers,
    seen: &Registers,
    left: &Registers,
    after: &Registers,
    context: &str,
) {
    assert_eq!(seen.vector, enter.vector, "{context}: vectors seen");
    assert_eq!(after.vector, left.vector, "{context}: vectors after");
    assert_eq!(seen.general[RSP] % 16, 8, "{context}: alignment");
    for n in 0..16 {
        if n == RSP {
            continue;
        }
        if n != RAX || function.is_free() {
            assert_eq!(seen.general[n], enter.general[n], "{context}: {n} seen");
        }
        let expected = if CALLEE_SAVED.contains(&n) {
            enter.general[n]
        } else {
            left.general[n]
        };
        assert_eq!(after.general[n], expected, "{context}: {n} after");
    }
}

/// Check that at the alloc site the callee-saved registers are the caller's, and that the
/// frame's end is the caller's stack pointer: what an unwinder needs.
#[test]
fn the_caller_is_seen_at_the_site() {
    let rig = fakes::rig_with_gaps(&[1; 40]);
    let mut out = 0_u64;
    let out_at = std::ptr::from_mut(&mut out).expose_provenance() as u64;
    for &function in Function::ALL {
        if function.is_free() {
            continue;
        }
        let mut enter = pattern(1);
        enter.general[RDI] = match function {
            Function::PosixMemalign => out_at,
            // It hands out what it is given.
            Function::Xallocx => 0x7000,
            _ => 1,
        };
        enter.general[RSI] = 2;
        enter.general[RDX] = 3;
        enter.general[RCX] = 4;
        let mut after = pattern(9);
        // SAFETY: the function is a fake one.
        unsafe { memprof_test_call(&raw const enter, &raw mut after, rig.function(function)) };
        let hits = hits();
        assert_eq!(hits.len(), 1, "{function:?}");
        assert_eq!(hits[0].rbp, enter.general[RBP]);
        assert_eq!(hits[0].frame_at + 64, after.general[RSP], "{function:?}");
        let call = memprof_test_call as *const ();
        let distance = hits[0].frame.return_address - call.expose_provenance() as u64;
        assert!((1..500).contains(&distance), "{function:?}: returns there");
    }
}
