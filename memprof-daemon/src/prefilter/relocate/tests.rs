use std::{collections::BTreeMap, fs, path::Path};

use object::read::{Object as _, ObjectSegment as _, ObjectSymbol as _};

use super::*;
use crate::unwind::testing::Random;

const ADDRESS: u64 = 0x40_1000;
/// Code that goes on.
const NOPS: [u8; 16] = [0x90; 16];

fn code(first: &[u8]) -> Vec<u8> {
    [first, &NOPS].concat()
}

fn refusal(first: &[u8]) -> Refusal {
    displace(&code(first), ADDRESS).unwrap_err()
}

/// How many bytes are displaced, behind how many.
fn displaced(first: &[u8]) -> (u64, usize) {
    let displaced = displace(&code(first), ADDRESS).unwrap();
    (displaced.address - ADDRESS, displaced.bytes.len())
}

/// Check that whole instructions are taken until there is space for a jump, none of them
/// `endbr64`, and that the last may leave.
#[test]
fn whole_instructions() {
    // push r15; push r14; push r13
    let pushes = [0x41, 0x57, 0x41, 0x56, 0x41, 0x55];
    assert_eq!(displaced(&pushes), (0, 6));
    assert_eq!(
        displaced(&[&[0xf3, 0x0f, 0x1e, 0xfa], &pushes[..]].concat()),
        (4, 6)
    );
    // mov eax, 1; mov r10, 1
    assert_eq!(displaced(&[0xb8, 1, 0, 0, 0]), (0, 5));
    assert_eq!(
        displaced(&[0x90, 0x90, 0x90, 0x90, 0x49, 0xba, 1, 0, 0, 0, 0, 0, 0, 0]),
        (0, 14)
    );
    // jmp; mov rax, rdi; pop rbx; ret; jmp [rip]
    for leaves in [
        &[0xe9, 0, 1, 0, 0][..],
        &[0x48, 0x89, 0xf8, 0x5b, 0xc3],
        &[0xff, 0x25, 0, 1, 0, 0],
    ] {
        let displaced = displace(leaves, ADDRESS).unwrap();
        assert!(!displaced.goes_on);
        assert!(!displaced.references().any(|place| place == displaced.end()));
    }
}

/// Check each reason for which a function is refused.
#[test]
fn refusals() {
    assert_eq!(
        displace(&[], ADDRESS).unwrap_err(),
        Refusal::TooShort { bytes: 0 }
    );
    // xor eax, eax; ret
    let short = displace(&[0x31, 0xc0, 0xc3], ADDRESS);
    assert_eq!(short.unwrap_err(), Refusal::TooShort { bytes: 3 });
    let behind = displace(&[0xf3, 0x0f, 0x1e, 0xfa, 0x90, 0x90], ADDRESS);
    assert_eq!(behind.unwrap_err(), Refusal::TooShort { bytes: 2 });
    // An instruction that the function ends in.
    let cut = displace(&[0x48, 0xb8, 1, 2, 3, 4, 5], ADDRESS);
    assert_eq!(cut.unwrap_err(), Refusal::TooShort { bytes: 7 });
    assert_eq!(refusal(&[0x31, 0xc0, 0xc3]), Refusal::Leaves);
    assert_eq!(refusal(&[0xeb, 0x10]), Refusal::Leaves);
    // sub rsp, 8; call
    assert_eq!(
        refusal(&[0x48, 0x83, 0xec, 8, 0xe8, 0, 1, 0, 0]),
        Refusal::Call
    );
    assert_eq!(refusal(&[0xff, 0xd0]), Refusal::Call);
    // ud2, hlt, syscall, push es, xbegin, jump far.
    for bytes in [
        &[0x0f, 0x0b][..],
        &[0xf4],
        &[0x0f, 0x05],
        &[0x06],
        &[0xc7, 0xf8, 0, 0, 0, 0],
        &[0xff, 0x2f],
    ] {
        assert_eq!(refusal(bytes), Refusal::NotMovable(ADDRESS), "{bytes:x?}");
    }
    assert_eq!(refusal(&[0x55, 0xcc]), Refusal::Breakpoint(ADDRESS + 1));
    // lea rbx, [rip - 7], as code of the large model begins.
    let own = [0x48, 0x8d, 0x1d, 0xf9, 0xff, 0xff, 0xff];
    assert_eq!(refusal(&own), Refusal::RefersToItself(ADDRESS));
    // A second endbr64.
    let twice = [0xf3, 0x0f, 0x1e, 0xfa].repeat(2);
    assert_eq!(refusal(&twice), Refusal::JumpTarget(ADDRESS + 4));
    let page = displace(&NOPS, ADDRESS + 0xff9);
    assert_eq!(page.unwrap_err(), Refusal::CrossesPage(ADDRESS + 0xff9));
    assert!(displace(&NOPS, ADDRESS + 0xff8).is_ok());
}

