//! Unwind information, function by function.

use std::ops::Range;

use gimli::{
    BaseAddresses, CieOrFde, CommonInformationEntry, DebugFrame, EhFrame, EndianSlice,
    LittleEndian, UnwindContext, UnwindOffset, UnwindSection,
};
use memprof_common::unwind::rule::{BpRule, Rule};

use super::{
    CompileError,
    rule::{Expressions, WideRules, convert, unusual_linkage},
    section::{Bytes, Kind},
};
use crate::{address::VirtOffset, process::elf::ElfLayout};

pub(super) type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// Rows of one file, at most: half a gigabyte. The largest programs have a tenth.
const MAX_ROWS: usize = 1 << 26;
/// Bytes of instructions that are run for each byte of a section, at most: a header's
/// are run for each function that it belongs to.
const MAX_WORK_FACTOR: u64 = 64;
/// And these in any case.
const MIN_WORK: u64 = 1 << 20;

/// Linkage tables beyond this size are not followed: one of 65,536 functions.
const MAX_LINKAGE_BYTES: u64 = 1 << 20;
const LINKAGE_ENTRY_BYTES: u64 = 16;

/// Where a file's code is.
#[derive(Debug)]
pub(super) struct Code {
    /// What relative addresses count from.
    pub(super) origin: VirtOffset,
    /// First address and the one behind the last, of each executable segment.
    ranges: Vec<(u64, u64)>,
}

impl Code {
    pub(super) fn of(layout: &ElfLayout) -> Result<Self, CompileError> {
        let ranges: Vec<(u64, u64)> = layout
            .segments
            .iter()
            .filter(|segment| segment.executable && segment.file_size > 0)
            .filter_map(|segment| {
                let start = segment.address.0;
                Some((start, start.checked_add(segment.file_size)?))
            })
            .collect();
        let first = ranges.iter().map(|range| range.0).min();
        let last = ranges.iter().map(|range| range.1).max();
        let (Some(first), Some(last)) = (first, last) else {
            return Err(CompileError::NoUnwindInfo);
        };
        if last - first > u64::from(u32::MAX) {
            return Err(CompileError::TooMuch("its code spans more than 4 GiB"));
        }
        Ok(Self {
            origin: VirtOffset(first),
            ranges,
        })
    }

    /// Of which only the origin matters.
    pub(super) const fn at(origin: VirtOffset) -> Self {
        Self {
            origin,
            ranges: Vec::new(),
        }
    }

    /// The part of a function that is in the segment it begins in.
    fn clamp(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let range = self
            .ranges
            .iter()
            .find(|range| range.0 <= start && start < range.1)?;
        let end = end.min(range.1);
        (start < end).then_some((start, end))
    }
}

/// One function: its addresses, relative, and its rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function {
    pub(super) start: u32,
    pub(super) end: u32,
    /// Its rows are those up to here, from where the function before in the section
    /// ends.
    pub(super) rows_end: u32,
}

/// What a section says.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// In the order of the section.
    pub(super) functions: Vec<Function>,
    /// Relative address and rule.
    pub(super) rows: Vec<(u32, Rule)>,
    pub(super) wide: WideRules,
    /// Functions that were left out, since what describes them is damaged.
    pub(super) damaged: u32,
}

impl Rows {
    /// Adds code with one rule.
    pub(super) fn push(&mut self, range: Range<u32>, rule: Rule) {
        self.rows.push((range.start, rule));
        self.functions.push(Function {
            start: range.start,
            end: range.end,
            rows_end: self.rows.len() as u32,
        });
    }
}

pub(super) fn collect(bytes: &Bytes, code: &Code) -> Result<Rows, CompileError> {
    let slice: &[u8] = &bytes.bytes;
    match bytes.kind {
        Kind::EhFrame => {
            let bases = BaseAddresses::default().set_eh_frame(bytes.address);
            let mut section = EhFrame::new(slice, LittleEndian);
            section.set_address_size(8);
            collect_from(&section, &bases, slice, code)
        }
        Kind::DebugFrame => {
            let mut section = DebugFrame::new(slice, LittleEndian);
            section.set_address_size(8);
            collect_from(&section, &BaseAddresses::default(), slice, code)
        }
    }
}

