//! Text for people: what an engineer on call wants to see first.
//!
//! ```text
//! leaky (pid 4242)  /opt/leaky/app
//!
//!   in use      8 MiB (2.4 to 15.5 MiB) in 824 objects
//!   allocated   10.1 MiB (4.1 to 18.1 MiB) in 2,029 objects, in 30.0 s
//!   calls       2,029 allocating (68 a second), 10.1 MiB asked for; 1,205 freeing; all counted
//!   sizes       8 to 16 KiB (50.5%), 64 to 127 B (49.3%), 0 B (0.1%)
//!   resident    47.7 MiB (anonymous 40.1 MiB, peak 48.6 MiB)
//!   estimated   from 1,014 samples, one every 512 KiB on average; ranges are 95% sure
//!   captured    2026-09-21T14:13:20.123Z
//!
//!   Lost or late:
//!     12 late allocations: the ring buffer was full; counted later, from the map of live blocks
//!
//! STILL IN USE: 3 stacks, 8 MiB
//!
//!   #1       8 MiB  >99.9%  rough: 2.4 to 15.5 MiB, 7 samples; 819 objects, 80.0% of the 10 MiB that it allocated
//!        xmalloc (inlined)                            src/x.h:7
//!        leak_buffers                                 src/leak.c:42
//!        main                                         src/leak.c:80
//!
//!   ...
//!
//! ALLOCATED: 4 stacks, 10.1 MiB
//!
//!   #1      10 MiB   99.0%  4.0 to 18.0 MiB; 1,024 objects, 8 MiB still in use
//!        xmalloc (inlined)                            src/x.h:7
//!        ... as #1 in use above
//!
//!   #2    97.7 KiB    0.9%  97.6 KiB to 2.0 MiB; 1,000 objects, all freed again
//!        churn                                        src/leak.c:50
//!        main                                         src/leak.c:81
//!
//!   ...
//! ```

mod header;
mod terminal;

use std::{
    io::{self, BufWriter, Write},
    ptr,
};

pub(super) use header::duration;
use terminal::{Style, printable};

use crate::export::{
    line::{FrameLine, lines, module_basename},
    numbers::{Numbers, by_alloc, by_inuse},
    profile::{ProcessProfile, Profile, StackProfile},
    units,
};

/// What of a profile is shown, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Stacks in each table.
    pub top: usize,
    /// Lines of each stack.
    pub max_lines: usize,
    /// Whether to use a terminal's colours.
    pub color: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            top: 10,
            max_lines: 20,
            color: false,
        }
    }
}

/// Writes a profile as text.
///
/// # Errors
///
/// Those of the writer.
pub fn write(profile: &Profile, options: &Options, out: &mut dyn Write) -> io::Result<()> {
    let mut report = Report {
        profile,
        options,
        style: Style::new(options.color),
        out: BufWriter::new(out),
    };
    if profile.processes.is_empty() {
        writeln!(report.out, "No process was profiled.")?;
    }
    for (place, process) in profile.processes.iter().enumerate() {
        if place != 0 {
            writeln!(report.out)?;
        }
        report.process(process)?;
    }
    report.out.flush()
}

/// One of the two tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    InUse,
    Allocated,
}

impl Table {
    fn bytes(self, numbers: &Numbers) -> u64 {
        match self {
            Self::InUse => grown(numbers.inuse_bytes),
            Self::Allocated => numbers.alloc_bytes,
        }
    }

    /// Blocks of 0 bytes count too, if nothing else does.
    const fn has(self, numbers: &Numbers) -> bool {
        match self {
            Self::InUse => numbers.inuse_bytes > 0 || numbers.inuse_objects > 0,
            Self::Allocated => numbers.alloc_bytes != 0 || numbers.alloc_objects != 0,
        }
    }
}

/// What is in use, or has become more in a window; what has become less is in no table.
fn grown(number: i64) -> u64 {
    number.max(0).unsigned_abs()
}

/// How sure a number of bytes is.
enum Uncertainty {
    /// In 95 of 100 cases the truth is in this range.
    Fair(String),
    /// The same from so few samples that the number is an order of magnitude.
    Rough(String),
}

/// Fewer samples than this are rough: the range is wider than from half the
/// estimate to twice.
const ROUGH_SAMPLES: u64 = 8;

