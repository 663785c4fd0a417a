//! Empty probes at the sites that memprof would probe, for as long as it runs:
//! what the traps cost, with no work done in them. The benchmarks measure memprof
//! against it.
//!
//! ```text
//! floor -p PID [--probe session|multi|perf] [--entry-only] [--at-start]
//! ```
//!
//! With `--entry-only` returns are left alone; with `--at-start` the probes are
//! at the first instruction of each function, emulated or not. It says
//! `floor: attached` on stderr, and ends on SIGINT or SIGTERM.

use std::{error::Error, process::ExitCode};

use memprof::{
    probe::{attach::Site, find::Finder, loader::load_floor, mode::ModeChoice},
    process::{files::FileStore, maps::read_mappings},
};
use nix::sys::signal::{SigSet, Signal};

struct Arguments {
    pid: u32,
    mode: ModeChoice,
    entry_only: bool,
    at_start: bool,
}

fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let (mut pid, mut mode) = (None, ModeChoice::Auto);
    let (mut entry_only, mut at_start) = (false, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "-p" => pid = Some(value()?.parse()?),
            "--probe" => mode = value()?.parse()?,
            "--entry-only" => entry_only = true,
            "--at-start" => at_start = true,
            _ => return Err(format!("`{word}` is no option").into()),
        }
    }
    Ok(Arguments {
        pid: pid.ok_or("-p PID is needed")?,
        mode,
        entry_only,
        at_start,
    })
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    // Threads that are made from here on have them blocked too.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;

    let mappings = read_mappings(arguments.pid, &FileStore::default())?;
    let modules = Finder::default().find_all(arguments.pid, &mappings)?;
    let mut sites = Vec::new();
    for module in &modules {
        for found in &module.sites {
            sites.push(Site {
                path: module.attach_path.clone(),
                file_offset: if arguments.at_start {
                    found.file_offset
                } else {
                    found.probe_offset()
                },
                function: found.function,
                symbol: found.symbol,
                number: u16::try_from(sites.len())?,
                places: found.places,
                returns: Vec::new(),
                passes_on: Vec::new(),
            });
        }
    }
    let mut prober = load_floor(arguments.mode, arguments.entry_only)?;
    prober.attach(0, arguments.pid, &sites)?;
    eprintln!("floor: attached");
    signals.wait()?;
    prober.detach_all();
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}
