//! `cargo xtask bench`: memprof beside its peers, in one run on one machine.

mod attach;
mod bars;
mod check;
mod context;
mod daemon;
mod dump;
mod excluded;
mod host;
mod http;
mod many;
mod options;
mod pair;
mod process;
mod programs;
mod render;
mod report;
mod run_time;
mod stats;
mod tables;
mod tools;
mod trace;
mod unwind;
mod workloads;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use context::Context;
use options::{Options, Section, USAGE};
use report::{Failure, Report, SCHEMA};

/// Measures and writes the results, or renders earlier ones.
///
/// # Errors
///
/// The command line makes no sense, something cannot be built or written, or a
/// section fails as a whole: the others are written before.
pub(crate) fn bench(workspace: &Path, words: &[String]) -> Result<()> {
    let options = Options::parse(words)?;
    if options.help {
        println!("{USAGE}");
        return Ok(());
    }
    let page = workspace.join("docs/benchmarks.md");
    if let Some(file) = &options.render {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let report: Report = serde_json::from_slice(&text).context("these are no results")?;
        return write(&page, &render::markdown(&report));
    }

    process::kill_children_on_signals()?;
    let started = Instant::now();
    let context = Context::new(workspace, &options)?;
    let mut report = Report {
        schema: SCHEMA.to_owned(),
        host: host::describe(workspace, &context),
        quick: options.quick,
        duration_s: 0.0,
        pair: Vec::new(),
        programs: Vec::new(),
        trace: None,
        dump: None,
        stops: Vec::new(),
        unwind: Vec::new(),
        tables: Vec::new(),
        many: None,
        excluded: Vec::new(),
        failures: Vec::new(),
        bars: Vec::new(),
    };
    for &section in &options.sections {
        eprintln!("bench: {}", section.name());
        if let Err(error) = measure(section, &context, &mut report) {
            eprintln!("bench: {} failed: {error:#}", section.name());
            report.failures.push(Failure {
                section: section.name().to_owned(),
                reason: format!("{error:#}"),
            });
        }
    }
    report.duration_s = started.elapsed().as_secs_f64();
    report.bars = bars::bars(&report);

    let json = options
        .json
        .unwrap_or_else(|| context.file("benchmarks.json"));
    write(&json, &(serde_json::to_string_pretty(&report)? + "\n"))?;
    let text = render::markdown(&report);
    println!("{text}");
    write(&page, &text)?;
    match report.failures.len() {
        0 => Ok(()),
        failed => anyhow::bail!("{failed} sections failed"),
    }
}

fn measure(section: Section, context: &Context, report: &mut Report) -> Result<()> {
    let seconds = Duration::from_secs;
    match section {
        Section::Pair => {
            report.pair = pair::measure(context, context.pick(seconds(270), seconds(40)))?
        }
        Section::Programs => {
            report.programs = programs::measure(context, context.pick(seconds(480), seconds(40)))?;
        }
        Section::Trace => report.trace = Some(trace::measure(context)?),
        Section::Dump => report.dump = Some(dump::measure(context)?),
        Section::Attach => report.stops = attach::measure(context)?,
        Section::Unwind => {
            report.unwind = unwind::measure(context, context.pick(seconds(60), seconds(15)))?;
        }
        Section::Tables => report.tables = tables::measure(context)?,
        Section::Many => report.many = Some(many::measure(context)?),
        Section::Excluded => {
            report.excluded = excluded::measure(context, context.pick(seconds(60), seconds(15)))?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("bench: wrote {}", path.display());
    Ok(())
}
