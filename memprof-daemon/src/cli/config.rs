//! `memprof config`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use hyper::Method;

use super::{client::ClientArgs, rules::RuleArgs};
use crate::{
    config::{Config, ConfigChange, parse_interval},
    export::units,
};

/// Show or change the settings of a running daemon.
///
/// Blocks that were sampled before a change keep their weight, and totals go on. Rules that
/// are given take the place of all that there were.
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// New mean bytes between samples; 1 takes every allocation, 0 none
    #[arg(short = 'i', long, value_name = "BYTES", value_parser = parse_interval)]
    sample_interval: Option<u64>,

    /// Sample nothing until --resume, whatever the interval; calls are counted all the same
    #[arg(long, conflicts_with = "resume")]
    pause: bool,

    /// Sample again
    #[arg(long)]
    resume: bool,

    #[command(flatten)]
    rules: RuleArgs,

    /// Take all rules out: every process is traced
    #[arg(long, conflicts_with_all = ["include", "exclude"])]
    no_rules: bool,
}

pub(super) fn run(args: ConfigArgs) -> anyhow::Result<ExitCode> {
    let has_rules = args.no_rules || !args.rules.is_empty();
    let change = ConfigChange {
        sample_interval_bytes: args.sample_interval,
        paused: (args.pause || args.resume).then_some(args.pause),
        filters: has_rules.then(|| args.rules.filters()).transpose()?,
    };
    let (method, body) = if change == ConfigChange::default() {
        (Method::GET, String::new())
    } else {
        (Method::PUT, serde_json::to_string(&change)?)
    };
    let client = args.client.client()?;
    let answer = client.request(method, "/v1/config", body);
    let answer = super::runtime()?.block_on(answer)?;
    let config: Config =
        serde_json::from_slice(&answer).context("the daemon's answer is no configuration")?;
    for setting in in_words(&config) {
        println!("{setting}");
    }
    Ok(ExitCode::SUCCESS)
}

/// A line a setting.
pub(super) fn in_words(config: &Config) -> Vec<String> {
    let meaning = match config.sample_interval_bytes {
        0 => "off".to_owned(),
        1 => "every allocation".to_owned(),
        bytes => units::bytes(bytes),
    };
    let mut lines = vec![format!(
        "sample interval  {} bytes ({meaning})",
        config.sample_interval_bytes
    )];
    if config.paused {
        lines.push("paused           nothing is sampled".to_owned());
    }
    let rules = [
        ("include", config.filters.include()),
        ("exclude", config.filters.exclude()),
    ];
    for (what, rules) in rules {
        lines.extend(rules.iter().map(|rule| format!("{what:16} {rule}")));
    }
    lines
}
