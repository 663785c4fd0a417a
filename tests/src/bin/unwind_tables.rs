//! What the unwind tables of files take: `unwind_tables FILE...`. Build it with `--release`.
//!
//! The peak is what compiling took of memory at most, the file's pages among it.

use std::{
    env,
    fs::{self, File},
    io,
    process::ExitCode,
    time::{Duration, Instant},
};

use memprof::unwind::{Table, compile};

struct Measured {
    file_bytes: u64,
    time: Duration,
    peak_kib: u64,
    table: Table,
}

fn main() -> ExitCode {
    let files: Vec<String> = env::args().skip(1).collect();
    if files.is_empty() {
        eprintln!("usage: unwind_tables FILE...");
        return ExitCode::from(2);
    }
    println!(
        "functions      rows  wide rules  damaged  table KiB  file KiB  peak KiB     ms  file"
    );
    for path in &files {
        match measure(path) {
            Ok(measured) => println!(
                "{:9} {:9} {:11} {:8} {:10} {:9} {:9} {:6.1}  {path}",
                measured.table.functions,
                measured.table.rows.len(),
                measured.table.wide.len() / 2,
                measured.table.damaged,
                measured.table.words() * 8 / 1024,
                measured.file_bytes / 1024,
                measured.peak_kib,
                measured.time.as_secs_f64() * 1e3,
            ),
            Err(error) => {
                eprintln!("{path}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn measure(path: &str) -> Result<Measured, String> {
    let text = |error: io::Error| error.to_string();
    let file = File::open(path).map_err(text)?;
    let file_bytes = file.metadata().map_err(text)?.len();
    // 5 sets the peak back to what is resident now (proc_pid_clear_refs(5)).
    fs::write("/proc/self/clear_refs", "5").map_err(text)?;
    let before = status_kib("VmRSS:").map_err(text)?;
    let start = Instant::now();
    let table = compile(&file).map_err(|error| error.to_string())?;
    let time = start.elapsed();
    Ok(Measured {
        file_bytes,
        time,
        peak_kib: status_kib("VmHWM:").map_err(text)?.saturating_sub(before),
        table,
    })
}

fn status_kib(name: &str) -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("no {name} in /proc/self/status")))
}
