extern crate std;

use core::cell::RefCell;
use std::{boxed::Box, collections::BTreeMap, vec, vec::Vec};

use super::*;
use crate::unwind::{
    cache::{RuleCache, Source},
    table::{page, row},
};

/// An arena and a target's memory. Reading beyond either fails.
#[derive(Default)]
struct Fake {
    arena: Vec<u64>,
    memory: BTreeMap<u64, u64>,
}

impl Memory for Fake {
    fn word(&self, place: u32) -> Option<u64> {
        self.arena.get(place as usize).copied()
    }

    fn pair(&self, address: u64) -> Option<[u64; 2]> {
        Some([self.single(address)?, self.single(address + 8)?])
    }

    fn single(&self, address: u64) -> Option<u64> {
        self.memory.get(&address).copied()
    }
}

/// The rules of other walks.
struct Cached {
    rules: RefCell<Box<RuleCache>>,
    source: Source,
}

impl KnownRules for Cached {
    fn recall(&self, pc: u64) -> Rule {
        self.rules.borrow().recall(self.source, pc)
    }

    fn remember(&self, pc: u64, rule: Rule) {
        self.rules.borrow_mut().remember(self.source, pc, rule);
    }
}

/// Code at 0x40_0000 with these rows, and code without a table at 0x70_0000.
const CODE: u64 = 0x40_0000;
const OTHER: u64 = 0x70_0000;
const STACK: u64 = 0x7000_0000;

fn fake(rows: &[(u32, Rule)], wide: &[WideRule]) -> (Fake, MappingList) {
    let rows: Vec<u64> = rows
        .iter()
        .map(|&(address, rule)| row(address, rule))
        .collect();
    let last = row_address(*rows.last().unwrap()) >> PAGE_SHIFT;
    let mut pages = Vec::new();
    let mut next = 0;
    for number in 0..=last {
        let first = next;
        while rows
            .get(next)
            .is_some_and(|&row| row_address(row) >> PAGE_SHIFT == number)
        {
            next += 1;
        }
        pages.push(page(first as u32, next as u32));
    }
    let wide: Vec<u64> = wide.iter().flat_map(|wide| wide.to_words()).collect();
    let entry = |start: u64, kind: MappingKind| MappingEntry {
        start,
        end: start + 0x10_0000,
        bias: start,
        rows: 0,
        wide: rows.len() as u32,
        pages: (rows.len() + wide.len()) as u32,
        page_count: pages.len() as u32,
        kind: kind as u32,
    };
    let list = [
        entry(CODE, MappingKind::Table),
        entry(OTHER, MappingKind::FramePointers),
    ];
    let mut arena = [rows, wide, pages].concat();
    let first = arena.len() as u32;
    arena.extend(list.iter().flat_map(|entry| entry.to_words()));
    let fake = Fake {
        arena,
        memory: BTreeMap::new(),
    };
    (fake, MappingList::new(first, list.len() as u32))
}

/// Walks from `ip`; the frames and the end. By rules that another walk has found it is the
/// same walk.
fn walk(fake: &Fake, list: MappingList, ip: u64, bp: u64) -> (Vec<u64>, u32) {
    let found = walk_by(fake, &(), list, ip, bp);
    let cached = Cached {
        rules: RefCell::new(Box::new(RuleCache::EMPTY)),
        source: Source::new(list, 0),
    };
    for _ in 0..2 {
        assert_eq!(
            walk_by(fake, &cached, list, ip, bp),
            found,
            "by rules that were kept"
        );
    }
    found
}

fn walk_by(
    fake: &Fake,
    known: &impl KnownRules,
    list: MappingList,
    ip: u64,
    bp: u64,
) -> (Vec<u64>, u32) {
    let mut walk = Walk::default();
    walk.begin(ip, STACK, bp);
    let mut frames = Vec::new();
    while walk.frame(fake, known, list, 100) {
        frames.push(walk.ip);
        if !walk.next(fake, known, list, true) {
            break;
        }
    }
    assert_eq!(frames.len(), walk.depth as usize);
    (frames, walk.end_code())
}

