//! Unwind information of real files, damaged where it hurts, and walks by it over hostile
//! memory: an end in bounded time and memory, and no panic. `MEMPROF_FUZZ_SECONDS` says for
//! how long, a second otherwise; `cargo xtask fuzz` has it run longer.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    time::{Duration, Instant},
};

use memprof_common::{
    limits::MAX_STACK_DEPTH,
    unwind::{
        cache::{RuleCache, Source},
        rule::Rule,
        table::{MappingEntry, MappingKind, MappingList, row},
        walk::{END_MASK, KnownRules, Memory, StackEnd, Walk},
    },
};

use super::{
    Table, compile, section,
    section::Kind,
    testing::{Random, compile_section, frames, fuzz_time, mutate, random},
    tests::check_invariants,
};
use crate::process::elf::ElfLayout;

/// Functions of a real file that are damaged at once.
const PART_ENTRIES: usize = 12;

fn seconds() -> Duration {
    fuzz_time().unwrap_or(Duration::from_secs(1))
}

/// The files whose unwind information is a seed: what is there of these.
fn paths() -> Vec<String> {
    let mut paths: Vec<String> = [
        "/proc/self/exe",
        "/bin/bash",
        "/usr/bin/python3",
        "/usr/lib/x86_64-linux-gnu/libLLVM-14.so.1",
        "/lib64/ld-linux-x86-64.so.2",
        "/usr/lib/gcc/x86_64-linux-gnu/12/cc1",
        "/usr/bin/redis-server",
        "/usr/bin/node",
    ]
    .map(str::to_owned)
    .to_vec();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps.lines().find(|line| line.contains("libc.so"));
    paths.extend(libc.and_then(|line| Some(line[line.find('/')?..].to_owned())));
    paths.retain(|path| std::path::Path::new(path).exists());
    paths
}

