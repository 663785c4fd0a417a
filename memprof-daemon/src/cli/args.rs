//! Options that several subcommands share, and their units.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use memprof_common::{config::Unwind, limits::MAX_STACK_DEPTH};

use super::pools::PoolArgs;
use crate::{
    config::{self, parse_interval},
    filter::Filters,
    pipeline::{
        budget::{MaxMemory, WantedSizes},
        tracer::TracerOptions,
    },
    probe::{mode::ModeChoice, walker::Walker},
};

/// How to trace.
#[derive(Clone, Debug, Args)]
pub(super) struct TraceArgs {
    /// Mean bytes between samples; 1 takes every allocation, 0 none
    #[arg(
        short = 'i',
        long,
        value_name = "BYTES",
        default_value = "512KiB",
        env = "MEMPROF_SAMPLE_INTERVAL",
        value_parser = parse_interval
    )]
    sample_interval: u64,

    /// Frames to keep of a stack; 1 keeps the calling function only
    #[arg(
        long,
        value_name = "N",
        default_value_t = MAX_STACK_DEPTH as u32,
        value_parser = clap::value_parser!(u32).range(1..=MAX_STACK_DEPTH as i64)
    )]
    stack_depth: u32,

    /// The most memory that memprof may take, in the kernel and outside; `none` for no limit.
    /// At the limit caches are dropped, then ended processes forgotten, then stacks and
    /// processes left out, all of it counted [default: 1GiB]
    #[arg(
        long,
        value_name = "BYTES",
        env = "MEMPROF_MAX_MEMORY",
        value_parser = parse_max_memory
    )]
    max_memory: Option<MaxMemory>,

    /// Room for events on their way from BPF; a power of two, a page at least [default: 8MiB, or
    /// what --max-memory allows]
    #[arg(long, value_name = "BYTES", value_parser = parse_ring)]
    ring_size: Option<Bytes>,

    /// Sampled blocks that can be live at once [default: 1048576, or what --max-memory allows]
    #[arg(long, value_name = "N", value_parser = entries())]
    live_entries: Option<u32>,

    /// Distinct stacks that BPF can know at once [default: 65536, or what --max-memory allows]
    #[arg(long, value_name = "N", value_parser = entries())]
    stack_entries: Option<u32>,

    /// Allocation calls that can be under way at once, one a thread [default: 16384, or what
    /// --max-memory allows]
    #[arg(long, value_name = "N", value_parser = entries())]
    in_flight_entries: Option<u32>,

    /// How to look at calls: auto is the prefilter where a process allows it, else uprobes;
    /// prefilter is that or an error; uprobe never writes to a process, and is the best
    /// that the kernel has of session, multi and perf, each of which can be named
    #[arg(long, value_name = "MODE", default_value_t = ModeChoice::Auto, env = "MEMPROF_PROBE")]
    probe: ModeChoice,

    /// Give the prefilter up for a process whose threads are in the way so long
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = parse_seconds)]
    attach_timeout: std::time::Duration,

    #[command(flatten)]
    pools: PoolArgs,

    /// How to walk stacks: auto by unwind information, and through code that has none by
    /// frame pointers; dwarf by unwind information alone; fp by frame pointers alone
    #[arg(long, value_name = "HOW", value_enum, default_value_t = UnwindChoice::Auto, env = "MEMPROF_UNWIND")]
    unwind: UnwindChoice,

    /// How BPF goes from frame to frame, for tests of what old kernels do
    #[arg(long, value_name = "WAY", hide = true, env = "MEMPROF_WALK")]
    walk: Option<Walker>,

    /// Write what each walk of a stack saw, for tests of the unwinder
    #[arg(long, value_name = "FILE", hide = true)]
    stack_copies: Option<PathBuf>,

    /// Show diagnostics of the BPF side
    #[arg(long)]
    bpf_log: bool,
}

/// How to walk stacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum UnwindChoice {
    Auto,
    Dwarf,
    Fp,
}

impl From<UnwindChoice> for Unwind {
    fn from(choice: UnwindChoice) -> Self {
        match choice {
            UnwindChoice::Auto => Self::Auto,
            UnwindChoice::Dwarf => Self::Dwarf,
            UnwindChoice::Fp => Self::FramePointers,
        }
    }
}

impl TraceArgs {
    /// # Errors
    ///
    /// They make no sense together.
    pub(super) fn options(&self) -> anyhow::Result<TracerOptions> {
        Ok(TracerOptions {
            sample_interval_bytes: self.sample_interval,
            stack_depth: self.stack_depth,
            max_memory: self.max_memory.unwrap_or_default(),
            sizes: WantedSizes {
                // `parse_ring` lets only such pass.
                ring_bytes: self.ring_size.and_then(|bytes| u32::try_from(bytes.0).ok()),
                live_entries: self.live_entries,
                stack_entries: self.stack_entries,
                in_flight_entries: self.in_flight_entries,
            },
            probe_mode: self.probe,
            pools: self.pools.pools()?,
            all: false,
            filters: Filters::default(),
            children: false,
            keep_exited: None,
            attach_timeout: self.attach_timeout,
            unwind: self.unwind.into(),
            walker: self.walk,
            stack_copies: self.stack_copies.clone(),
            bpf_log: self.bpf_log,
        })
    }
}