/// Check that branches to between the displaced instructions are found, wherever in the
/// function they are, and those back to the entry; those to behind do no harm.
#[test]
fn jumps_back() {
    for (distance, expected) in [
        (-17, Some(Refusal::Loops(ADDRESS))),
        (-16, Some(Refusal::JumpTarget(ADDRESS + 1))),
        (-13, Some(Refusal::JumpTarget(ADDRESS + 4))),
        (-12, None),
    ] {
        for condition in [0x70, 0xeb, 0xe2, 0xe3] {
            let mut bytes = vec![0x90; 15];
            bytes.extend([condition, i8::cast_unsigned(distance)]);
            assert_eq!(displace(&bytes, ADDRESS).err(), expected, "{condition:x}");
        }
    }
    // A call to itself is a call.
    let mut calls = NOPS.to_vec();
    calls.extend([0xe8, 0xeb, 0xff, 0xff, 0xff]);
    assert!(displace(&calls, ADDRESS).is_ok());
    // lea rax, [rip - 20]: somebody may jump there.
    let mut takes = NOPS.to_vec();
    takes.extend([0x48, 0x8d, 0x05, 0xec, 0xff, 0xff, 0xff]);
    assert_eq!(
        displace(&takes, ADDRESS).unwrap_err(),
        Refusal::JumpTarget(ADDRESS + 3)
    );
    // Among themselves they may jump, but not into each other.
    assert_eq!(displaced(&[0x75, 0x01, 0x90, 0x90, 0x90]), (0, 5));
    assert_eq!(displaced(&[0xff, 0xc9, 0x75, 0xfc, 0x90]), (0, 5));
    // But not to the endbr64 before them.
    let again = refusal(&[0xf3, 0x0f, 0x1e, 0xfa, 0xff, 0xc9, 0x75, 0xf8, 0x90]);
    assert_eq!(again, Refusal::Loops(ADDRESS));
    let into = refusal(&[0x75, 0x01, 0x48, 0x89, 0xc0]);
    assert_eq!(into, Refusal::JumpTarget(ADDRESS + 3));
}

/// Check that a first instruction stays where the next can be jumps' place, is executed with
/// the others, and does not where something leads to the second, or it finds what is
/// displaced, or has to be at the start anyway.
#[test]
fn first_stays() {
    let behind = |first: &[u8]| {
        let displaced = displace_behind_first(&code(first), ADDRESS).unwrap();
        (displaced.address - ADDRESS, displaced.bytes.len())
    };
    // push r15; push r14; push r13; push r12
    let pushes = [0x41, 0x57, 0x41, 0x56, 0x41, 0x55, 0x41, 0x54];
    assert_eq!(behind(&pushes), (2, 6));
    let displaced = displace_behind_first(&code(&pushes), ADDRESS).unwrap();
    assert_eq!(displaced.inside(), ADDRESS + 2..ADDRESS + 8);
    assert_eq!(displaced.undo().len(), 8);
    let moved = displaced.relocate(ADDRESS + 0x1000).unwrap();
    assert_eq!(moved.bytes[..8], pushes);
    // endbr64; push r15; ...
    let marked = [&[0xf3, 0x0f, 0x1e, 0xfa], &pushes[..]].concat();
    assert_eq!(behind(&marked), (4, 6));
    // xor eax, eax; nop ...: not fit
    assert_eq!(behind(&[0x31, 0xc0]), (0, 5));
    // push r15; je to itself: back to the second
    assert_eq!(behind(&[0x41, 0x57, 0x74, 0xfe]), (2, 5));
    let loops = code(&[0x41, 0x57, 0x90, 0x90, 0x90, 0x90, 0x90, 0x74, 0xf9]);
    assert_eq!(
        displace_behind_first(&loops, ADDRESS).unwrap_err(),
        Refusal::JumpTarget(ADDRESS + 2)
    );
    // cmp byte [rip + 1], 0
    assert_eq!(behind(&[0x80, 0x3d, 1, 0, 0, 0, 0]), (0, 7));
    assert_eq!(behind(&[0x80, 0x3d, 0, 1, 0, 0, 0]), (7, 5));
    // test [rip + 0x100], r14b; lea rcx, [rip - 14], which is the function's address
    let own = [
        0x44, 0x84, 0x35, 0, 1, 0, 0, 0x48, 0x8d, 0x0d, 0xf2, 0xff, 0xff, 0xff,
    ];
    assert_eq!(behind(&own), (0, 7));
    let mut other = own;
    other[10] = 0xf1;
    assert_eq!(behind(&other), (7, 7));
}