fn collect_from<'a, S>(
    section: &S,
    bases: &BaseAddresses,
    bytes: &'a [u8],
    code: &Code,
) -> Result<Rows, CompileError>
where
    S: UnwindSection<Slice<'a>>,
    S::Offset: UnwindOffset<usize>,
{
    let mut all = Rows::default();
    let mut context = UnwindContext::new();
    let mut entries = section.entries(bases);
    // Neighbours nearly always share the header.
    let mut header: Option<(S::Offset, CommonInformationEntry<Slice<'a>>)> = None;
    let mut work: u64 = 0;
    let most_work = MIN_WORK.max((bytes.len() as u64).saturating_mul(MAX_WORK_FACTOR));
    loop {
        let entry = match entries.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            // What follows cannot be told apart any more; what was before is good.
            Err(error) if all.functions.is_empty() => return Err(error.into()),
            Err(_) => {
                all.damaged += 1;
                break;
            }
        };
        let CieOrFde::Fde(entry) = entry else {
            continue;
        };
        let parsed = entry.parse(|section, bases, offset| {
            if let Some((known, header)) = &header
                && *known == offset
            {
                return Ok(header.clone());
            }
            let read = section.cie_from_offset(bases, offset)?;
            header = Some((offset, read.clone()));
            Ok(read)
        });
        let Ok(function) = parsed else {
            all.damaged = all.damaged.saturating_add(1);
            continue;
        };
        let Some((start, end)) = code.clamp(function.initial_address(), function.end_address())
        else {
            // Linkers leave such of functions that they have dropped.
            continue;
        };
        work = work
            .saturating_add(function.entry_len() as u64)
            .saturating_add(function.cie().entry_len() as u64);
        if work > most_work {
            return Err(CompileError::TooMuch("its headers are run too often"));
        }
        let relative = |address: u64| address.wrapping_sub(code.origin.0) as u32;
        let expressions = Expressions {
            section: bytes,
            encoding: function.cie().encoding(),
        };
        let is_signal = function.is_signal_trampoline();
        let first = all.rows.len();
        let is_whole = match function.rows(section, bases, &mut context) {
            Err(_) => false,
            Ok(mut rows) => loop {
                match rows.next_row() {
                    Ok(Some(row)) => {
                        let address = row.start_address();
                        if address >= end {
                            break true;
                        }
                        // The first row holds from the first address on.
                        let address = address.max(start);
                        let rule = convert(row, is_signal, &expressions, &mut all.wide);
                        let row_end = row.end_address().min(end);
                        if let Some(from) = unusual_linkage(row, &expressions)
                            && row_end.saturating_sub(address) <= MAX_LINKAGE_BYTES
                        {
                            for (address, rule) in linkage(address..row_end, from) {
                                work += 1;
                                push_row(&mut all.rows, first, relative(address), rule);
                            }
                            continue;
                        }
                        push_row(&mut all.rows, first, relative(address), rule);
                    }
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            },
        };
        if all.rows.len() > MAX_ROWS {
            return Err(CompileError::TooMuch("it has too many rows"));
        }
        if !is_whole {
            all.damaged = all.damaged.saturating_add(1);
            all.rows.truncate(first);
            continue;
        }
        all.functions.push(Function {
            start: relative(start),
            end: relative(end),
            rows_end: all.rows.len() as u32,
        });
    }
    if all.functions.is_empty() {
        return Err(CompileError::NoUnwindInfo);
    }
    Ok(all)
}

/// Rows of a linkage table of which each entry pushes a word, and has from its byte number
/// `from` on.
fn linkage(range: Range<u64>, from: u64) -> impl Iterator<Item = (u64, Rule)> {
    let sp = |offset| Rule::narrow(false, offset, BpRule::Same, 0).unwrap_or(Rule::UNSUPPORTED);
    let (before, behind) = (sp(8), sp(16));
    let first = range.start & !(LINKAGE_ENTRY_BYTES - 1);
    let entries = range
        .end
        .saturating_sub(first)
        .div_ceil(LINKAGE_ENTRY_BYTES);
    (0..entries)
        .flat_map(move |number| {
            let entry = first.wrapping_add(number * LINKAGE_ENTRY_BYTES);
            [(entry, before), (entry.wrapping_add(from), behind)]
        })
        // Of the first entry a part may be missing: there the later row counts.
        .filter(move |(address, _)| *address < range.end)
        .map(move |(address, rule)| (address.max(range.start), rule))
}

/// Adds a row to those of a function, which begin at `first`.
fn push_row(rows: &mut Vec<(u32, Rule)>, first: usize, address: u32, rule: Rule) {
    let has_one = rows.len() > first;
    if let Some(last) = rows.last_mut().filter(|_| has_one) {
        if last.1 == rule || last.0 > address {
            return;
        }
        if last.0 == address {
            last.1 = rule;
            return;
        }
    }
    rows.push((address, rule));
}
