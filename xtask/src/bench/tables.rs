//! Unwind tables: what compiling them takes, and how large they are.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, anyhow, bail};

use super::{
    context::Context,
    process::{LIMIT, run},
    report::TableRow,
};

/// Large files of Debian's, the largest first; those that are there are measured. The
/// bar is about the first.
const FILES: [&str; 4] = [
    LLVM,
    "/usr/lib/gcc/x86_64-linux-gnu/12/cc1",
    "/usr/bin/python3.11",
    "/lib/x86_64-linux-gnu/libc.so.6",
];

/// The file with the bar.
pub(super) const LLVM: &str = "/usr/lib/x86_64-linux-gnu/libLLVM-14.so.1";

/// Times that each is compiled.
const TIMES: usize = 5;

/// Measures all of them.
///
/// # Errors
///
/// A table cannot be compiled.
pub(super) fn measure(context: &Context) -> Result<Vec<TableRow>> {
    let there = FILES.iter().filter(|file| Path::new(file).exists());
    there.map(|file| measure_one(context, file)).collect()
}

fn measure_one(context: &Context, file: &str) -> Result<TableRow> {
    let mut rows = Vec::new();
    for _ in 0..TIMES {
        // A process for each time: what is free in one would be used again.
        rows.extend(compile(context, &[file])?);
    }
    let mut row = rows.first().cloned().context("no result")?;
    row.seconds = rows.iter().flat_map(|row| row.seconds.clone()).collect();
    row.peak_bytes = rows.iter().flat_map(|row| row.peak_bytes.clone()).collect();
    Ok(row)
}

/// The tables of `files`, each compiled once, in this order.
///
/// # Errors
///
/// One of them cannot be compiled.
pub(super) fn compile(context: &Context, files: &[&str]) -> Result<Vec<TableRow>> {
    let program = context
        .unwind_tables
        .as_ref()
        .map_err(|why| anyhow!(why.clone()))?;
    let output = run(Command::new(program).args(files), LIMIT)?.stdout;
    let rows: Vec<_> = output.lines().skip(1).map(row).collect::<Result<_>>()?;
    if rows.len() != files.len() {
        bail!("{} of {} files have tables", rows.len(), files.len());
    }
    Ok(rows)
}

/// A line of `unwind_tables`: functions, rows, wide rules, damaged ones, KiB of the table,
/// of the file and of memory, milliseconds, and the path.
fn row(line: &str) -> Result<TableRow> {
    let mut rest = line;
    let mut next = || {
        let (word, behind) = rest.trim_start().split_once(' ')?;
        rest = behind;
        Some(word)
    };
    let mut words = [""; 8];
    for word in &mut words {
        *word = next().with_context(|| format!("`{line}` is too short"))?;
    }
    let path = rest.trim_start().to_owned();
    let [functions, rows, _, _, table, file, peak, ms] = words;
    Ok(TableRow {
        path,
        file_bytes: file.parse::<u64>()? * 1024,
        functions: functions.parse()?,
        rows: rows.parse()?,
        table_bytes: table.parse::<u64>()? * 1024,
        peak_bytes: vec![peak.parse::<u64>()? * 1024],
        seconds: vec![ms.parse::<f64>()? / 1e3],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a line is read, spaces in its path included.
    #[test]
    fn lines() {
        let row =
            row("  3713   28274   12   0   231   1880   2048   2.5  /lib/a b.so").expect("a row");
        assert_eq!(row.path, "/lib/a b.so");
        assert_eq!((row.functions, row.rows), (3713, 28274));
        assert_eq!((row.table_bytes, row.file_bytes), (231 << 10, 1880 << 10));
        assert_eq!((row.peak_bytes, row.seconds), (vec![2 << 20], vec![0.0025]));
        assert!(super::row("1 2 3").is_err());
    }
}