/// One entry of a section: where it begins and ends, and the header it points to, if it
/// does.
struct Entry {
    start: usize,
    end: usize,
    header: Option<usize>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn entries(bytes: &[u8]) -> Vec<Entry> {
    let mut all = Vec::new();
    let mut start = 0;
    while let (Some(length), Some(back)) = (word(bytes, start), word(bytes, start + 4)) {
        if length == 0 || length > 0xffff {
            break;
        }
        let header = (back != 0).then(|| (start + 4).saturating_sub(back as usize));
        let end = start + 4 + length as usize;
        all.push(Entry { start, end, header });
        start = end;
    }
    all
}

/// A few functions of a real section with their headers, as a section of its own. Their
/// addresses, which count from where they lie, are put into the made file's code.
fn part(bytes: &[u8], all: &[Entry], random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    let mut headers: Vec<(usize, usize)> = Vec::new();
    let first = random.below(all.len());
    for (number, entry) in all[first..].iter().take(PART_ENTRIES).enumerate() {
        let Some(header) = entry.header else { continue };
        let Some(source) = all.iter().find(|entry| entry.start == header) else {
            continue;
        };
        let known = headers.iter().find(|(from, _)| *from == header).copied();
        let at = known.map_or(out.len(), |(_, at)| at);
        if known.is_none() {
            out.extend_from_slice(&bytes[source.start..source.end]);
            headers.push((header, at));
        }
        let place = out.len();
        out.extend_from_slice(&bytes[entry.start..entry.end]);
        let back = (place + 4 - at) as u32;
        out[place + 4..place + 8].copy_from_slice(&back.to_le_bytes());
        // `pcrel | sdata4` is what all of these files use; the section is at 0x20_0000.
        let address = 0x1000 + number as i64 * 0x1000;
        let distance = (address - (0x20_0000 + place as i64 + 8)) as i32;
        if place + 12 <= out.len() {
            out[place + 8..place + 12].copy_from_slice(&distance.to_le_bytes());
        }
    }
    out.extend([0; 4]);
    out
}

/// Damages what means something: lengths, pointers to headers, versions, augmentations,
/// addresses, instructions and expressions.
fn damage(bytes: &mut [u8], random: &mut Random) {
    const EXTREMES: [u32; 8] = [0, 1, 4, 0x7f, 0xffff, 0x7fff_ffff, 0xffff_fffc, 0xffff_ffff];
    // DW_CFA_*: remember, restore, expressions, offsets from registers, advances.
    const CODES: [u8; 16] = [
        0x0a, 0x0b, 0x0f, 0x10, 0x16, 0x0c, 0x0d, 0x0e, 0x13, 0x14, 0x02, 0x04, 0x01, 0x2e, 0x41,
        0xff,
    ];
    let all = entries(bytes);
    let Some(entry) = all.get(random.below(all.len())) else {
        return;
    };
    let put = |bytes: &mut [u8], at: usize, value: u32| {
        if let Some(place) = bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    };
    let extreme = EXTREMES[random.below(EXTREMES.len())];
    let field = [0, 4, 8, 12][random.below(4)];
    match random.below(6) {
        0 => put(bytes, entry.start + field, extreme),
        // Just beside the truth.
        1 => {
            let at = entry.start + field;
            let value = word(bytes, at).unwrap_or(0);
            put(
                bytes,
                at,
                value.wrapping_add(random.below(65) as u32).wrapping_sub(32),
            );
        }
        // Another entry for a header.
        2 => {
            let other = all[random.below(all.len())].start as u32;
            put(
                bytes,
                entry.start + 4,
                (entry.start as u32 + 4).wrapping_sub(other),
            );
        }
        _ => {
            let at = entry.start + 8 + random.below((entry.end - entry.start).saturating_sub(8));
            if let Some(byte) = bytes.get_mut(at) {
                *byte = if random.below(3) == 0 {
                    random.below(256) as u8
                } else {
                    CODES[random.below(CODES.len())]
                };
            }
        }
    }
}

/// What no input may exceed: rows cost instructions, of which a number in proportion to the
/// section's size is run.
fn check_size(table: &Table, bytes: usize) {
    let most = (1 << 20).max(bytes * 64) * 2;
    assert!(
        table.words() < most,
        "{} words of {bytes} bytes",
        table.words()
    );
}

/// Check unwind information of real files, a dozen functions at a time, damaged: a table
/// that BPF can rely on or an error, in less than two seconds each.
#[test]
fn damaged_real_sections() {
    let mut random = random();
    let seeds: Vec<Vec<u8>> = paths()
        .iter()
        .map(|path| {
            let file = File::open(path).unwrap();
            let layout = ElfLayout::read(&file).unwrap();
            section::read(&file, &layout).unwrap().bytes
        })
        .collect();
    let known: Vec<Vec<Entry>> = seeds.iter().map(|seed| entries(seed)).collect();
    assert!(seeds.len() >= 3, "files to begin with");
    let (mut rounds, mut good, mut slowest) = (0_u64, 0_u64, Duration::ZERO);
    let until = Instant::now() + seconds();
    while Instant::now() < until {
        let which = random.below(seeds.len());
        let mut bytes = part(&seeds[which], &known[which], &mut random);
        let whole = compile_section(&bytes, Kind::EhFrame);
        if rounds < 20 {
            assert!(
                whole.is_ok() || bytes.len() < 100,
                "the part itself: {whole:?}"
            );
        }
        for _ in 0..=random.below(8) {
            damage(&mut bytes, &mut random);
        }
        for _ in 0..random.below(3) {
            mutate(&mut bytes, &mut random);
        }
        let kind = [Kind::EhFrame, Kind::EhFrame, Kind::DebugFrame][random.below(3)];
        let began = Instant::now();
        if let Ok(table) = compile_section(&bytes, kind) {
            check_invariants(&table);
            check_size(&table, bytes.len());
            good += 1;
        }
        slowest = slowest.max(began.elapsed());
        assert!(slowest < Duration::from_secs(2), "{slowest:?}: {bytes:x?}");
        rounds += 1;
    }
    println!("{rounds} sections, {good} with a table, the slowest took {slowest:?}");
    assert!(good * 20 > rounds, "{good} of {rounds}");
}

/// An arena, and a target's memory that is whatever its seed makes of an address: mostly
/// addresses of its code and its stack.
struct Hostile {
    arena: Vec<u64>,
    seed: u64,
    /// Every word is an address of code.
    is_sane: bool,
    reads: Cell<u64>,
}

/// The rules of other walks.
struct Cached {
    rules: RefCell<Box<RuleCache>>,
    source: Source,
}

const CODE: u64 = 0x40_0000;
const STACK: u64 = 0x7fff_0000_0000;

impl Memory for Hostile {
    fn word(&self, place: u32) -> Option<u64> {
        self.reads.set(self.reads.get() + 1);
        self.arena.get(place as usize).copied()
    }

