//! Damaged and malicious files: an error or a table that holds what BPF relies on, in
//! bounded time; never a panic.

use super::{
    CompileError, compile_image, section,
    testing::{Random, compile_section, frames, mutate},
    tests::check_invariants,
};
use crate::address::VirtOffset;

/// Check that the made section is a good one: what follows would be worth little.
#[test]
fn the_seed_is_good() {
    // Advance 4: CFA + 16.
    let bytes = frames(&[], 10, &[0x44, 0x0e, 16]);
    let table = compile_section(&bytes, section::Kind::EhFrame).unwrap();
    check_invariants(&table);
    assert_eq!((table.functions, table.damaged), (10, 0));
    assert_eq!(table.lookup(VirtOffset(0x1103)).cfa_offset(), 8);
    assert_eq!(table.lookup(VirtOffset(0x1104)).cfa_offset(), 16);
    assert_eq!(table.lookup(VirtOffset(0x1a00)).kind(), 0);
}

/// Check that a header whose instructions take long, run for many functions, is refused.
#[test]
fn long_headers_are_not_run_for_ever() {
    let bytes = frames(&vec![0; 60_000], 4000, &[]);
    let error = compile_section(&bytes, section::Kind::EhFrame).unwrap_err();
    assert!(matches!(error, CompileError::TooMuch(_)), "{error}");
}

/// Check that a function that ends before its rows do, remembers without end or restores
/// what was never remembered is left out alone.
#[test]
fn damaged_functions_are_left_out() {
    for code in [&[0x0a; 40][..], &[0x0b], &[0x02], &[0x0f, 0xff, 0xff, 0x7f]] {
        let bytes = frames(&[], 3, code);
        match compile_section(&bytes, section::Kind::EhFrame) {
            Ok(table) => {
                check_invariants(&table);
                assert!(table.damaged > 0 || table.functions == 3, "{code:x?}");
            }
            Err(error) => assert!(matches!(error, CompileError::NoUnwindInfo), "{error}"),
        }
    }
}

/// Check 20,000 mutations of a small section: bits, bytes, lengths at their extremes,
/// parts cut out, doubled and cut off.
#[test]
fn mutated_sections() {
    let seeds = [
        frames(
            &[],
            6,
            &[0x44, 0x0e, 16, 0x86, 2, 0x41, 0x0d, 6, 0x50, 0x0c, 7, 8],
        ),
        frames(
            &[0x0f, 3, 0x76, 0x78, 0x06],
            4,
            &[0x0a, 0x42, 0x0e, 24, 0x0b],
        ),
    ];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut good = 0;
    for round in 0..20_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut bytes, &mut random);
        }
        let kind = if round % 5 == 0 {
            section::Kind::DebugFrame
        } else {
            section::Kind::EhFrame
        };
        if let Ok(table) = compile_section(&bytes, kind) {
            check_invariants(&table);
            good += 1;
        }
    }
    // They must get past the first check.
    assert!(good > 2000, "{good}");
}

/// Check mutations of whole files: of their headers most of all.
#[test]
fn mutated_files() {
    let seed = std::fs::read("/bin/true").unwrap();
    let mut random = Random(42);
    for round in 0..600 {
        let mut bytes = seed.clone();
        for _ in 0..=random.below(6) {
            let place = if round % 2 == 0 {
                random.below(1024)
            } else {
                bytes.len() - 1 - random.below(4096.min(bytes.len() - 1))
            };
            bytes[place] = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(6)];
        }
        if round % 7 == 0 {
            bytes.truncate(random.below(seed.len()));
        }
        if let Ok(table) = compile_image(&bytes) {
            check_invariants(&table);
        }
    }
}
