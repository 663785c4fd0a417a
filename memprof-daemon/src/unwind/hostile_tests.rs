//! Damaged and malicious files: an error or a table that holds what BPF relies on, in
//! bounded time; never a panic.

use super::{CompileError, Table, compile_image, rows, section, table, tests::check_invariants};
use crate::address::{FileOffset, VirtOffset};
use crate::process::elf::{ElfLayout, Segment};

/// A generator that needs no crate; the same numbers each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

fn layout() -> ElfLayout {
    let mut layout = ElfLayout::default();
    layout.segments.push(Segment {
        file_offset: FileOffset(0),
        address: VirtOffset(0x1000),
        file_size: 0x10_0000,
        executable: true,
    });
    layout
}

fn compile_section(bytes: &[u8], kind: section::Kind) -> Result<Table, CompileError> {
    let bytes = section::Bytes {
        bytes: bytes.to_vec(),
        address: 0x20_0000,
        kind,
    };
    let code = rows::Code::of(&layout())?;
    table::build(&code, rows::collect(&bytes, &code)?)
}

/// A header with these instructions, and functions at 0x1000, 0x1100...
fn frames(header_code: &[u8], functions: usize, function_code: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let entry = |bytes: &mut Vec<u8>, body: &[u8]| {
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(body);
    };
    // Version 1, no augmentation, alignments 1 and -8, return address in 16.
    let mut header = vec![0, 0, 0, 0, 1, 0, 1, 0x78, 16];
    // CFA = rsp + 8, return address below.
    header.extend([0x0c, 7, 8, 0x90, 1]);
    header.extend(header_code);
    entry(&mut bytes, &header);
    for number in 0..functions {
        let mut function = Vec::new();
        function.extend((bytes.len() as u32 + 4).to_le_bytes());
        function.extend((0x1000 + number as u64 * 0x100).to_le_bytes());
        function.extend(0x100_u64.to_le_bytes());
        function.extend(function_code);
        entry(&mut bytes, &function);
    }
    bytes.extend([0; 4]);
    bytes
}

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

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let place = random.below(bytes.len());
    match random.below(6) {
        0 => bytes[place] ^= 1 << random.below(8),
        1 => bytes[place] = random.below(256) as u8,
        2 => {
            let extreme = [0_u32, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff];
            let value = extreme[random.below(extreme.len())].to_le_bytes();
            let end = (place + 4).min(bytes.len());
            bytes[place..end].copy_from_slice(&value[..end - place]);
        }
        3 => bytes.truncate(place),
        4 => {
            let end = (place + random.below(32)).min(bytes.len());
            let part = bytes[place..end].to_vec();
            let at = random.below(bytes.len());
            bytes.splice(at..at, part);
        }
        _ => {
            let end = (place + random.below(32)).min(bytes.len());
            bytes.drain(place..end);
        }
    }
}
