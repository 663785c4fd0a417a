use std::{fs::File, path::Path};

use gimli::{
    BaseAddresses, CfaRule, EhFrame, LittleEndian, RegisterRule, UnwindContext, UnwindSection as _,
    X86_64,
};
use memprof_common::unwind::{
    rule::{BpRule, Rule, RuleKind, WideRule},
    table::{page_rows, row_address, row_rule},
};

use super::{
    Table, compile, compile_image, section,
    testing::{compile_section, frames},
};
use crate::{address::VirtOffset, process::elf::ElfLayout};

/// Check what BPF relies on: a first row at the origin, rows that ascend and differ from
/// their neighbours, pages that name exactly the rows that begin in them.
pub(super) fn check_invariants(table: &Table) {
    assert_eq!(row_address(table.rows[0]), 0);
    for pair in table.rows.windows(2) {
        assert!(row_address(pair[0]) < row_address(pair[1]));
        assert_ne!(row_rule(pair[0]), row_rule(pair[1]));
    }
    assert_eq!(row_rule(*table.rows.last().unwrap()), Rule::NONE);
    let mut next = 0;
    for (number, &page) in table.pages.iter().enumerate() {
        let (first, end) = page_rows(page);
        assert_eq!(first, next);
        for row in &table.rows[first as usize..end as usize] {
            assert_eq!(row_address(*row) as usize >> 10, number);
        }
        next = end;
    }
    assert_eq!(next as usize, table.rows.len());
    for &row in &table.rows {
        let rule = row_rule(row);
        if rule.kind() == RuleKind::Wide as u32 {
            assert!((rule.wide_index() as usize * 2) < table.wide.len());
        }
    }
}

/// Files that are on every machine that builds this.
fn files() -> Vec<File> {
    let mut paths = vec!["/proc/self/exe".to_owned()];
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for line in maps.lines().filter(|line| line.contains("r-xp")) {
        if let Some(at) = line.find('/')
            && Path::new(&line[at..]).exists()
        {
            paths.push(line[at..].to_owned());
        }
    }
    paths.push("/bin/bash".to_owned());
    paths.sort();
    paths.dedup();
    paths.iter().map(|path| File::open(path).unwrap()).collect()
}

/// Check the table of each file against gimli's own search: at the first and the last
/// address of every function, at the beginning of every row and before it.
#[test]
fn agrees_with_gimli() {
    let mut compared = 0;
    for file in files() {
        let table = compile(&file).unwrap();
        check_invariants(&table);
        assert_eq!(table.damaged, 0);
        let layout = ElfLayout::read(&file).unwrap();
        let section = section::read(&file, &layout).unwrap();
        let bases = BaseAddresses::default().set_eh_frame(section.address);
        let frames = EhFrame::new(&section.bytes, LittleEndian);
        let mut context = UnwindContext::new();
        let mut entries = frames.entries(&bases);
        while let Some(entry) = entries.next().unwrap() {
            let gimli::CieOrFde::Fde(entry) = entry else {
                continue;
            };
            let function = entry
                .parse(|frames, bases, offset| frames.cie_from_offset(bases, offset))
                .unwrap();
            if layout
                .code_offset(VirtOffset(function.initial_address()))
                .is_none()
            {
                continue;
            }
            let mut rows = function.rows(&frames, &bases, &mut context).unwrap();
            while let Some(row) = rows.next_row().unwrap() {
                for address in [row.start_address(), row.end_address() - 1] {
                    if row.start_address() < row.end_address() {
                        compare(&table, row, address, function.is_signal_trampoline());
                        compared += 1;
                    }
                }
            }
        }
    }
    assert!(compared > 10_000, "{compared}");
}

fn compare(table: &Table, row: &gimli::UnwindTableRow<usize>, address: u64, is_signal: bool) {
    let rule = table.lookup(VirtOffset(address));
    let kind = rule.kind();
    let at = format!("{address:#x}: {row:?} is {rule:?}");
    if is_signal {
        assert_eq!(rule, Rule::SIGNAL, "{at}");
        return;
    }
    match row.register(X86_64::RA) {
        Some(RegisterRule::Offset(-8)) => {}
        Some(RegisterRule::Undefined) => return assert_eq!(rule, Rule::END, "{at}"),
        _ => return assert_eq!(rule, Rule::UNSUPPORTED, "{at}"),
    }
    let CfaRule::RegisterAndOffset { register, offset } = row.cfa() else {
        let expected = [RuleKind::Plt, RuleKind::Wide, RuleKind::Unsupported];
        assert!(
            expected.iter().any(|&expected| expected as u32 == kind),
            "{at}"
        );
        return;
    };
    if *register != X86_64::RSP && *register != X86_64::RBP {
        return assert_eq!(rule, Rule::UNSUPPORTED, "{at}");
    }
    let (from_bp, cfa, bp, saved) = if kind == RuleKind::Wide as u32 {
        let place = rule.wide_index() as usize * 2;
        let wide = WideRule::from_words(table.wide[place], table.wide[place + 1]);
        assert!(!wide.in_memory, "{at}");
        (
            wide.from_bp,
            i64::from(wide.cfa_offset),
            wide.bp,
            i64::from(wide.bp_offset),
        )
    } else {
        (
            kind == RuleKind::Bp as u32,
            rule.cfa_offset() as i64,
            rule.bp(),
            -(rule.bp_below_cfa() as i64),
        )
    };
    assert_eq!((from_bp, cfa), (*register == X86_64::RBP, *offset), "{at}");
    match row.register(X86_64::RBP) {
        None | Some(RegisterRule::SameValue) => assert_eq!(bp, BpRule::Same as u32, "{at}"),
        Some(RegisterRule::Offset(offset)) => {
            assert_eq!((bp, saved), (BpRule::AtCfa as u32, offset), "{at}");
        }
        Some(_) => assert!(
            bp == BpRule::AtBp as u32 || bp == BpRule::Undefined as u32,
            "{at}"
        ),
    }
}

