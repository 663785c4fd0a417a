//! Where things lie in the arena.
//!
//! Addresses of code are *relative*: 32 bits from an origin that the module's
//! compiler chooses, so a module can span 4 GiB.

use super::rule::Rule;

/// Binary logarithm of [`SLAB_WORDS`].
pub const SLAB_SHIFT: u32 = 17;
/// Words of the arena that are made available at once: a mebibyte.
pub const SLAB_WORDS: u32 = 1 << SLAB_SHIFT;
/// The most slabs that there can be: 4 GiB.
pub const MAX_SLABS: u32 = 4096;

/// Binary logarithm of [`PAGE_BYTES`].
pub const PAGE_SHIFT: u32 = 10;
/// Addresses that share an entry of a module's pages. A row begins at a byte of its
/// own, so at most as many rows begin in a page.
pub const PAGE_BYTES: u32 = 1 << PAGE_SHIFT;

/// The words of one row: from `address` (relative) on, `rule` holds.
#[must_use]
pub const fn row(address: u32, rule: Rule) -> u64 {
    address as u64 | (rule.0 as u64) << 32
}

/// The relative address from which a row holds.
#[must_use]
#[inline(always)]
pub const fn row_address(row: u64) -> u32 {
    row as u32
}

/// What a row says.
#[must_use]
#[inline(always)]
pub const fn row_rule(row: u64) -> Rule {
    Rule((row >> 32) as u32)
}

/// The word of one page: the rows that begin in it are `first..end`.
#[must_use]
pub const fn page(first: u32, end: u32) -> u64 {
    first as u64 | (end as u64) << 32
}

/// The first row that begins in a page, and the first that begins behind it.
#[must_use]
#[inline(always)]
pub const fn page_rows(page: u64) -> (u32, u32) {
    (page as u32, (page >> 32) as u32)
}

/// How the code of a mapping is unwound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MappingKind {
    /// By its table.
    Table = 0,
    /// There is no table, by intent or for lack of one: code made at run time, files
    /// without unwind information. By frame pointers, if that is allowed.
    FramePointers = 1,
    /// Its table is being made.
    Pending = 2,
    /// Where the kernel makes probed functions return to (`[uprobes]`): the real
    /// return address is the kernel's secret.
    ReturnProbe = 3,
}

/// An executable mapping of a process, as it lies in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingEntry {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// What an address loses to become relative.
    pub bias: u64,
    /// Where the module's rows begin.
    pub rows: u32,
    /// Where its wide rules begin.
    pub wide: u32,
    /// Where its pages begin.
    pub pages: u32,
    /// How many pages there are.
    pub page_count: u32,
    /// [`MappingKind`] as a number.
    pub kind: u32,
}

impl MappingEntry {
    /// How many words it takes.
    pub const WORDS: u32 = 6;

    /// As it lies in the arena.
    #[must_use]
    pub const fn to_words(self) -> [u64; 6] {
        [
            self.start,
            self.end,
            self.bias,
            self.rows as u64 | (self.wide as u64) << 32,
            self.pages as u64 | (self.page_count as u64) << 32,
            self.kind as u64,
        ]
    }
}

/// The mappings of a process: where they are in the arena, and how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct MappingList(pub u64);

/// The most mappings that a list can have: those at the highest addresses are kept.
pub const MAX_MAPPINGS: usize = 4096;

impl MappingList {
    /// `count` mappings from word `first` on.
    #[must_use]
    pub const fn new(first: u32, count: u32) -> Self {
        Self(first as u64 | (count as u64) << 32)
    }

    /// Where the first is.
    #[must_use]
    #[inline(always)]
    pub const fn first(self) -> u32 {
        self.0 as u32
    }

    /// How many there are.
    #[must_use]
    #[inline(always)]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u32
    }
}