/// None where the number is as good as exact.
fn uncertainty(table: Table, numbers: &Numbers) -> Option<Uncertainty> {
    let ([low, high], samples) = match table {
        Table::InUse => (numbers.inuse_bytes_ci95.map(grown), numbers.live_samples),
        Table::Allocated => (numbers.alloc_bytes_ci95, numbers.samples),
    };
    let range = units::range(low, high);
    if range == units::bytes(table.bytes(numbers)) {
        return None;
    }
    // Of large blocks few are enough.
    if samples < ROUGH_SAMPLES && high / 2 > low {
        let samples = units::counted(samples, "sample");
        return Some(Uncertainty::Rough(format!("{range}, {samples}")));
    }
    Some(Uncertainty::Fair(range))
}

struct Report<'a, W> {
    profile: &'a Profile,
    options: &'a Options,
    style: Style,
    out: W,
}

impl<W: Write> Report<'_, W> {
    fn process(&mut self, process: &ProcessProfile) -> io::Result<()> {
        let total = Numbers::of_process(process, self.profile.coarsest_interval_of(process));
        self.header(process, &total)?;
        self.losses(process)?;
        if total.samples == 0 && total.live_samples == 0 {
            return self.nothing_sampled(process);
        }
        let inuse = by_inuse(process);
        self.table(Table::InUse, &inuse, &total, &[])?;
        self.table(Table::Allocated, &by_alloc(process), &total, &inuse)
    }

    /// A table of the first stacks. Those of `seen` are not written out again.
    fn table(
        &mut self,
        table: Table,
        stacks: &[(&StackProfile, Numbers)],
        total: &Numbers,
        seen: &[(&StackProfile, Numbers)],
    ) -> io::Result<()> {
        let Style { bold, plain, .. } = self.style;
        let all = stacks.iter().filter(|(_, numbers)| table.has(numbers));
        let all = all.count();
        let top = self.options.top.min(all);
        let is_window = self.profile.window.is_some();
        let whole = match table {
            // The sum of all is what others have given back less.
            Table::InUse if is_window => stacks.iter().map(|(_, n)| grown(n.inuse_bytes)).sum(),
            _ => table.bytes(total),
        };
        let title = match table {
            Table::InUse if is_window => "IN USE, AND NOT BEFORE",
            Table::InUse => "STILL IN USE",
            Table::Allocated => "ALLOCATED",
        };
        if all == 0 {
            let nothing = match table {
                Table::InUse if is_window => "nothing: no stack holds more than before",
                Table::InUse => "nothing: every sampled block was freed again",
                Table::Allocated => "nothing",
            };
            return writeln!(self.out, "\n{bold}{title}: {nothing}{plain}");
        }
        let shown = stacks.iter().take(top);
        let shown = shown.map(|(stack, _)| &stack.counters);
        let shown = table.bytes(&Numbers::total(shown));
        let stacks_of = units::counted(all as u64, "stack");
        let share = units::percent(shown, whole);
        let whole_bytes = units::bytes(whole);
        if top < all {
            writeln!(
                self.out,
                "\n{bold}{title}: top {top} of {stacks_of}, {share} of {whole_bytes}{plain}"
            )?;
        } else {
            writeln!(
                self.out,
                "\n{bold}{title}: {stacks_of}, {whole_bytes}{plain}"
            )?;
        }
        for (place, (stack, numbers)) in stacks.iter().take(top).enumerate() {
            self.stack_heading(table, place, numbers, whole)?;
            let mut seen = seen.iter().take(self.options.top);
            let seen = seen
                .position(|(other, numbers)| Table::InUse.has(numbers) && ptr::eq(*other, *stack));
            self.stack(stack, seen)?;
        }
        Ok(())
    }

    fn stack_heading(
        &mut self,
        table: Table,
        place: usize,
        numbers: &Numbers,
        whole: u64,
    ) -> io::Result<()> {
        let Style {
            bold, warn, plain, ..
        } = self.style;
        let bytes = table.bytes(numbers);
        let bytes_in_use = grown(numbers.inuse_bytes);
        let share = units::percent(bytes, whole);
        let rest = match table {
            Table::InUse => {
                let objects = units::counted(grown(numbers.inuse_objects), "object");
                let allocated = units::bytes(numbers.alloc_bytes);
                if bytes == numbers.alloc_bytes {
                    format!("{objects}, all that it allocated")
                } else if bytes > numbers.alloc_bytes {
                    // Counting began anew after some of it was allocated.
                    format!("{objects}; allocated lately: {allocated}")
                } else {
                    let kept = units::percent(bytes, numbers.alloc_bytes);
                    format!("{objects}, {kept} of the {allocated} that it allocated")
                }
            }
            Table::Allocated => {
                let objects = units::counted(numbers.alloc_objects, "object");
                if numbers.inuse_bytes == 0 {
                    format!("{objects}, all freed again")
                } else if self.profile.window.is_some() {
                    let change = units::change(numbers.inuse_bytes);
                    format!("{objects}, {change} in use")
                } else {
                    format!("{objects}, {} still in use", units::bytes(bytes_in_use))
                }
            }
        };
        let uncertainty = match uncertainty(table, numbers) {
            Some(Uncertainty::Fair(range)) => format!("{range}; "),
            Some(Uncertainty::Rough(range)) => format!("{warn}rough: {range}{plain}; "),
            None => String::new(),
        };
        writeln!(
            self.out,
            "\n  {:<4} {bold}{:>9}  {share:>6}{plain}  {uncertainty}{rest}",
            format!("#{}", place + 1),
            units::bytes(bytes)
        )
    }

    /// The lines of a stack, or of one that is in-use stack number `seen`, the
    /// first only.
    fn stack(&mut self, stack: &StackProfile, seen: Option<usize>) -> io::Result<()> {
        let Style { dim, plain, .. } = self.style;
        let entries = condense(lines(&stack.frames));
        let all = entries.len();
        if let Some(place) = seen.filter(|_| all > 2) {
            if let Some(leaf) = entries.first() {
                self.entry(leaf)?;
            }
            return writeln!(
                self.out,
                "       {dim}... as #{} in use above{plain}",
                place + 1
            );
        }
        // Not to save a line by writing a line that says so.
        let shown = if all <= self.options.max_lines.saturating_add(1) {
            all
        } else {
            self.options.max_lines
        };
        for entry in entries.iter().take(shown) {
            self.entry(entry)?;
        }
        if shown < all {
            let more = units::counted((all - shown) as u64, "more caller");
            writeln!(self.out, "       {dim}... {more}{plain}")?;
        }
        if stack.truncated() {
            writeln!(self.out, "       {dim}... and its callers, unknown{plain}")?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let Style { dim, plain, .. } = self.style;
        match entry {
            Entry::Line(line) => self.line(line),
            Entry::Library(lines) => writeln!(
                self.out,
                "       {dim}... {lines} in the language's library{plain}"
            ),
        }
    }

    fn line(&mut self, line: &FrameLine<'_>) -> io::Result<()> {
        let Style { dim, plain, .. } = self.style;
        let mut function = printable(&line.label()).into_owned();
        if line.inlined {
            function += " (inlined)";
        }
        // A label made of module and offset says the module already.
        let place = line
            .source()
            .or_else(|| {
                let known = line.function.is_ok();
                known.then(|| module_basename(line.frame).unwrap_or_default().into_owned())
            })
            .unwrap_or_default();
        if place.is_empty() {
            return writeln!(self.out, "       {function}");
        }
        writeln!(
            self.out,
            "       {function:<44} {dim}{}{plain}",
            printable(&place)
        )
    }
}

