//! `memprof ps`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::client::ClientArgs;
use crate::export::{losses::sentence, units};

/// List what a running daemon traces, and what it has seen of each process.
///
/// GO, of a Go program, is the version of Go, its MemProfileRate, and how old the profile is that its
/// last garbage collection has published, once memprof has seen one do so; why one is refused
/// stands below. STOPPED is how long a process ever stood still at most while memprof changed it, ATTACH how
/// long attaching to it took the kernel. LOST adds up what was lost or came late, of all causes:
/// `memprof dump` tells which.
#[derive(Debug, Args)]
pub(super) struct PsArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// How to write it
    #[arg(short = 'f', long, value_enum, default_value_t = PsFormat::Text)]
    format: PsFormat,

    /// List all that have ended and are kept, not only the ten that held most at their end
    #[arg(long)]
    ended: bool,
}

/// So many of those that have ended are in the table unless all are asked for: with `daemon -a`
/// there are hundreds, and most of no interest.
const ENDED_SHOWN: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PsFormat {
    /// A table
    Text,
    /// What the daemon answers on /v1/processes
    Json,
}

/// What of `/v1/processes` is shown.
#[derive(Debug, Deserialize)]
struct Process {
    pid: u32,
    comm: String,
    state: String,
    engine: String,
    samples: u64,
    inuse_bytes: u64,
    alloc_bytes_per_s: Option<f64>,
    losses: BTreeMap<String, u64>,
    longest_stopped_ms: f64,
    attach_ms: f64,
    go: Option<Go>,
}

/// What is shown of a Go program.
#[derive(Debug, Deserialize)]
struct Go {
    version: String,
    mem_profile_rate: Option<u64>,
    published_s: Option<f64>,
    refusal: Option<String>,
}

impl Go {
    fn cell(&self) -> String {
        let version = self.version.replace(char::is_control, "?");
        if self.refusal.is_some() {
            return format!("{version}, refused");
        }
        let rate = match self.mem_profile_rate {
            None => return format!("{version}, not begun"),
            Some(0) => ", off".to_owned(),
            Some(rate) => format!(" every {}", units::bytes(rate)),
        };
        let age = self
            .published_s
            .map(|age| format!(", {age:.0} s old"))
            .unwrap_or_default();
        format!("{version}{rate}{age}")
    }
}

pub(super) fn run(args: &PsArgs) -> anyhow::Result<ExitCode> {
    let client = args.client.client()?;
    let runtime = super::runtime()?;
    let body = runtime.block_on(client.get("/v1/processes"))?;
    let mut notes = Vec::new();
    let text = match args.format {
        PsFormat::Json => body.to_vec(),
        PsFormat::Text => {
            let processes: Vec<Process> = serde_json::from_slice(&body)
                .context("the daemon's answer is no list of processes: is it another version?")?;
            let stats = runtime.block_on(client.get("/v1/stats"))?;
            notes = limits_in_words(&processes, serde_json::from_slice(&stats).ok());
            let ended = if args.ended { usize::MAX } else { ENDED_SHOWN };
            table(&processes, ended).into_bytes()
        }
    };
    let mut out = io::stdout().lock();
    match out.write_all(&text).and_then(|()| out.flush()) {
        // Whoever read us has seen enough (`| head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("cannot write to standard output")?,
    }
    for note in notes {
        eprintln!("memprof: {note}");
    }
    Ok(ExitCode::SUCCESS)
}

/// What of `/v1/stats` is shown.
#[derive(Debug, Deserialize)]
struct Stats {
    memory: Memory,
}

#[derive(Debug, Deserialize)]
struct Memory {
    max_bytes: Option<u64>,
    refuses_targets: bool,
    refused_targets: u64,
    refused_tables: u64,
    forgotten_early: u64,
}

/// Causes of loss that more memory mends.
const LIMITS: [&str; 4] = [
    "live_map_full",
    "stack_map_full",
    "in_flight_full",
    "stacks_full",
];

