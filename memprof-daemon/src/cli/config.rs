//! `memprof config`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use hyper::Method;

use super::client::ClientArgs;
use crate::{
    config::{Config, ConfigChange, parse_interval},
    export::units,
};

/// Show or change the settings of a running daemon.
///
/// Blocks that were sampled before a change keep their weight, and totals go on.
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    #[command(flatten)]
    client: ClientArgs,

    /// New mean bytes between samples; 1 takes every allocation, 0 none
    #[arg(short = 'i', long, value_name = "BYTES", value_parser = parse_interval)]
    sample_interval: Option<u64>,
}

pub(super) fn run(args: ConfigArgs) -> anyhow::Result<ExitCode> {
    let (method, body) = match args.sample_interval {
        Some(_) => {
            let change = ConfigChange {
                sample_interval_bytes: args.sample_interval,
                ..ConfigChange::default()
            };
            (Method::PUT, serde_json::to_string(&change)?)
        }
        None => (Method::GET, String::new()),
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
    vec![format!(
        "sample interval  {} bytes ({meaning})",
        config.sample_interval_bytes
    )]
}
