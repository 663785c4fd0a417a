//! `memprof check`.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;

use crate::{
    golang::{self, FoundGo, GoFiles},
    prefilter::{
        check::{check, require_untraced},
        leftover,
    },
    probe::{
        find::{AllocatorModule, Finder, FoundSite},
        requirements::{State, check_host},
    },
    process::{
        files::FileStore,
        info::{ProcessInfo, check_machine},
        mapping::MappingTable,
        maps::read_mappings,
    },
};

/// Can this host do it? One line a requirement, and the mend
///
/// With -p, also where the process would be probed: nothing is attached.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Process to show the probe sites of; may be repeated
    #[arg(
        short = 'p',
        long = "pid",
        value_name = "PID",
        num_args = 1..,
        value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pids: Vec<u32>,
}

/// Prints each requirement and its mend, then the sites; fails if a requirement
/// is not met.
pub(super) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let mut met = true;
    for requirement in check_host() {
        match requirement.state {
            State::Met(detail) => println!("ok    {:15} {detail}", requirement.name),
            State::Unmet { problem, mend } => {
                met = false;
                println!("FAIL  {:15} {problem}", requirement.name);
                println!("      {:15} mend: {mend}", "");
            }
        }
    }
    let (files, finder) = (FileStore::default(), Finder::default());
    let go_files = GoFiles::default();
    for &pid in &args.pids {
        let info = ProcessInfo::read(pid)?;
        check_machine(pid)?;
        let mappings = read_mappings(pid, &files)?;
        let go = golang::find(pid, &mappings, &go_files);
        match finder.find_all(pid, &mappings) {
            Ok(modules) => {
                print!("\n{}", sites(pid, &info.comm, &modules));
                println!("{}", engine(pid, &info.comm, &mappings, &modules));
            }
            Err(error) if go.is_none() => return Err(error.into()),
            // A Go program has no malloc, unless it uses cgo.
            Err(_) => println!(),
        }
        if let Some(found) = go {
            println!("{}", go_runtime(pid, &info.comm, &found));
        }
    }
    Ok(if met {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(super::FAILURE)
    })
}

/// What can be had of a Go program's own heap profile.
fn go_runtime(pid: u32, comm: &str, found: &FoundGo) -> String {
    let version = &found.version;
    match &found.profile {
        Ok((_, Some(reading))) => {
            let buckets = reading.counts.len();
            let took = reading.took.as_secs_f64() * 1e3;
            format!(
                "pid {pid} ({comm}): go runtime: the heap profile of {version}, one sample every \
                 {} B, is read: {buckets} buckets in {took:.1} ms",
                reading.rate_bytes
            )
        }
        Ok((_, None)) => format!("pid {pid} ({comm}): go runtime: {version} has not begun to run"),
        Err(error) => format!("pid {pid} ({comm}): go runtime: not profiled: {error}"),
    }
}

/// Which engine it would get, as far as that can be told without stopping it.
fn engine(pid: u32, comm: &str, mappings: &MappingTable, modules: &[AllocatorModule]) -> String {
    let left = match leftover::find(pid) {
        Ok(None) => None,
        Ok(Some(leftover)) if leftover.in_use => {
            return format!(
                "pid {pid} ({comm}): none, since another memprof has its prefilter in it"
            );
        }
        Ok(Some(_)) => Some("after that of an earlier memprof is taken out".to_owned()),
        Err(error) => return format!("pid {pid} ({comm}): none: {error}"),
    };
    // A function that is hooked already is not the file's.
    let outcome = match left {
        Some(left) => Ok(left),
        None => require_untraced(pid)
            .and_then(|()| check(pid, mappings, modules))
            .map(|modules| {
                let functions: usize = modules.iter().map(|module| module.hooks.len()).sum();
                format!("{functions} functions are entered by a jump")
            }),
    };
    match outcome {
        Ok(how) => format!("pid {pid} ({comm}): engine prefilter: {how}"),
        Err(error) => format!("pid {pid} ({comm}): engine uprobe, no prefilter: {error}"),
    }
}

/// A line a site, in columns, under a line a module.
fn sites(pid: u32, comm: &str, modules: &[AllocatorModule]) -> String {
    let mut text = String::new();
    for module in modules {
        let path = module.file.path.display();
        // Writing to a string does not fail.
        let _ = writeln!(text, "pid {pid} ({comm}): {path}");
        let rows: Vec<[String; 4]> = module.sites.iter().map(row).collect();
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let (names, offsets, instructions) = (width(0), width(1), width(2));
        for [name, offset, instruction, kind] in &rows {
            let _ = writeln!(
                text,
                "  {name:names$}  {offset:>offsets$}  {instruction:instructions$}  {kind}"
            );
        }
        for name in &module.indirect {
            let _ = writeln!(text, "  {name:names$}  not probed: chosen at run time");
        }
    }
    text
}

/// Function and aliases, place, instruction, how it is executed.
fn row(site: &FoundSite) -> [String; 4] {
    let mut name = site.symbol.to_owned();
    if !site.aliases.is_empty() {
        name = format!("{name} ({})", site.aliases.join(", "));
    }
    let point = &site.point;
    let mut kind = if point.emulated {
        "emulated".to_owned()
    } else {
        "stepped out of line".to_owned()
    };
    if let Some(refusal) = point.refusal {
        let _ = write!(kind, ": {refusal}");
    }
    [
        name,
        format!("+{:#x}", point.offset),
        point.instruction.clone(),
        kind,
    ]
}
