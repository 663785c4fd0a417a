use super::*;

/// Where a function's code is put.
const ADDRESS: u64 = 0x1000;

fn at_entry(function: Function, bytes: &[u8]) -> ProbePoint {
    let address = ADDRESS;
    choose(function, function.places(), Code { bytes, address })
}

/// Expects a probe behind the entry, or on an entry that is emulated.
fn expect(function: Function, bytes: &[u8], offset: u32, instruction: &str) {
    let expected = ProbePoint {
        offset,
        instruction: instruction.to_owned(),
        emulated: true,
        refusal: None,
    };
    assert_eq!(at_entry(function, bytes), expected, "{function:?}");
}

/// Expects a probe on an entry that is not emulated.
fn expect_refusal(function: Function, bytes: &[u8], refusal: Refusal) {
    let point = at_entry(function, bytes);
    assert_eq!(
        (point.offset, point.emulated, point.refusal),
        (0, false, Some(refusal)),
        "{function:?} {point:?}"
    );
}

/// What is chosen for each function: where, the text, whether it is emulated, and
/// why it is not elsewhere.
fn chosen(starts: &[real::Start]) -> Vec<String> {
    let line = |&(function, address, bytes): &real::Start| {
        let point = choose(function, function.places(), Code { bytes, address });
        let refusal = point.refusal.map(|refusal| format!(": {refusal}"));
        let name = function.symbol();
        format!(
            "{name}+{:#x} {}{}",
            point.offset,
            point.instruction,
            refusal.unwrap_or_default()
        )
    };
    starts.iter().map(line).collect()
}

/// Check the choice in Debian 13's C library.
#[test]
fn debian_13() {
    let expected = [
        "malloc+0x0 push r12",
        "calloc+0x0 push r14",
        "realloc+0x0 push r15",
        "reallocarray+0x0 mov rax, rsi: an argument is overwritten first",
        "posix_memalign+0x7 push r12",
        "aligned_alloc+0x0 push rbx",
        "memalign+0x7 je short 0xa39d0",
        "valloc+0x7 push rbx",
        "pvalloc+0x7 push rbx",
        "free+0x3 je 0xa3148",
    ];
    assert_eq!(chosen(real::TRIXIE), expected);
}

/// Check the choice in a newer C library, whose fast paths no longer begin with
/// `push`.
#[test]
fn debian_sid() {
    let expected = [
        "malloc+0x3 js short 0xa4d26",
        "calloc+0x6 jo 0xa5be8",
        "realloc+0x6 je 0xa57b0",
        "reallocarray+0x0 mov rax, rsi: an argument is overwritten first",
        "posix_memalign+0x17 jne short 0xa64a8",
        "aligned_alloc+0x7 jne short 0xa59a8",
        "memalign+0x0 jmp 0xa4e00",
        "valloc+0x0 mov rax, [rip+0x1414d1]: an argument is overwritten first",
        "pvalloc+0x0 mov rax, [rip+0x1414b1]: an argument is overwritten first",
        "free+0x3 je 0xa52d0",
    ];
    assert_eq!(chosen(real::SID), expected);
}

/// Check the choice in a library whose functions begin with `endbr64`.
#[test]
fn musl_with_cet() {
    let expected = [
        "malloc+0x4 jmp 0x525e0",
        "calloc+0x0 endbr64: the stack pointer moves first",
        "realloc+0x4 jmp 0x52e50",
        "reallocarray+0x0 endbr64: an argument is overwritten first",
        "posix_memalign+0xd jbe short 0x53380",
        "aligned_alloc+0x0 endbr64: the stack pointer moves first",
        "memalign+0x4 jmp 0x14050",
        "valloc+0x0 endbr64: an argument is overwritten first",
        "free+0x4 jmp 0x523a0",
    ];
    assert_eq!(chosen(real::MUSL_CET), expected);
}

