//! `memprof check`.

use std::{fmt::Write as _, process::ExitCode};

use clap::Args;

use crate::{
    probe::{
        find::{AllocatorModule, Finder, FoundSite},
        requirements::{State, check_host},
    },
    process::{
        files::FileStore,
        info::{ProcessInfo, check_machine},
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
    for &pid in &args.pids {
        let info = ProcessInfo::read(pid)?;
        check_machine(pid)?;
        let modules = finder.find_all(pid, &read_mappings(pid, &files)?)?;
        print!("\n{}", sites(pid, &info.comm, &modules));
    }
    Ok(if met {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(super::FAILURE)
    })
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
        for function in &module.indirect {
            let name = function.symbol();
            let _ = writeln!(text, "  {name:names$}  not probed: chosen at run time");
        }
    }
    text
}

/// Function and aliases, place, instruction, how it is executed.
fn row(site: &FoundSite) -> [String; 4] {
    let mut name = site.function.symbol().to_owned();
    if !site.aliases.is_empty() {
        let aliases: Vec<_> = site.aliases.iter().map(|alias| alias.symbol()).collect();
        name = format!("{name} ({})", aliases.join(", "));
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