/// A number of bytes with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => {
                write!(f, "{}MiB", bytes >> 20)
            }
            bytes if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => {
                write!(f, "{}KiB", bytes >> 10)
            }
            bytes => write!(f, "{bytes}"),
        }
    }
}

fn entries() -> clap::builder::RangedI64ValueParser<u32> {
    // The kernel's limit is lower where memory is; it says so itself.
    clap::value_parser!(u32).range(1..=1 << 30)
}

fn parse_ring(text: &str) -> Result<Bytes, String> {
    let bytes = parse_bytes(text)?;
    if !bytes.0.is_power_of_two() || !(4096..=1 << 30).contains(&bytes.0) {
        return Err("a power of two from 4KiB to 1GiB is needed".to_owned());
    }
    Ok(bytes)
}

/// A number of bytes, or `none`.
fn parse_max_memory(text: &str) -> Result<MaxMemory, String> {
    if text.trim() == "none" {
        return Ok(MaxMemory::Unlimited);
    }
    parse_bytes(text).map(|bytes| MaxMemory::Bytes(bytes.0))
}

/// As [`config::parse_bytes`].
pub(super) fn parse_bytes(text: &str) -> Result<Bytes, String> {
    config::parse_bytes(text).map(Bytes)
}

/// Seconds, also with a fraction; more than 0.
pub(super) fn parse_seconds(text: &str) -> Result<std::time::Duration, String> {
    let text = text.trim();
    let seconds: f64 = text
        .strip_suffix('s')
        .unwrap_or(text)
        .parse()
        .map_err(|_| "a number of seconds is needed, such as 10 or 0.5".to_owned())?;
    if seconds <= 0.0 {
        return Err("more than 0 seconds are needed".to_owned());
    }
    std::time::Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// As [`parse_seconds`], and 0.
pub(super) fn parse_wait(text: &str) -> Result<std::time::Duration, String> {
    match text.trim() {
        "0" | "0s" => Ok(std::time::Duration::ZERO),
        text => parse_seconds(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check units, and that what makes no sense is refused.
    #[test]
    fn bytes_with_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 1),
            ("512KiB", 524_288),
            ("512 kib", 524_288),
            ("64k", 65_536),
            ("2MiB", 2 << 20),
            ("1G", 1 << 30),
            ("4kB", 4000),
            ("7B", 7),
        ] {
            assert_eq!(parse_bytes(text), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "KiB", "-1", "1.5KiB", "1TiBx", "99999999999GiB", "0x10"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert!(parse_interval("5GiB").is_err());
        assert!(parse_ring("4095").is_err());
        assert!(parse_ring("4KiB").is_ok());
    }

    /// Check that sizes print as they are read.
    #[test]
    fn bytes_round_trip() {
        for bytes in [0, 1, 1023, 1024, 1536, 8 << 20] {
            assert_eq!(parse_bytes(&Bytes(bytes).to_string()), Ok(Bytes(bytes)));
        }
    }

    /// Check what says how much memory may be taken, and that the defaults that help names are
    /// those that there are.
    #[test]
    fn max_memory() {
        use clap::CommandFactory as _;
        use memprof_common::limits::{
            DEFAULT_IN_FLIGHT_ENTRIES, DEFAULT_LIVE_ENTRIES, DEFAULT_RING_BYTES,
            DEFAULT_STACK_ENTRIES,
        };
        assert_eq!(parse_max_memory("none"), Ok(MaxMemory::Unlimited));
        assert_eq!(parse_max_memory("64MiB"), Ok(MaxMemory::Bytes(64 << 20)));
        assert!(parse_max_memory("all").is_err());
        let mut command = crate::cli::Cli::command();
        let record = command.find_subcommand_mut("record").unwrap();
        let help = record.render_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        let ring = Bytes(u64::from(DEFAULT_RING_BYTES)).to_string();
        for default in [
            ring,
            DEFAULT_LIVE_ENTRIES.to_string(),
            DEFAULT_STACK_ENTRIES.to_string(),
            DEFAULT_IN_FLIGHT_ENTRIES.to_string(),
        ] {
            let text = format!("[default: {default}, or what --max-memory allows]");
            assert!(help.contains(&text), "{text}: {help}");
        }
    }

    /// Check that durations must be positive and finite.
    #[test]
    fn seconds() {
        assert_eq!(parse_seconds("0.5").unwrap().as_millis(), 500);
        assert_eq!(parse_seconds("3s").unwrap().as_secs(), 3);
        for text in ["0", "-1", "inf", "NaN", "x", ""] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
        assert_eq!(parse_wait("0"), Ok(std::time::Duration::ZERO));
        assert_eq!(parse_wait("1.5"), parse_seconds("1.5"));
        assert!(parse_wait("-1").is_err());
    }
}
