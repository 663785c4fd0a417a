use super::*;
use crate::golang::testing::{BASE, Fake, random};

const TEXT: u64 = 0x40_0000;
const NAMES: u64 = 0x100;
const UNITS: u64 = 0x200;
const FILES: u64 = 0x300;
const STEPS: u64 = 0x400;
const FUNCTIONS: u64 = 0x500;
const GOFUNC: u64 = BASE + 0x800;

const MODULE: Module = Module {
    text: TEXT,
    text_end: TEXT + 0x60,
    gofunc: GOFUNC,
};

/// Zigzag.
fn steps(changes: &[(i8, u8)]) -> Vec<u8> {
    let pairs = changes.iter();
    let mut bytes: Vec<u8> = pairs
        .flat_map(|&(change, len)| [((change << 1) ^ (change >> 7)).cast_unsigned(), len])
        .collect();
    bytes.push(0);
    bytes
}

/// A table of two functions: in `outer`, of 64 bytes, the 16 from 16 on are `inner`'s; then
/// comes `plain`.
fn table(layout: Layout) -> Fake {
    let memory = Fake::new(0x1000);
    let magic = u64::from(layout.pclntab_magic) | 1 << 48 | 8 << 56;
    let header = [magic, 2, 1, 0, NAMES, UNITS, FILES, STEPS, FUNCTIONS];
    memory.put_words(BASE, &header);
    memory.put(BASE + NAMES, b"\0main.outer\0main.inner\0main.plain\0");
    memory.put(BASE + FILES, b"/src/main.go\0");
    let whole = steps(&[(1, 0x40)]);
    let lines = steps(&[(11, 0x10), (10, 0x10), (-9, 0x20)]);
    let inlined = steps(&[(0, 0x10), (1, 0x10), (-1, 0x20)]);
    memory.put(BASE + STEPS + 1, &whole);
    memory.put(BASE + STEPS + 0x10, &lines);
    memory.put(BASE + STEPS + 0x20, &inlined);

    // Entries and places of records, and where the last function ends.
    let records = [0x100_u32, 0x180];
    let index: Vec<u8> = [0, records[0], 0x40, records[1], 0x60]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    memory.put(BASE + FUNCTIONS, &index);
    for (record, name, pcdata) in [(records[0], 1, 0x20_u32), (records[1], 23, 0)] {
        let at = BASE + FUNCTIONS + u64::from(record);
        let put = |place: u64, word: u32| memory.put(at + place, &word.to_le_bytes());
        put(4, name);
        put(20, 1);
        put(24, 0x10);
        put(28, 3);
        put(32, 0);
        memory.put(at + layout.func_bytes - 1, &[4]);
        put(layout.func_bytes + 8, pcdata);
        put(layout.func_bytes + 12 + 12, 0);
    }
    memory.put(GOFUNC + layout.inlined_name, &12_u32.to_le_bytes());
    memory.put(GOFUNC + layout.inlined_parent, &8_u32.to_le_bytes());
    memory
}

fn open(memory: &Fake, layout: Layout) -> Result<FunctionTable<'_>, GoError> {
    FunctionTable::new(Blocks::new(memory), layout, MODULE, BASE)
}

/// Check names, files, lines and inlined functions at each instruction, for each layout.
#[test]
fn places() {
    for minor in [19, 20, 27] {
        let layout = Layout::of(minor).unwrap();
        let memory = table(layout);
        let mut table = open(&memory, layout).unwrap();
        let mut at = |offset: u64| {
            let place = table.place(TEXT + offset).unwrap()?;
            assert_eq!(place.file.as_deref(), Some("/src/main.go"));
            let caller = place.caller.map(|caller| caller - TEXT);
            Some((place.function, place.line.unwrap(), caller))
        };
        let outer = |line| Some(("main.outer".to_owned(), line, None));
        assert_eq!(at(0), outer(10));
        assert_eq!(at(0xf), outer(10));
        let inner = Some(("main.inner".to_owned(), 20, Some(8)));
        assert_eq!(at(0x10), inner);
        assert_eq!(at(0x1f), inner);
        assert_eq!(at(0x20), outer(11));
        assert_eq!(at(0x40), Some(("main.plain".to_owned(), 10, None)));
        assert_eq!(at(0x60), None);
        assert_eq!(table.place(TEXT - 1).unwrap(), None);

        let plain = table.named("main.plain").unwrap().unwrap();
        assert_eq!((plain.entry, plain.end), (TEXT + 0x40, TEXT + 0x60));
        // It is inlined everywhere.
        assert_eq!(table.named("main.inner").unwrap(), None);
        assert!(table.has_name("main.inner").unwrap());
        assert!(!table.has_name("main.inn").unwrap());
    }
}

/// Check that another version's table, or none, is refused.
#[test]
fn other_tables() {
    let new = Layout::of(20).unwrap();
    let memory = table(Layout::of(19).unwrap());
    assert!(matches!(open(&memory, new), Err(GoError::FunctionTable(_))));
    let memory = table(new);
    memory.put_words(BASE + 8, &[u64::MAX]);
    assert!(matches!(open(&memory, new), Err(GoError::FunctionTable(_))));
}

/// Check that a table in which any byte is another is read in bounded time, whatever comes of
/// it: 20,000 changes from a fixed seed.
#[test]
fn any_byte_may_change() {
    let layout = Layout::of(20).unwrap();
    let memory = table(layout);
    let mut next = random();
    let mut failed = 0;
    for _ in 0..20_000 {
        let place = usize::try_from(next(0x900)).unwrap();
        let old = memory.swap(place, u8::try_from(next(256)).unwrap());
        if let Ok(mut table) = open(&memory, layout) {
            table.steps_left = 10_000;
            for offset in [0, 0x10, 0x50] {
                failed += usize::from(table.place(TEXT + offset).is_err());
            }
            let _ = table.named("main.plain");
        }
        memory.swap(place, old);
    }
    assert!(failed > 100, "{failed}");
}