/// Check that the C library's return from signal handlers, the end of stacks and linkage
/// tables are found: by their rules alone, since they have no symbols everywhere.
#[test]
fn special_rules_are_found() {
    let kinds = |table: &Table| -> Vec<u32> {
        table.rows.iter().map(|&row| row_rule(row).kind()).collect()
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps
        .lines()
        .find_map(|line| {
            line.contains("libc.so")
                .then(|| &line[line.find('/').unwrap()..])
        })
        .unwrap();
    let libc = kinds(&compile(&File::open(libc).unwrap()).unwrap());
    assert!(libc.contains(&(RuleKind::Signal as u32)));
    assert!(libc.contains(&(RuleKind::End as u32)));
    assert!(libc.contains(&(RuleKind::Plt as u32)));
    let own = kinds(&compile(&File::open("/proc/self/exe").unwrap()).unwrap());
    assert!(own.contains(&(RuleKind::End as u32)));
}

/// Check that the vDSO, as it is in memory, has a table.
#[test]
fn compiles_the_vdso() {
    use std::os::unix::fs::FileExt as _;
    let maps = crate::process::maps::read_maps(std::process::id()).unwrap();
    let vdso = maps
        .iter()
        .find(|m| m.path.as_os_str() == "[vdso]")
        .unwrap();
    let mut image = vec![0; (vdso.end.0 - vdso.start.0) as usize];
    File::open("/proc/self/mem")
        .unwrap()
        .read_exact_at(&mut image, vdso.start.0)
        .unwrap();
    let table = compile_image(&image).unwrap();
    check_invariants(&table);
    assert!(table.functions > 3);
}

/// Check that a file without section headers has the same table, by its program headers.
#[test]
fn section_headers_are_not_needed() {
    let mut image = std::fs::read("/bin/bash").unwrap();
    let with = compile_image(&image).unwrap();
    // e_shoff, e_shnum and e_shstrndx.
    image[40..48].fill(0);
    image[60..64].fill(0);
    assert_eq!(compile_image(&image).unwrap(), with);
}

/// Check that a linkage table is told by rows or by the rule for it wherever in its entries
/// the push is, that each entry is right at its edges, and that an absurdly large one is
/// refused.
#[test]
fn linkage_tables() {
    // rsp + 8 + ((rip & 15) >= from) * 8
    let table = |from: u8, start: u8, size: u64| {
        let code = [
            0x0f,
            11,
            0x77,
            8,
            0x80,
            0,
            0x3f,
            0x1a,
            0x30 + from,
            0x2a,
            0x33,
            0x24,
            0x22,
        ];
        let mut code = code.to_vec();
        // The table's own first entry is described otherwise.
        code.splice(0..0, [0x0e, 16, 0x40 + start]);
        let mut bytes = frames(&[], 1, &code);
        // The function's size, which is behind its first address.
        let at = bytes.len() - 4 - code.len() - 8;
        bytes[at..at + 8].copy_from_slice(&size.to_le_bytes());
        compile_section(&bytes, section::Kind::EhFrame).unwrap()
    };
    for from in [5, 9, 10, 11, 15] {
        for start in [16, 22, 32] {
            let table = table(from, start, 0x48);
            check_invariants(&table);
            for address in 0x1000..0x1048_u64 {
                let rule = table.lookup(VirtOffset(address));
                let expected = match address & 15 {
                    _ if address < 0x1000 + u64::from(start) => 16,
                    place if place < u64::from(from) => 8,
                    _ => 16,
                };
                let found = if rule.kind() == RuleKind::Plt as u32 {
                    assert_eq!(from, 11);
                    8 + u64::from(address & 15 >= 11) * 8
                } else {
                    rule.cfa_offset()
                };
                assert_eq!(found, expected, "{address:#x}, {from}, {start}");
            }
            assert_eq!(table.lookup(VirtOffset(0x1048)), Rule::NONE);
        }
    }
    let absurd = table(9, 16, 0x10_0000 + 0x100);
    assert_eq!(absurd.lookup(VirtOffset(0x1035)), Rule::UNSUPPORTED);
}