fn sp(offset: i64) -> Rule {
    Rule::narrow(false, offset, BpRule::Same, 0).unwrap()
}

const COMPLETE: u32 = StackEnd::Complete as u32;

/// Check a walk through every kind of rule: rsp, rbp restored from below, a wide rule that
/// reads the CFA from memory, and the outermost function.
#[test]
fn follows_every_rule() {
    let saves_bp = Rule::narrow(false, 24, BpRule::AtCfa, -16).unwrap();
    let from_bp = Rule::narrow(true, 16, BpRule::AtCfa, -16).unwrap();
    let realigned = WideRule {
        from_bp: true,
        in_memory: true,
        cfa_offset: -8,
        cfa_add: 0,
        bp: BpRule::AtBp as u32,
        bp_offset: 0,
    };
    let (mut fake, list) = fake(
        &[
            (0, Rule::NONE),
            (0x100, sp(16)),
            (0x200, saves_bp),
            (0x300, from_bp),
            (0x400, Rule::wide(0)),
            (0x500, Rule::END),
            (0x600, Rule::NONE),
        ],
        &[realigned],
    );
    let frame = |place: u64| CODE + place;
    // In 0x110: CFA = sp + 16.
    fake.memory.insert(STACK + 8, frame(0x210));
    fake.memory.insert(STACK, 1);
    // In 0x210, sp = STACK + 16: CFA = STACK + 40, rbp below the return address.
    fake.memory.insert(STACK + 32, frame(0x310));
    fake.memory.insert(STACK + 24, STACK + 100 * 8);
    // In 0x310: CFA = rbp + 16.
    fake.memory.insert(STACK + 101 * 8, frame(0x410));
    fake.memory.insert(STACK + 100 * 8, STACK + 200 * 8);
    // In 0x410: CFA is in memory at rbp - 8, rbp is saved at rbp.
    fake.memory.insert(STACK + 199 * 8, STACK + 300 * 8);
    fake.memory.insert(STACK + 200 * 8, 77);
    fake.memory.insert(STACK + 299 * 8, frame(0x510));
    fake.memory.insert(STACK + 298 * 8, 0);
    let expected = vec![
        frame(0x110),
        frame(0x210),
        frame(0x310),
        frame(0x410),
        frame(0x510),
    ];
    assert_eq!(walk(&fake, list, frame(0x110), 5), (expected, COMPLETE));
}

/// Check that rows are found at their first and last byte, also across pages without one.
#[test]
fn finds_rows_at_their_edges() {
    let rows: Vec<(u32, Rule)> = (0..300)
        .map(|n| (n * 37, sp(8 + i64::from(n) * 8)))
        .chain([(50_000, sp(16)), (60_000, Rule::NONE)])
        .collect();
    let (fake, list) = fake(&rows, &[]);
    for pair in rows.windows(2) {
        for address in [pair[0].0, pair[1].0 - 1] {
            let mut walk = Walk::default();
            walk.begin(CODE + u64::from(address) + 1, STACK, 0);
            walk.locate(&fake, list).unwrap();
            let rule = walk.find_rule(&fake, CODE + u64::from(address));
            assert_eq!(rule, pair[0].1, "{address:#x}");
        }
    }
}

/// Check that mappings are found at their edges, in lists of every length up to 40.
#[test]
fn finds_mappings_at_their_edges() {
    for count in 1..40_u64 {
        let mut arena = Vec::new();
        for number in 0..count {
            let start = 0x1000 + number * 0x3000;
            arena.extend(
                MappingEntry {
                    start,
                    end: start + 0x2000,
                    bias: number,
                    rows: 0,
                    wide: 0,
                    pages: 0,
                    page_count: 0,
                    kind: MappingKind::FramePointers as u32,
                }
                .to_words(),
            );
        }
        let fake = Fake {
            arena,
            memory: BTreeMap::new(),
        };
        let list = MappingList::new(0, count as u32);
        for number in 0..count {
            let start = 0x1000 + number * 0x3000;
            for (pc, expected) in [
                (start - 1, None),
                (start, Some(number)),
                (start + 0x1fff, Some(number)),
                (start + 0x2000, None),
            ] {
                let mut walk = Walk::default();
                walk.begin(pc + 1, STACK, 0);
                walk.locate(&fake, list).unwrap();
                let found = (walk.kind != KIND_UNKNOWN).then_some(walk.bias);
                assert_eq!(found, expected, "{pc:#x} of {count}");
            }
        }
    }
}