/// Check the choice in a newer jemalloc.
#[test]
fn jemalloc() {
    let expected = [
        "malloc+0xb ja 0x21fa0",
        "calloc+0x4 push r15",
        "realloc+0x4 push r15",
        "posix_memalign+0x4 push r15",
        "aligned_alloc+0x4 push r15",
        "free+0x34 jne 0x27220",
    ];
    assert_eq!(chosen(real::JEMALLOC_SID), expected);
}

/// Check that each emulated instruction is taken at the entry, and at once
/// behind an `endbr64`.
#[test]
fn emulated() {
    let instructions: [(&[u8], &str); 11] = [
        (&[0x50], "push rax"),
        (&[0x54], "push rsp"),
        (&[0x57], "push rdi"),
        (&[0x41, 0x50], "push r8"),
        (&[0x41, 0x57], "push r15"),
        (&[0x90], "nop"),
        (&[0xeb, 0x20], "jmp short"),
        (&[0xe9, 0, 1, 0, 0], "jmp"),
        (&[0xe8, 0, 1, 0, 0], "call"),
        (&[0x7f, 0x20], "jg short"),
        (&[0x0f, 0x8f, 0, 1, 0, 0], "jg"),
    ];
    for (bytes, text) in instructions {
        let point = at_entry(Function::Malloc, bytes);
        assert!(point.instruction.starts_with(text), "{point:?}");
        assert_eq!((point.offset, point.emulated), (0, true), "{point:?}");
        let behind = [&[0xf3, 0x0f, 0x1e, 0xfa], bytes].concat();
        let point = at_entry(Function::Malloc, &behind);
        assert!(point.instruction.starts_with(text), "{point:?}");
        assert_eq!((point.offset, point.emulated), (4, true), "{point:?}");
    }
}

/// Check that what some kernels step, refuse, or take for something else is not
/// counted as emulated, and ends the search where it is a branch.
#[test]
fn not_emulated() {
    use Refusal::*;
    let instructions: [(&[u8], Refusal); 14] = [
        // jmp and jcc with an operand size prefix
        (&[0x66, 0xe9, 0, 1], Branch),
        (&[0x66, 0x74, 0x20], Branch),
        // jcc with a hint, bnd jmp
        (&[0x2e, 0x74, 0x20], Branch),
        (&[0xf2, 0xe9, 0, 1, 0, 0], Branch),
        // jrcxz, loop, jmp rax, call rax, ret
        (&[0xe3, 0x20], Branch),
        (&[0xe2, 0x20], Branch),
        (&[0xff, 0xe0], Branch),
        (&[0xff, 0xd0], Branch),
        (&[0xc3], Branch),
        // syscall: enters the kernel, returns here or does not
        (&[0x0f, 0x05], Branch),
        // push with other prefixes, of memory, of a number
        (&[0x48, 0x50], StackPointerMoved),
        (&[0x66, 0x50], StackPointerMoved),
        (&[0xff, 0x30], StackPointerMoved),
        (&[0x6a, 0x01], StackPointerMoved),
    ];
    for (bytes, refusal) in instructions {
        let code = [bytes, &[0x90; 8]].concat();
        expect_refusal(Function::Malloc, &code, refusal);
    }
    // nopl, xchg ax, ax, pause, xchg r8, rax: passed over
    let nops: [&[u8]; 4] = [
        &[0x0f, 0x1f, 0x44, 0x00, 0x00],
        &[0x66, 0x90],
        &[0xf3, 0x90],
        &[0x49, 0x90],
    ];
    for bytes in nops {
        let code = [bytes, &[0x55]].concat();
        expect(Function::Malloc, &code, bytes.len() as u32, "push rbp");
    }
}