/// Check that what is out of reach is refused, from both sides, and that the last place from
/// where it can be reached is not.
#[test]
fn reach() {
    // mov rax, [rip + 0x7000]
    let code = code(&[0x48, 0x8b, 0x05, 0, 0x70, 0, 0]);
    let address = 0x7f00_0000_0000;
    let displaced = displace(&code, address).unwrap();
    let data = address + 0x7007;
    assert_eq!(
        displaced.references().collect::<Vec<_>>(),
        [data, address + 7]
    );
    let (low, high) = (
        data - 0x7fff_ffff,
        address + 7 + 0x8000_0000 - MAX_RELOCATED_BYTES as u64,
    );
    for to in [low, high] {
        check_same(&displaced, &displaced.relocate(to).unwrap(), to);
    }
    let target = data;
    let from = low - 1;
    assert_eq!(
        displaced.relocate(from).unwrap_err(),
        Refusal::OutOfReach { from, target }
    );
    let target = address + 7;
    let from = high + 1;
    assert_eq!(
        displaced.relocate(from).unwrap_err(),
        Refusal::OutOfReach { from, target }
    );
}

/// Check that the most instructions, and the longest, stay within what is said to be the
/// most they take.
#[test]
fn longest() {
    // loop, twice, and jrcxz, to behind.
    let loops = [0xe2, 0x10, 0xe2, 0x10, 0xe3, 0x10];
    // Four short instructions and one of 15 bytes: lock add dword [...], imm32 with prefixes.
    let long = [
        0x50, 0x51, 0x52, 0x53, 0x64, 0xf0, 0x67, 0x41, 0x81, 0x84, 0x83, 1, 2, 3, 4, 5, 6, 7, 8,
    ];
    for first in [&loops[..], &long] {
        let displaced = displace(&code(first), ADDRESS).unwrap();
        assert_eq!(displaced.bytes.len(), first.len());
        let to = ADDRESS + 0x1000_0000;
        let moved = displaced.relocate(to).unwrap();
        check_same(&displaced, &moved, to);
        assert!(moved.bytes.len() <= MAX_RELOCATED_BYTES);
    }
}