/// Check each way in which a stack is cut.
#[test]
fn ends_are_told() {
    let (mut fake, list) = fake(
        &[
            (0, Rule::NONE),
            (0x100, sp(16)),
            (0x200, Rule::UNSUPPORTED),
            (0x300, Rule::narrow(true, 16, BpRule::Same, 0).unwrap()),
            (0x400, Rule::NONE),
        ],
        &[],
    );
    let end = |fake: &Fake, ip, bp| walk(fake, list, ip, bp).1;
    // Nothing can be read.
    assert_eq!(end(&fake, CODE + 0x110, 0), StackEnd::Unreadable as u32);
    assert_eq!(
        end(&fake, CODE + 0x210, 0),
        StackEnd::UnsupportedRule as u32
    );
    // The frame would be below.
    assert_eq!(
        end(&fake, CODE + 0x310, STACK - 64),
        StackEnd::BrokenChain as u32
    );
    // No row, and rbp is no frame pointer.
    assert_eq!(end(&fake, CODE + 0x410, 3), StackEnd::NoUnwindInfo as u32);
    // No mapping.
    assert_eq!(end(&fake, 0x10_0000, 0), StackEnd::UnknownMapping as u32);
    // A return address of 0.
    fake.memory.insert(STACK, 0);
    fake.memory.insert(STACK + 8, 0);
    assert_eq!(end(&fake, CODE + 0x110, 0), COMPLETE);
    // rbp of 0 in code without a table.
    assert_eq!(end(&fake, OTHER + 0x10, 0), COMPLETE);
}

/// Check that a frame pointer is followed where there is no table, to what is behind a
/// call only, and that it is told.
#[test]
fn frame_pointers_are_checked() {
    let (mut fake, list) = fake(
        &[(0, Rule::NONE), (0x100, Rule::END), (0x200, Rule::NONE)],
        &[],
    );
    let bp = STACK + 64;
    fake.memory.insert(bp, 0);
    fake.memory.insert(bp + 8, CODE + 0x110);
    // No code can be read there.
    let (frames, end) = walk(&fake, list, OTHER + 0x10, bp);
    assert_eq!((frames.len(), end), (1, StackEnd::NoUnwindInfo as u32));
    // Something else than a call.
    fake.memory.insert(CODE + 0x108, 0x9090_9090_9090_9090);
    assert_eq!(walk(&fake, list, OTHER + 0x10, bp).0.len(), 1);
    // `call rel32`, `call *%rax`, `call *16(%rbp)`, `call *rel32(%rip)`.
    for call in [
        0x0000_0000_e890_9090_u64,
        0xd0ff_9090_9090_9090,
        0x1055_ff90_9090_9090,
        0x0000_0000_15ff_9090,
    ] {
        fake.memory.insert(CODE + 0x108, call);
        let (frames, end) = walk(&fake, list, OTHER + 0x10, bp);
        assert_eq!(frames, [OTHER + 0x10, CODE + 0x110], "{call:#x}");
        assert_eq!(end, COMPLETE | END_BY_FRAME_POINTER, "{call:#x}");
    }
    // To no code that is known; what is there may have been made a moment ago.
    fake.memory.insert(bp + 8, 0x1_0000);
    fake.memory.insert(0xfff8, 0x0000_0000_e890_9090);
    let (frames, end) = walk(&fake, list, OTHER + 0x10, bp);
    assert_eq!(frames.len(), 1);
    assert_eq!(end & END_MASK, StackEnd::UnknownMapping as u32);
    fake.memory.insert(0xfff8, 0);
    let (frames, end) = walk(&fake, list, OTHER + 0x10, bp);
    assert_eq!((frames.len(), end), (1, StackEnd::NoUnwindInfo as u32));
}