/// Check that what no program executes in passing ends the search.
#[test]
fn no_instructions() {
    // int3, int 0x80, ud2, hlt, in, no instruction at all
    let codes: [&[u8]; 6] = [
        &[0xcc],
        &[0xcd, 0x80],
        &[0x0f, 0x0b],
        &[0xf4],
        &[0xec],
        &[0x06],
    ];
    for bytes in codes {
        let code = [bytes, &[0x90; 16]].concat();
        expect_refusal(Function::Malloc, &code, Refusal::Undecodable);
        // test rdi, rdi before it
        let code = [&[0x48, 0x85, 0xff], bytes, &[0x90; 16]].concat();
        expect_refusal(Function::Free, &code, Refusal::Undecodable);
    }
}

/// Check that an argument must be in place, whole, at the site: each register
/// that is read, and no other.
#[test]
fn arguments_in_place() {
    use Refusal::ArgumentWritten;
    const PUSH: &[u8] = &[0x55];
    let mov_rdi: &[u8] = &[0x48, 0x89, 0xc7];
    let xor_edi: &[u8] = &[0x31, 0xff];
    let mov_dil: &[u8] = &[0x40, 0xb7, 1];
    let mov_si: &[u8] = &[0x66, 0xbe, 1, 0];
    let mov_dh: &[u8] = &[0xb6, 1];
    let mul_rsi: &[u8] = &[0x48, 0xf7, 0xe6];
    let cmove_rdi: &[u8] = &[0x48, 0x0f, 0x44, 0xf8];
    let rep_movsb: &[u8] = &[0xf3, 0xa4];
    for (function, bytes, refused) in [
        (Function::Malloc, mov_rdi, true),
        (Function::Malloc, xor_edi, true),
        (Function::Malloc, mov_dil, true),
        (Function::Malloc, cmove_rdi, true),
        (Function::Malloc, rep_movsb, true),
        (Function::Malloc, mov_si, false),
        (Function::Free, xor_edi, true),
        (Function::Free, mov_si, false),
        (Function::Calloc, mov_si, true),
        (Function::Calloc, mul_rsi, false),
        (Function::Realloc, mov_si, true),
        (Function::Realloc, mov_dh, false),
        (Function::Reallocarray, mul_rsi, true),
        (Function::Reallocarray, mov_dh, true),
        (Function::PosixMemalign, mov_dh, true),
        (Function::AlignedAlloc, mov_si, true),
        (Function::Memalign, xor_edi, true),
        (Function::Valloc, xor_edi, true),
        (Function::Pvalloc, mov_si, false),
    ] {
        let code = [bytes, PUSH].concat();
        if refused {
            expect_refusal(function, &code, ArgumentWritten);
        } else {
            expect(function, &code, bytes.len() as u32, "push rbp");
        }
    }
}

/// Check that a function that returns a block is probed with the return address
/// at the stack pointer, and that `free`, which has no return probe, need not be.
#[test]
fn stack_pointer_in_place() {
    let codes: [&[u8]; 4] = [
        // sub rsp, 24
        &[0x48, 0x83, 0xec, 0x18],
        // lea rsp, [rsp-8]
        &[0x48, 0x8d, 0x64, 0x24, 0xf8],
        // pop rax
        &[0x58],
        // and esp, -16
        &[0x83, 0xe4, 0xf0],
    ];
    for bytes in codes {
        let code = [bytes, &[0x53]].concat();
        expect_refusal(Function::Malloc, &code, Refusal::StackPointerMoved);
        expect(Function::Free, &code, bytes.len() as u32, "push rbx");
    }
}