/// What was left out since memory is bounded, a sentence each.
fn limits_in_words(processes: &[Process], stats: Option<Stats>) -> Vec<String> {
    let mut notes = Vec::new();
    for process in processes {
        let losses = process.losses.iter();
        let limits =
            losses.filter(|(name, number)| **number > 0 && LIMITS.contains(&name.as_str()));
        notes.extend(
            limits
                .map(|(name, number)| format!("pid {}: {}", process.pid, sentence(name, *number))),
        );
    }
    let Some(Stats { memory }) = stats else {
        return notes;
    };
    let max = memory.max_bytes.map_or("none".to_owned(), units::bytes);
    let hint = format!("raise --max-memory, which is {max}, or -i");
    if memory.forgotten_early > 0 {
        let number = units::count(memory.forgotten_early);
        notes.push(format!(
            "{number} ended processes forgotten before the time: {hint}"
        ));
    }
    if memory.refused_tables > 0 {
        let what = units::counted(memory.refused_tables, "unwind table");
        notes.push(format!("no memory for {what}, so stacks are cut: {hint}"));
    }
    if memory.refuses_targets {
        notes.push(format!("no further process is taken on: {hint}"));
    } else if memory.refused_targets > 0 {
        let number = units::count(memory.refused_targets);
        notes.push(format!(
            "{number} processes not taken on when memory was short: {hint}"
        ));
    }
    notes
}

const HEADING: [&str; 11] = [
    "PID", "STATE", "ENGINE", "SAMPLES", "IN USE", "ALLOC/S", "LOST", "STOPPED", "ATTACH", "GO",
    "COMMAND",
];

/// Columns that are words: numbers stand to the right.
const WORDS: [bool; 11] = [
    false, true, true, false, false, false, false, false, false, true, true,
];

