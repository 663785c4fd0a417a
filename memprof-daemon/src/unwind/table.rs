//! Rows in order, with the pages to find them by.

use memprof_common::unwind::{
    rule::Rule,
    table::{PAGE_SHIFT, page, page_rows, row, row_address, row_rule},
};

use super::{
    CompileError,
    rows::{Code, Function, Rows},
};
use crate::address::VirtOffset;

/// How the code of one file is unwound, as it will lie in the arena
/// ([`memprof_common::unwind`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// What relative addresses count from.
    pub origin: VirtOffset,
    /// Rows, ascending; the first is at the origin.
    pub rows: Vec<u64>,
    /// Wide rules.
    pub wide: Vec<u64>,
    /// Pages.
    pub pages: Vec<u64>,
    /// Functions described.
    pub functions: u32,
    /// Functions that were left out, since what describes them is damaged.
    pub damaged: u32,
}

impl Table {
    /// How many words it takes.
    #[must_use]
    pub const fn words(&self) -> usize {
        self.rows.len() + self.wide.len() + self.pages.len()
    }

    /// The rule at an address, found as BPF finds it, but simply.
    #[must_use]
    pub fn lookup(&self, address: VirtOffset) -> Rule {
        let Some(relative) = address
            .0
            .checked_sub(self.origin.0)
            .and_then(|relative| u32::try_from(relative).ok())
        else {
            return Rule::NONE;
        };
        let Some(&page) = self.pages.get((relative >> PAGE_SHIFT) as usize) else {
            return Rule::NONE;
        };
        let (first, end) = page_rows(page);
        let rows = self
            .rows
            .get(first.saturating_sub(1) as usize..end as usize)
            .unwrap_or_default();
        let found = rows.partition_point(|&row| row_address(row) <= relative);
        found
            .checked_sub(1)
            .and_then(|found| rows.get(found))
            .map_or(Rule::NONE, |&row| row_rule(row))
    }
}

/// Puts functions in order, of two that overlap the one that begins first, and marks what
/// is between them.
pub(super) fn build(code: &Code, collected: Rows) -> Result<Table, CompileError> {
    let Rows {
        functions,
        rows,
        wide,
        damaged,
    } = collected;
    let mut spans: Vec<(Function, u32)> = Vec::with_capacity(functions.len());
    let mut rows_begin = 0;
    for function in functions {
        spans.push((function, rows_begin));
        rows_begin = function.rows_end;
    }
    // Linkers write them nearly in order: cheap then.
    spans.sort_by_key(|(function, begin)| (function.start, *begin));

    let count = spans.len();
    let mut out: Vec<u64> = Vec::with_capacity(rows.len() + count / 4 + 2);
    let mut last = Rule::NONE;
    let mut end = 0;
    out.push(row(0, Rule::NONE));
    let mut push = |address: u32, rule: Rule| {
        if rule == last {
            return;
        }
        last = rule;
        match out.last_mut() {
            Some(before) if row_address(*before) == address => *before = row(address, rule),
            _ => out.push(row(address, rule)),
        }
    };
    for (function, begin) in spans {
        if function.end <= end {
            continue;
        }
        let start = function.start.max(end);
        if start > end {
            push(end, Rule::NONE);
        }
        let own = rows
            .get(begin as usize..function.rows_end as usize)
            .unwrap_or_default();
        for &(address, rule) in own {
            push(address.max(start), rule);
        }
        end = function.end;
    }
    push(end, Rule::NONE);
    // The rule before may have been the same.
    out.dedup_by(|later, earlier| row_rule(*later) == row_rule(*earlier));

    let last = out.last().copied().map_or(0, row_address);
    let mut pages = Vec::with_capacity((last >> PAGE_SHIFT) as usize + 1);
    let mut next = 0;
    for number in 0..=last >> PAGE_SHIFT {
        let first = next;
        while out
            .get(next)
            .is_some_and(|&row| row_address(row) >> PAGE_SHIFT == number)
        {
            next += 1;
        }
        pages.push(page(first as u32, next as u32));
    }
    if count == 0 {
        return Err(CompileError::NoUnwindInfo);
    }
    Ok(Table {
        origin: code.origin,
        rows: out,
        wide: wide.into_words(),
        pages,
        functions: u32::try_from(count).unwrap_or(u32::MAX),
        damaged,
    })
}