/// A line of a stack, or several that say nothing about the program.
enum Entry<'a> {
    Line(FrameLine<'a>),
    Library(usize),
}

/// Runs of lines from this many on are condensed.
const LIBRARY_RUN: usize = 3;

/// Puts one entry in place of each run of lines within the standard library of
/// the language: between an allocation and the code that wanted it there can be
/// a dozen of them, and who looks for a leak looks for the code.
fn condense<'a>(lines: impl Iterator<Item = FrameLine<'a>>) -> Vec<Entry<'a>> {
    let lines: Vec<FrameLine<'a>> = lines.collect();
    lines
        .chunk_by(|one, next| is_library(one) == is_library(next))
        .flat_map(|run| {
            if run.len() >= LIBRARY_RUN && run.first().is_some_and(is_library) {
                vec![Entry::Library(run.len())]
            } else {
                run.iter().copied().map(Entry::Line).collect()
            }
        })
        .collect()
}

/// Whether the line's source belongs to a standard library: Rust's as the
/// project builds it, or a C++ header's.
fn is_library(line: &FrameLine<'_>) -> bool {
    let file = line
        .function
        .ok()
        .and_then(|function| function.file.as_deref());
    file.is_some_and(|file| {
        file.starts_with("/rustc/")
            || file.starts_with("/rust/deps/")
            || file.contains("/include/c++/")
    })
}

#[cfg(test)]
mod tests;
