//! How long a process of many threads stands still for the prefilter.

use std::{process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, bail};

use super::{
    context::Context,
    daemon::Daemon,
    process::{LIMIT, Process},
    report::StopRow,
};

/// Threads of the target, and how many of them are busy.
const TARGETS: [(usize, usize); 2] = [(200, 0), (200, 100)];

/// For how long it is traced in between.
const TRACED: Duration = Duration::from_millis(300);

/// What the daemon tells when it has taken the prefilter out, before the number.
const UNSTOPPED: &str = "longest_stopped_ms=";

/// Measures all of it.
///
/// # Errors
///
/// memprof or the target fails, or the process does not get the prefilter.
pub(super) fn measure(context: &Context) -> Result<Vec<StopRow>> {
    // The bar's row is the last.
    TARGETS
        .iter()
        .map(|&(threads, busy)| measure_one(context, threads, busy))
        .collect()
}

fn measure_one(context: &Context, threads: usize, busy: usize) -> Result<StopRow> {
    let mut command = Command::new(context.file("threads"));
    command.args([threads.to_string(), busy.to_string()]);
    let mut target = Process::spawn(&mut command)?;
    target.wait_stdout(LIMIT, |line| line == "ready")?;
    let mut row = StopRow {
        threads,
        busy,
        stopped_ms: Vec::new(),
        attach_ms: Vec::new(),
        unstopped_ms: Vec::new(),
        detach_ms: Vec::new(),
    };
    for _ in 0..context.pick(15, 5) {
        let options = ["--probe", "prefilter"];
        let daemon = Daemon::start_that_tells(context, &options, &[target.pid()])?;
        row.attach_ms.push(daemon.attach.as_secs_f64() * 1e3);
        let stats = daemon.stats()?;
        let stopped = stats.pointer("/processes/0/longest_stopped_ms");
        let stopped = stopped.and_then(serde_json::Value::as_f64);
        row.stopped_ms
            .push(stopped.context("no longest_stopped_ms")?);
        thread::sleep(TRACED);
        let (detach, told) = daemon.stop_and_tell()?;
        row.detach_ms.push(detach.as_secs_f64() * 1e3);
        row.unstopped_ms.push(unstopped(&told)?);
    }
    target.close_stdin();
    target.finish(LIMIT)?.success("the target")?;
    Ok(row)
}

/// Milliseconds that the process stood still at most when the prefilter was taken out.
fn unstopped(told: &str) -> Result<f64> {
    let number = told.split_once(UNSTOPPED).map(|(_, rest)| {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
        rest.get(..end.unwrap_or(rest.len())).unwrap_or_default()
    });
    match number.map(str::parse) {
        Some(Ok(number)) => Ok(number),
        _ => bail!("the prefilter was not taken out: {told}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that the number is found in what is told, and that its absence is an error.
    #[test]
    fn told() {
        let line = "DEBUG the prefilter is out pid=7 longest_stopped_ms=4.25\nmore";
        assert_eq!(unstopped(line).expect("a number"), 4.25);
        assert!(unstopped("DEBUG cannot take the prefilter out").is_err());
    }
}
