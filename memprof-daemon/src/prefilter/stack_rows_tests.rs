use super::*;

const AT: u64 = 0x7000_0000;

fn rows_of(code: &[u8]) -> Vec<Row> {
    let entered = Entered {
        at: AT,
        depth: CALLED,
    };
    rows(code, AT, &[entered])
}

fn sp(depth: i64) -> Rule {
    Rule::narrow(false, depth, BpRule::Same, 0).unwrap()
}

fn saved(depth: i64, below: i64) -> Rule {
    Rule::narrow(false, depth, BpRule::AtCfa, -below).unwrap()
}

/// Check that pushes, pops, changes of the stack pointer and a saved rbp are followed, up to a
/// return, and that there is no rule behind it.
#[test]
fn straight_code() {
    let code = [
        // push rax; push rbp; mov rbp, rsp; sub rsp, 0x38; lea rsp, [rsp+0x38]; pop rbp
        &[0x50][..],
        &[0x55],
        &[0x48, 0x89, 0xe5],
        &[0x48, 0x83, 0xec, 0x38],
        &[0x48, 0x8d, 0x64, 0x24, 0x38],
        &[0x5d],
        // add rsp, 8; ret; int3
        &[0x48, 0x83, 0xc4, 8],
        &[0xc3],
        &[0xcc],
    ]
    .concat();
    assert_eq!(
        rows_of(&code),
        [
            (0, sp(8)),
            (1, sp(16)),
            (2, saved(24, 24)),
            (9, saved(80, 24)),
            (14, saved(24, 24)),
            (15, sp(16)),
            (19, sp(8)),
            (20, Rule::NONE),
        ]
    );
}

/// Check that both ways of a branch are followed, also out of the code, that loops end, what is
/// called is entered as by a call, and what nothing leads to has no rule.
#[test]
fn branches_and_calls() {
    let code = [
        // 0: je 5; push rcx; jmp 4 bytes past the end of all; 5: call 13; ret; int3; int3
        &[0x74, 3][..],
        &[0x51],
        &[0xeb, 0x40],
        &[0xe8, 3, 0, 0, 0],
        &[0xc3, 0xcc, 0xcc],
        // 13: push rdx; pop rdx; jmp 13
        &[0x52, 0x5a],
        &[0xeb, 0xfc],
    ]
    .concat();
    let found = rows_of(&code);
    let at = |offset: u32| {
        let found = found.iter().rev().find(|row| row.0 <= offset);
        found.unwrap().1
    };
    assert_eq!(
        (at(0), at(2), at(3), at(5), at(10)),
        (sp(8), sp(8), sp(16), sp(8), sp(8))
    );
    assert_eq!(
        (at(13), at(14), at(15), at(17)),
        (sp(8), sp(16), sp(8), Rule::NONE)
    );
    assert_eq!(at(12), Rule::NONE);
}

/// Check that a stack pointer which cannot be told, and one that differs by the way that was
/// taken, are no rule to follow.
#[test]
fn what_cannot_be_told() {
    // and rsp, -16; ret
    let realigned = rows_of(&[0x48, 0x83, 0xe4, 0xf0, 0xc3]);
    assert_eq!(
        realigned,
        [(0, sp(8)), (4, Rule::UNSUPPORTED), (5, Rule::NONE)]
    );
    // je +1; push rcx; nop; ret
    let two_ways = rows_of(&[0x74, 1, 0x51, 0x90, 0xc3]);
    assert_eq!(
        two_ways,
        [(0, sp(8)), (3, Rule::UNSUPPORTED), (5, Rule::NONE)]
    );
    // xor ebp, ebp; ret: the caller's is lost.
    let lost = Rule::narrow(false, 8, BpRule::Undefined, 0).unwrap();
    let rows = rows_of(&[0x31, 0xed, 0xc3]);
    assert_eq!(rows, [(0, sp(8)), (2, lost), (3, Rule::NONE)]);
    // pop rax; pop rax; pop rax: above the caller's.
    let rows = rows_of(&[0x58, 0x58]);
    assert_eq!(rows[1], (1, Rule::UNSUPPORTED));
}

/// Check what the code that undoes a first instruction moves.
#[test]
fn moves() {
    // lea rsp, [rsp+0x18]; nothing; mov rsp, rax
    assert_eq!(moves_stack_by(&[0x48, 0x8d, 0x64, 0x24, 0x18]), Some(0x18));
    assert_eq!(moves_stack_by(&[]), Some(0));
    assert_eq!(moves_stack_by(&[0x48, 0x89, 0xc4]), None);
}