    fn pair(&self, address: u64) -> Option<[u64; 2]> {
        Some([self.single(address)?, self.single(address.wrapping_add(8))?])
    }

    fn single(&self, address: u64) -> Option<u64> {
        self.reads.set(self.reads.get() + 1);
        if self.is_sane {
            return Some(CODE + (address / 8).wrapping_mul(0x51) % 0x2800);
        }
        let mut random = Random((address ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.below(2);
        match random.below(16) {
            0 => None,
            1 => Some(random.0),
            2 => Some([0, 1, 7, u64::MAX, u64::MAX - 7, 1 << 63][random.below(6)]),
            // A frame above, or this very one: frames in a circle.
            3..=6 => Some(address.wrapping_add((random.below(64) as u64) * 8)),
            7 => Some(address),
            _ => Some(CODE + random.below(0x10_0000) as u64),
        }
    }
}

impl KnownRules for Cached {
    fn recall(&self, pc: u64) -> Rule {
        self.rules.borrow().recall(self.source, pc)
    }

    fn remember(&self, pc: u64, rule: Rule) {
        self.rules.borrow_mut().remember(self.source, pc, rule);
    }
}

/// Where a walk begins, and the steps at which frame pointers may be used.
struct Beginning {
    ip: u64,
    bp: u64,
    frame_pointers: u64,
}

impl Beginning {
    fn any(random: &mut Random) -> Self {
        let ip = match random.below(4) {
            0 => random.0,
            _ => CODE + random.below(0x10_0000) as u64,
        };
        let bp = STACK + random.below(4096) as u64;
        random.below(2);
        Self {
            ip,
            bp,
            frame_pointers: random.0,
        }
    }
}

/// The frames of a walk, the last of which is 0, and its end.
fn walk(
    memory: &Hostile,
    known: &impl KnownRules,
    list: MappingList,
    from: &Beginning,
) -> ([u64; MAX_STACK_DEPTH + 1], u32) {
    let mut walk = Walk::default();
    walk.begin(from.ip, STACK, from.bp);
    let mut frames = [0; MAX_STACK_DEPTH + 1];
    let mut steps = 0;
    memory.reads.set(0);
    while walk.frame(memory, known, list, MAX_STACK_DEPTH as u32) {
        frames[steps] = walk.ip;
        steps += 1;
        let draw = from.frame_pointers.rotate_left(2 * steps as u32);
        if !walk.next(memory, known, list, draw & 3 > 0) {
            break;
        }
    }
    assert!(steps <= MAX_STACK_DEPTH, "{steps}");
    assert_eq!(walk.depth as usize, steps);
    let end = walk.end_code();
    assert!(StackEnd::from_code(end).is_some(), "{end:#x}");
    // Two searches and a few words a step, and the one that finds no frame.
    let most = (steps as u64 + 1) * 64;
    assert!(memory.reads.get() <= most, "{} reads", memory.reads.get());
    (frames, end)
}

/// Check walks by good tables, by damaged ones and by words that are no table at all, over
/// memory that leads back, up, to code or nowhere: each ends within the greatest depth,
/// after a bounded number of reads, and says why. By rules that other walks have found it is the
/// same walk.
#[test]
fn hostile_walks() {
    let mut random = random();
    let made = frames(&[], 40, &[0x44, 0x0e, 16, 0x86, 2, 0x41, 0x0d, 6]);
    let simple = frames(&[], 40, &[0x44, 0x0e, 16]);
    let mut tables = vec![
        compile_section(&made, Kind::EhFrame).unwrap(),
        compile_section(&simple, Kind::EhFrame).unwrap(),
    ];
    for path in paths().iter().filter(|path| !path.contains("LLVM")) {
        tables.push(compile(&File::open(path).unwrap()).unwrap());
    }
    let mut ends = [0_u64; StackEnd::ALL.len()];
    let until = Instant::now() + seconds();
    while Instant::now() < until {
        let table = &tables[random.below(tables.len())];
        // As much of it as is cheap to copy.
        let rows = table.rows.len().min(4000);
        let mut arena = table.rows[..rows].to_vec();
        let wide = arena.len() as u32;
        arena.extend(table.wide.iter().take(256));
        let pages = arena.len() as u32;
        arena.extend(table.pages.iter().take(1024));
        let page_count = arena.len() as u32 - pages;
        let first = arena.len() as u32;
        let count = 1 + random.below(8) as u32;
        for number in 0..u64::from(count) {
            let kind = [0, 0, 0, 0, 1, 2, 3, u32::MAX][random.below(8)];
            let entry = MappingEntry {
                start: CODE + number * 0x2_0000,
                end: CODE + (number + 1) * 0x2_0000 - random.below(2) as u64 * 0x1000,
                bias: CODE - random.below(3) as u64 * 0x1000,
                rows: 0,
                wide,
                pages,
                page_count,
                kind: if number == 0 {
                    MappingKind::Table as u32
                } else {
                    kind
                },
            };
            arena.extend(entry.to_words());
        }
        // Words torn, or of a table that has just gone.
        let damages = [0, 0, 3, 30, 3000][random.below(5)];
        for _ in 0..damages {
            let at = random.below(arena.len());
            arena[at] = match random.below(4) {
                0 => random.0,
                1 => u64::MAX,
                2 => row(random.0 as u32, Rule(random.below(1 << 30) as u32)),
                _ => arena[random.below(arena.len())],
            };
        }
        let list = match random.below(16) {
            0 => MappingList(random.0),
            1 => MappingList::new(random.below(arena.len()) as u32, 4096),
            _ => MappingList::new(first, count),
        };
        let mut memory = Hostile {
            arena,
            seed: 0,
            is_sane: false,
            reads: Cell::new(0),
        };
        let cached = Cached {
            rules: RefCell::new(Box::new(RuleCache::EMPTY)),
            source: Source::new(list, 0),
        };
        // Where words are damaged, mappings may lie over each other.
        let is_whole = damages == 0 && list == MappingList::new(first, count);
        for _ in 0..200 {
            random.below(2);
            memory.seed = random.0;
            memory.is_sane = random.below(8) == 0;
            let from = Beginning::any(&mut random);
            let (frames, end) = walk(&memory, &(), list, &from);
            let (again, end_again) = walk(&memory, &cached, list, &from);
            if is_whole {
                assert_eq!((again, end_again), (frames, end), "by rules that were kept");
            }
            ends[(end & END_MASK) as usize] += 1;
        }
    }
    let counts: Vec<(&str, u64)> = StackEnd::ALL
        .iter()
        .map(|end| end.name())
        .zip(ends)
        .collect();
    println!("{} walks: {counts:?}", ends.iter().sum::<u64>());
    // Of the others one tells that tables changed, and one is the kernel's.
    for end in StackEnd::ALL
        .iter()
        .filter(|end| **end != StackEnd::Unverified)
    {
        assert!(ends[*end as usize] > 0, "no walk ended so: {}", end.name());
    }
}