/// Panics unless the `bytes` at `to` mean what the displaced instructions meant: the same
/// instructions with the same operands, places and goals, and a jump back. A thread at one of
/// the originals can go on at its copy, unless that has become several.
fn check_same(displaced: &Displaced, Relocated { bytes, moves }: &Relocated, to: u64) {
    let moved: Vec<Instruction> = Decoder::with_ip(64, bytes, to, DecoderOptions::NONE)
        .into_iter()
        .collect();
    let mut rest = moved.iter();
    // Where each displaced instruction is now.
    let mut places = BTreeMap::new();
    let mut branches = Vec::new();
    let mut severals = 0;
    for original in &displaced.instructions {
        let now = rest.next().expect("an instruction");
        let there = moves.iter().find(|one| one.text == original.ip());
        assert!(there.is_none_or(|there| there.image == now.ip()));
        severals += usize::from(there.is_none());
        places.insert(original.ip(), now.ip());
        let Some(target) = branch_target(original) else {
            assert_eq!(original, now, "at {:#x}", original.ip());
            continue;
        };
        let mut near = [*original, *now];
        for each in &mut near {
            each.as_near_branch();
            each.set_near_branch64(0);
        }
        assert_eq!(near[0], near[1], "at {:#x}", original.ip());
        let mut goal = now.near_branch_target();
        let has_short_only = original.code().as_near_branch() == original.code()
            && original.flow_control() == FlowControl::ConditionalBranch
            && original.len() == 2;
        if has_short_only && !displaced.range().contains(&target) {
            // Over a jump over a jump.
            let (over, there) = (rest.next().unwrap(), rest.next().unwrap());
            assert_eq!([over.mnemonic(), there.mnemonic()], [Mnemonic::Jmp; 2]);
            assert_eq!(over.near_branch_target(), there.next_ip());
            assert_eq!(goal, there.ip());
            goal = there.near_branch_target();
            severals -= 1;
        }
        branches.push((target, goal));
    }
    for (target, goal) in branches {
        assert_eq!(goal, places.get(&target).copied().unwrap_or(target));
    }
    if displaced.goes_on {
        let back = rest.next().expect("a jump back");
        assert_eq!(back.code(), Code::Jmp_rel32_64);
        assert_eq!(back.near_branch_target(), displaced.end());
        let behind = moves.last().expect("the jump back");
        assert_eq!((behind.text, behind.image), (displaced.end(), back.ip()));
    }
    assert_eq!(severals, 0, "no place to go on at: {bytes:02x?}");
    assert!(rest.next().is_none(), "more than that: {bytes:02x?}");
}

/// Functions that `path` exports: address and code.
fn exported(path: &Path) -> Vec<(u64, Vec<u8>)> {
    let file = fs::read(path).unwrap();
    let object = object::File::parse(&*file).unwrap();
    let symbols = object.dynamic_symbols();
    let functions = symbols.filter(|symbol| {
        symbol.kind() == object::SymbolKind::Text && symbol.is_definition() && symbol.size() > 0
    });
    let code = |symbol: object::Symbol<'_, '_>| {
        let (address, size) = (symbol.address(), symbol.size().min(4096));
        let segments = object.segments();
        let bytes = segments
            .filter_map(|part| part.data_range(address, size).ok()?)
            .next()?;
        Some((address, bytes.to_vec()))
    };
    let mut all: Vec<_> = functions.filter_map(code).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Check the functions of large libraries: each refused, or moved with the same meaning.
#[test]
fn every_function_of_real_libraries() {
    let libraries = Path::new("/usr/lib/x86_64-linux-gnu");
    let mut random = Random(1);
    let mut all = 0;
    for (name, one_in) in [
        ("libc.so.6", 1),
        ("libstdc++.so.6", 1),
        ("libpython3.11.so.1.0", 1),
        ("libjemalloc.so.2", 1),
        ("libtcmalloc.so.4", 1),
        ("libLLVM-14.so.1", 8),
    ] {
        let path = libraries.join(name);
        assert!(path.exists(), "needs {}", path.display());
        let mut counts = BTreeMap::new();
        let mut moved = 0_usize;
        let functions: Vec<_> = exported(&path).into_iter().step_by(one_in).collect();
        for (address, code) in &functions {
            // Where libraries are, and as far away as is allowed.
            let address = address + 0x7f00_0000_0000;
            let distance = random.below(0x7000_0000) as u64;
            let to = if random.below(2) == 0 {
                address - distance
            } else {
                address + distance
            };
            match displace(code, address) {
                Ok(displaced) => match displaced.relocate(to) {
                    Ok(relocated) => {
                        check_same(&displaced, &relocated, to);
                        moved += 1;
                    }
                    Err(refusal) => panic!("{name} {address:#x}: {refusal}"),
                },
                Err(refusal) => {
                    let kind = format!("{refusal:?}");
                    let kind = kind.split([' ', '(']).next().unwrap().to_owned();
                    *counts.entry(kind).or_insert(0_usize) += 1;
                }
            }
        }
        println!(
            "{name}: {} functions, {moved} moved, {counts:?}",
            functions.len()
        );
        assert!(moved * 10 > functions.len() * 7, "most of {name}");
        all += moved;
    }
    assert!(all > 5000, "{all}");
}