/// Check that code without a table may return to any place in such code, as interpreters
/// do that are made at run time, and that the chain breaks where it leads elsewhere.
#[test]
fn generated_code_returns_anywhere() {
    let (mut fake, list) = fake(&[(0, Rule::NONE), (0x100, Rule::END)], &[]);
    let (bp, next) = (STACK + 64, STACK + 128);
    fake.memory.insert(bp, next);
    fake.memory.insert(bp + 8, OTHER + 0x40);
    fake.memory.insert(OTHER + 0x38, 0);
    fake.memory.insert(next, 0);
    fake.memory.insert(next + 8, CODE + 0x110);
    fake.memory.insert(CODE + 0x108, 0x9090_9090_9090_9090);
    let (frames, end) = walk(&fake, list, OTHER + 0x10, bp);
    assert_eq!(frames, [OTHER + 0x10, OTHER + 0x40]);
    assert_eq!(end, StackEnd::BrokenChain as u32 | END_BY_FRAME_POINTER);
    fake.memory.insert(CODE + 0x108, 0xd0ff_9090_9090_9090);
    let (frames, end) = walk(&fake, list, OTHER + 0x10, bp);
    assert_eq!(frames, [OTHER + 0x10, OTHER + 0x40, CODE + 0x110]);
    assert_eq!(end, COMPLETE | END_BY_FRAME_POINTER);
}

/// Check that the walk leaves a signal handler to the very instruction that was
/// interrupted, by its rule and by its bytes, and by neither takes it for a call.
#[test]
fn signal_handlers_are_left() {
    for (rule, code) in [
        (Rule::SIGNAL, None),
        (Rule::NONE, Some([0x0f00_0000_0fc0_c748, 0x05])),
        (Rule::NONE, Some([0x0005_0f00_0000_0fb8, 0])),
    ] {
        let (mut fake, list) = fake(
            &[
                (0, Rule::NONE),
                (0x100, rule),
                (0x200, Rule::END),
                (0x300, Rule::NONE),
            ],
            &[],
        );
        let ip = CODE + 0x108;
        if let Some([low, high]) = code {
            fake.memory.insert(ip, low);
            fake.memory.insert(ip + 8, high);
        }
        // The first byte of a function, interrupted.
        fake.memory.insert(STACK + 120, 9);
        fake.memory.insert(STACK + 160, STACK - 0x1000);
        fake.memory.insert(STACK + 168, CODE + 0x200);
        let (frames, end) = walk(&fake, list, ip, 1);
        assert_eq!(frames, [ip, CODE + 0x201], "{rule:?}");
        assert_eq!(end, COMPLETE);
    }
}

/// Check that a frame at the first byte of a function, which no call returns to, is the
/// outermost, and that one behind a call at the end of a function is not taken for it.
#[test]
fn first_bytes_are_not_called() {
    let (mut fake, list) = fake(
        &[
            (0, Rule::NONE),
            (0x100, sp(16)),
            (0x200, Rule::NONE),
            (0x210, sp(8)),
            (0x300, Rule::NONE),
        ],
        &[WideRule::from_words(0, 0)],
    );
    assert_eq!(
        walk(&fake, list, CODE + 0x210, 0),
        (vec![CODE + 0x210], COMPLETE)
    );
    fake.memory.insert(STACK, 0);
    fake.memory.insert(STACK + 8, CODE + 0x210);
    // 0x200 is behind the last call of the function at 0x100.
    let expected = vec![CODE + 0x200, CODE + 0x210];
    assert_eq!(walk(&fake, list, CODE + 0x200, 0), (expected, COMPLETE));
}