/// Check that a site behind the entry must not be a target of the function's own
/// jumps, the entry may be, and an entry that is emulated does not move.
#[test]
fn jump_targets() {
    // cmp rdi, 1; jmp to ...
    let jump_to = |target: i8| {
        [
            &[0x48, 0x83, 0xff, 0x01, 0x74, 0x10, 0x90, 0x90][..],
            &[0xeb, (target - 10).cast_unsigned()],
        ]
        .concat()
    };
    expect(Function::Free, &jump_to(0), 4, "je short 0x1016");
    expect(Function::Free, &jump_to(5), 4, "je short 0x1016");
    for target in 1..=4 {
        expect_refusal(Function::Free, &jump_to(target), Refusal::JumpTarget);
    }
    // The site itself may be such a jump: test rdi, rdi; je back to itself.
    expect_refusal(
        Function::Free,
        &[0x48, 0x85, 0xff, 0x74, 0xfe],
        Refusal::JumpTarget,
    );
    expect(Function::Free, &[0x55, 0xeb, 0xfd], 0, "push rbp");
}

/// Check that a branch that is stepped is not passed, with cheap instructions
/// behind it: not every call reaches them.
#[test]
fn every_call_passes() {
    // jrcxz; push rbp
    expect_refusal(Function::Malloc, &[0xe3, 0x20, 0x55], Refusal::Branch);
    // test rdi, rdi; je; push rbp: the je, not the push
    expect(
        Function::Free,
        &[0x48, 0x85, 0xff, 0x74, 0x20, 0x55],
        3,
        "je short 0x1025",
    );
    // xbegin: may go on elsewhere
    expect_refusal(
        Function::Malloc,
        &[0xc7, 0xf8, 0x20, 0, 0, 0, 0x55],
        Refusal::Branch,
    );
}

/// Check that a function that is over before, in the middle of an instruction
/// too, or of which nothing is known, is probed at its entry.
#[test]
fn function_ends() {
    expect_refusal(Function::Free, &[0x48, 0x85, 0xff], Refusal::FunctionEnds);
    expect_refusal(
        Function::Free,
        &[0x48, 0x85, 0xff, 0x0f, 0x84],
        Refusal::FunctionEnds,
    );
    expect_refusal(Function::Malloc, &[], Refusal::FunctionEnds);
}

/// Check that no bytes at all panic the choice, and that a site it finds is
/// within them.
#[test]
fn any_bytes() {
    let mut state = 1_u64;
    let mut random = || {
        // Knuth's MMIX generator.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..random() % 48).map(|_| random() as u8).collect();
        let function = Function::ALL[random() % Function::ALL.len()];
        let address = [0, ADDRESS, u64::MAX - 8][random() % 3];
        let point = choose(
            function,
            function.places(),
            Code {
                bytes: &bytes,
                address,
            },
        );
        assert!(
            point.offset == 0 || (point.offset as usize) < bytes.len(),
            "{bytes:x?} {point:?}"
        );
        assert_eq!(point.emulated, point.refusal.is_none());
    }
}

/// Check that a pool's function is probed where the arguments that its user has named are
/// still in their registers, and the stack pointer is what it was, also of one that gives
/// blocks up.
#[test]
fn pools() {
    use memprof_common::config::Places;
    let point = |function, places, bytes: &[u8]| {
        let address = ADDRESS;
        choose(function, Some(places), Code { bytes, address })
    };
    let size = |size| Places {
        size,
        ..Places::default()
    };
    // mov $1, %ecx; push %rbp
    let code = [0xb9, 1, 0, 0, 0, 0x55];
    assert_eq!(point(Function::Pool, size(2), &code).offset, 5);
    for places in [
        size(3),
        size(5),
        Places {
            count: Some(3),
            ..size(0)
        },
        Places {
            out: Some(4),
            ..size(0)
        },
    ] {
        let point = point(Function::Pool, places, &code);
        assert_eq!(
            (point.offset, point.refusal),
            (0, Some(Refusal::ArgumentWritten))
        );
    }
    // sub $8, %rsp; push %rbp
    let code = [0x48, 0x83, 0xec, 8, 0x55];
    for function in [Function::Pool, Function::PoolFree] {
        let point = point(function, size(0), &code);
        assert_eq!(
            point.refusal,
            Some(Refusal::StackPointerMoved),
            "{function:?}"
        );
    }
}
