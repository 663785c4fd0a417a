//! Names by address.

use std::{collections::BTreeMap, sync::Arc};

/// A longer name is cut.
const MAX_NAME_BYTES: usize = 1024;
/// No program compiles that many functions, nor gives them so long names. What is beyond
/// makes room by having all before it forgotten: the newest are in use.
const MAX_RANGES: usize = 1 << 20;
const MAX_TOTAL_NAME_BYTES: usize = 64 << 20;

/// The newest name of each address: places are used again.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// By first address; no two overlap.
    ranges: BTreeMap<u64, Range>,
    /// Of all names that were added.
    name_bytes: usize,
}

#[derive(Clone, Debug)]
struct Range {
    /// The first address behind it.
    end: u64,
    name: Arc<str>,
}

impl Index {
    /// Adds a line `START SIZE NAME`, the numbers in hexadecimal. What makes no sense is
    /// left out.
    pub(super) fn add(&mut self, line: &[u8]) {
        if let Some((start, end, name)) = parse(line) {
            self.insert(start, end, &name);
        }
    }

    fn insert(&mut self, start: u64, end: u64, name: &str) {
        if self.ranges.len() >= MAX_RANGES || self.name_bytes >= MAX_TOTAL_NAME_BYTES {
            *self = Self::default();
        }
        // What begins before and reaches into it keeps its ends.
        if let Some((_, before)) = self.ranges.range_mut(..start).next_back()
            && before.end > start
        {
            let after = before.clone();
            before.end = start;
            if after.end > end {
                self.ranges.insert(end, after);
            }
        }
        while let Some((&first, _)) = self.ranges.range(start..end).next() {
            if let Some(covered) = self.ranges.remove(&first)
                && covered.end > end
            {
                self.ranges.insert(end, covered);
            }
        }
        self.name_bytes += name.len();
        let name = Arc::from(name);
        self.ranges.insert(start, Range { end, name });
    }

    /// The name of the code at an address.
    pub(super) fn name(&self, address: u64) -> Option<&str> {
        let (_, range) = self.ranges.range(..=address).next_back()?;
        (address < range.end).then_some(&*range.name)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }
}

/// First address, the one behind the last, and the name.
fn parse(line: &[u8]) -> Option<(u64, u64, String)> {
    let mut fields = line.splitn(3, |&byte| byte == b' ');
    let mut number = || {
        let text = std::str::from_utf8(fields.next()?).ok()?;
        u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
    };
    let (start, size) = (number()?, number()?);
    let name = fields.next()?.trim_ascii();
    let name = name.get(..MAX_NAME_BYTES).unwrap_or(name);
    (!name.is_empty() && size > 0).then_some(())?;
    let name = String::from_utf8_lossy(name).into_owned();
    Some((start, start.checked_add(size)?, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(text: &str) -> Index {
        let mut index = Index::default();
        for line in text.lines() {
            index.add(line.as_bytes());
        }
        index
    }

    /// Check names at their edges, that the newest wins, and that what makes no sense is
    /// left out: no numbers, no name, no size, addresses that wrap around.
    #[test]
    fn names() {
        let index = index(
            "7f0000001000 10 LazyCompile:~first /app.js:1:2\n\
             0x7f0000001010 0x8 second\n\
             nonsense\n\
             7f0000001008 4 newer\n\
             ffffffffffffffff 10 wraps\n\
             7f0000002000 10 \n\
             7f0000002000 0 empty\n\
             7f0000003000 1",
        );
        let first = Some("LazyCompile:~first /app.js:1:2");
        for (address, name) in [
            (0x7f00_0000_0fff, None),
            (0x7f00_0000_1000, first),
            (0x7f00_0000_1007, first),
            (0x7f00_0000_1008, Some("newer")),
            (0x7f00_0000_100b, Some("newer")),
            (0x7f00_0000_100c, first),
            (0x7f00_0000_1017, Some("second")),
            (0x7f00_0000_1018, None),
            (0x7f00_0000_2000, None),
            (u64::MAX, None),
        ] {
            assert_eq!(index.name(address), name, "{address:#x}");
        }
        assert_eq!(index.len(), 4);
    }

    /// Check the index against a plain search from the end, over 3,000 lines from a fixed
    /// seed, after each tenth of which every address is asked for.
    #[test]
    fn agrees_with_a_search() {
        let mut index = Index::default();
        let mut lines: Vec<(u64, u64, String)> = Vec::new();
        let mut state = 0x1234_5678_u64;
        let mut next = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % bound
        };
        for number in 0..3000 {
            let (start, size) = (next(200), 1 + next(30));
            let name = format!("function {number}");
            index.add(format!("{start:x} {size:x} {name}").as_bytes());
            lines.push((start, start + size, name));
            if number % 10 == 0 {
                for address in 0..240 {
                    let newest = lines
                        .iter()
                        .rev()
                        .find(|(start, end, _)| (*start..*end).contains(&address));
                    let expected = newest.map(|(_, _, name)| name.as_str());
                    assert_eq!(index.name(address), expected, "{address:#x}");
                }
            }
        }
    }

    /// Check that a program which names more than there can be gets no more memory, and
    /// that the newest name is known.
    #[test]
    fn is_bounded() {
        let mut index = Index::default();
        for number in 0..MAX_RANGES as u64 + 5 {
            index.insert(number * 16, number * 16 + 16, "f");
        }
        assert_eq!(index.len(), 5);
        assert_eq!(index.name(MAX_RANGES as u64 * 16), Some("f"));
        let long = "x".repeat(MAX_NAME_BYTES);
        for _ in 0..MAX_TOTAL_NAME_BYTES / MAX_NAME_BYTES + 2 {
            index.insert(0, 1, &long);
        }
        assert!(index.name_bytes <= MAX_TOTAL_NAME_BYTES);
    }
}
