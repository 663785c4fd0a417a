//! Diagnostics, to stderr: for people at a terminal, or for the journal.

use std::{
    fmt,
    io::{self, IsTerminal as _},
};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::causes::with_causes;

/// Shows warnings, and more by `MEMPROF_LOG=info`. A bare level is ours alone: libraries have
/// much to say that helps nobody.
pub(super) fn init() {
    let wanted = std::env::var("MEMPROF_LOG").unwrap_or_default();
    let directives = match wanted.as_str() {
        "" => "warn,memprof_ebpf=trace".to_owned(),
        level if !level.contains(['=', ',']) => {
            format!("warn,memprof={level},memprof_ebpf=trace")
        }
        directives => directives.to_owned(),
    };
    let filter = EnvFilter::try_new(directives)
        .unwrap_or_else(|_| EnvFilter::new("warn,memprof_ebpf=trace"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    // Fails only if a logger is set already.
    let _ = if is_journal() {
        builder.event_format(ForJournal).try_init()
    } else {
        builder
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .try_init()
    };
}

/// Says why memprof ends.
pub(super) fn say_fatal(error: &anyhow::Error) {
    let text = format!("memprof: {}", with_causes(error.as_ref()));
    if is_journal() {
        let mut lines = String::new();
        // Writing to a string does not fail.
        let _ = prefixed(&mut lines, Level::ERROR, &text);
        eprint!("{lines}");
    } else {
        eprintln!("{text}");
    }
}

/// Whether stderr leads to the journal: systemd says which file that is (systemd.exec(5),
/// `JOURNAL_STREAM`). Without a look at it, a command that memprof's stderr was redirected
/// for would get lines that are made for the journal.
fn is_journal() -> bool {
    let Ok(journal) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    rustix::fs::fstat(io::stderr())
        .is_ok_and(|stderr| journal == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

/// A line has its priority in front (sd-daemon(3)); the journal has time and program itself.
struct ForJournal;

impl<S, N> FormatEvent<S, N> for ForJournal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = String::new();
        context.format_fields(Writer::new(&mut text), event)?;
        prefixed(&mut writer, *event.metadata().level(), &text)
    }
}

/// Each line on its own: the journal makes an entry of each.
fn prefixed(writer: &mut dyn fmt::Write, level: Level, text: &str) -> fmt::Result {
    let priority = match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    };
    text.lines()
        .try_for_each(|line| writeln!(writer, "<{priority}>{line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that each line has the priority of its level, and nothing else before it.
    #[test]
    fn priorities() {
        let line = |level| {
            let mut text = String::new();
            prefixed(&mut text, level, "a\nb").unwrap();
            text
        };
        assert_eq!(line(Level::ERROR), "<3>a\n<3>b\n");
        assert_eq!(line(Level::WARN), "<4>a\n<4>b\n");
        assert_eq!(line(Level::INFO), "<6>a\n<6>b\n");
        assert_eq!(line(Level::DEBUG), "<7>a\n<7>b\n");
        assert_eq!(line(Level::TRACE), "<7>a\n<7>b\n");
    }
}