/// A line a process, those first that hold most. Of those that have ended at most `ended`,
/// and how many more there are.
fn table(processes: &[Process], ended: usize) -> String {
    let mut processes: Vec<&Process> = processes.iter().collect();
    processes.sort_by_key(|process| (std::cmp::Reverse(process.inuse_bytes), process.pid));
    let mut seen = 0_usize;
    processes.retain(|process| {
        seen += usize::from(process.state == "ended");
        process.state != "ended" || seen <= ended
    });
    let mut rows = vec![HEADING.map(str::to_owned)];
    rows.extend(processes.iter().map(|process| row(process)));
    let mut widths = [0; HEADING.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for ((cell, width), is_word) in row.iter().zip(widths).zip(WORDS) {
            if !line.is_empty() {
                line.push_str("  ");
            }
            // A String takes whatever it is given.
            let _ = if is_word {
                write!(line, "{cell:<width$}")
            } else {
                write!(line, "{cell:>width$}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    let more = seen.saturating_sub(ended);
    if more > 0 {
        let more = units::count(more as u64);
        // As above.
        let _ = writeln!(text, "and {more} that have ended (--ended lists them)");
    }
    text + &refusals(&processes)
}

/// Why Go programs are refused, a line a reason.
fn refusals(processes: &[&Process]) -> String {
    let mut pids: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for process in processes {
        if let Some(reason) = process.go.as_ref().and_then(|go| go.refusal.as_deref()) {
            pids.entry(reason)
                .or_default()
                .push(process.pid.to_string());
        }
    }
    let lines = pids.into_iter().map(|(reason, pids)| {
        let reason = reason.replace(char::is_control, "?");
        format!("\nNo Go heap profile of {}: {reason}\n", pids.join(", "))
    });
    lines.collect()
}

fn row(process: &Process) -> [String; HEADING.len()] {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the cast saturates, and a rate is not negative"
    )]
    let rate = process
        .alloc_bytes_per_s
        .map_or("-".to_owned(), |rate| units::bytes(rate as u64));
    let milliseconds = |time: f64| format!("{time:.1} ms");
    [
        process.pid.to_string(),
        process.state.clone(),
        process.engine.clone(),
        units::count(process.samples),
        units::bytes(process.inuse_bytes),
        rate,
        units::count(process.losses.values().sum()),
        milliseconds(process.longest_stopped_ms),
        milliseconds(process.attach_ms),
        process.go.as_ref().map_or("-".to_owned(), Go::cell),
        // A program can call itself anything.
        process.comm.replace(char::is_control, "?"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that what was left out for want of memory is said, with what can be done.
    #[test]
    fn limits() {
        let process = Process {
            pid: 7,
            comm: "x".to_owned(),
            state: "tracing".to_owned(),
            engine: "uprobe".to_owned(),
            samples: 1,
            inuse_bytes: 1,
            alloc_bytes_per_s: None,
            losses: [
                ("stacks_full".to_owned(), 1234),
                ("swept_frees".to_owned(), 2),
            ]
            .into(),
            longest_stopped_ms: 0.0,
            attach_ms: 0.0,
            go: None,
        };
        let memory = Memory {
            max_bytes: Some(64 << 20),
            refuses_targets: true,
            refused_targets: 1,
            refused_tables: 0,
            forgotten_early: 3,
        };
        let notes = limits_in_words(&[process], Some(Stats { memory }));
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert!(notes[0].starts_with("pid 7: 1,234 allocations without a stack"));
        assert!(
            notes[1].starts_with("3 ended processes forgotten"),
            "{notes:?}"
        );
        assert!(notes[2].ends_with("raise --max-memory, which is 64 MiB, or -i"));
        assert!(limits_in_words(&[], None).is_empty());
    }

    /// Check the table: who holds most first, numbers to the right, and names that cannot
    /// move the terminal's cursor.
    #[test]
    fn columns() {
        let process = |pid, comm: &str, inuse_bytes| Process {
            pid,
            comm: comm.to_owned(),
            state: "tracing".to_owned(),
            engine: "prefilter".to_owned(),
            samples: 1234,
            inuse_bytes,
            alloc_bytes_per_s: (pid == 7).then_some(2048.0),
            losses: [("a".to_owned(), 1), ("b".to_owned(), 2)].into(),
            longest_stopped_ms: 1.25,
            attach_ms: 30.0,
            go: None,
        };
        let text = table(
            &[
                process(7, "small", 10),
                process(4242, "la\x1b[2Jrge", 1 << 20),
            ],
            0,
        );
        let expected = [
            " PID  STATE    ENGINE     SAMPLES  IN USE  ALLOC/S  LOST  STOPPED   ATTACH  GO  COMMAND",
            "4242  tracing  prefilter    1,234   1 MiB        -     3   1.2 ms  30.0 ms  -   la?[2Jrge",
            "   7  tracing  prefilter    1,234    10 B    2 KiB     3   1.2 ms  30.0 ms  -   small",
        ];
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines, expected);
    }

    /// Check that of those that have ended the table has the ones that held most, and says how
    /// many it leaves out.
    #[test]
    fn ended() {
        let process = |pid, state: &str| Process {
            pid,
            comm: "x".to_owned(),
            state: state.to_owned(),
            engine: "uprobe".to_owned(),
            samples: 1,
            inuse_bytes: u64::from(pid),
            alloc_bytes_per_s: None,
            losses: [].into(),
            longest_stopped_ms: 0.0,
            attach_ms: 0.0,
            go: None,
        };
        let processes: Vec<Process> = [(1, "tracing"), (2, "ended"), (3, "ended"), (4, "ended")]
            .map(|(pid, state)| process(pid, state))
            .into();
        let shown = |ended| -> Vec<String> {
            let text = table(&processes, ended);
            let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
            text.lines().skip(1).filter_map(first).collect()
        };
        assert_eq!(shown(usize::MAX), ["4", "3", "2", "1"]);
        assert_eq!(shown(3), ["4", "3", "2", "1"]);
        assert_eq!(shown(1), ["4", "1", "and"]);
        let last = "and 3 that have ended (--ended lists them)\n";
        assert!(table(&processes, 0).ends_with(last));
    }

    /// Check what is said of Go programs, and that those that are refused for the same reason
    /// share a line.
    #[test]
    fn go_programs() {
        let process = |pid, go| Process {
            pid,
            comm: "server".to_owned(),
            state: "tracing".to_owned(),
            engine: "go runtime".to_owned(),
            samples: 0,
            inuse_bytes: 0,
            alloc_bytes_per_s: None,
            losses: BTreeMap::new(),
            longest_stopped_ms: 0.0,
            attach_ms: 0.0,
            go: Some(go),
        };
        let go = |rate, published_s, refusal: Option<&str>| Go {
            version: "go1.22.3".to_owned(),
            mem_profile_rate: rate,
            published_s,
            refusal: refusal.map(str::to_owned),
        };
        let processes = [
            process(1, go(Some(524_288), Some(3.4), None)),
            process(2, go(Some(524_288), None, None)),
            process(3, go(Some(0), None, None)),
            process(4, go(None, None, None)),
            process(5, go(None, None, Some("it is old"))),
            process(6, go(None, None, Some("it is old"))),
        ];
        let text = table(&processes, 0);
        let cells = [
            "go1.22.3 every 512 KiB, 3 s old",
            "go1.22.3 every 512 KiB",
            "go1.22.3, off",
            "go1.22.3, not begun",
            "go1.22.3, refused",
            "go1.22.3, refused",
        ];
        for (line, cell) in text.lines().skip(1).zip(cells) {
            let rest = line.split_once("0.0 ms  go").expect("a cell").1;
            assert_eq!(
                format!("go{}", rest.trim_end_matches("server").trim()),
                cell
            );
        }
        assert!(
            text.ends_with("\nNo Go heap profile of 5, 6: it is old\n"),
            "{text}"
        );
    }
}
