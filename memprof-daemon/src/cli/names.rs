//! Options about names.

use std::time::Duration;

use clap::Args;
use tokio::sync::Notify;

use crate::{
    export::profile::Profile,
    pipeline::capture::Capture,
    symbolize::{
        debuginfod::{Debuginfod, settings::Settings},
        worker::SymbolizeHandle,
    },
};

/// Where names come from.
#[derive(Clone, Debug, Args)]
pub(super) struct NamesArgs {
    /// Download debug information that this host lacks from the servers in
    /// `DEBUGINFOD_URLS`; they learn the build ids of what is profiled
    #[arg(long)]
    pub(super) debuginfod: bool,
}

impl NamesArgs {
    /// Starts what finds names.
    pub(super) fn start(&self) -> anyhow::Result<SymbolizeHandle> {
        let debuginfod = if self.debuginfod {
            Some(Debuginfod::start(&Settings::from_env()?)?)
        } else {
            None
        };
        Ok(SymbolizeHandle::start(debuginfod)?)
    }
}

/// How long to wait for what is being downloaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait<'a> {
    pub(super) limit: Duration,
    /// Ends it early.
    pub(super) hurry: &'a Notify,
}

/// Names a profile after which there is no other: waits for debug information that is on
/// its way, and names it once more if some has come.
pub(super) async fn name_last(
    capture: Capture,
    symbolizer: &SymbolizeHandle,
    wait: Wait<'_>,
) -> anyhow::Result<Profile> {
    let Some(debuginfod) = symbolizer.debuginfod().filter(|_| !wait.limit.is_zero()) else {
        return Ok(capture.symbolize(symbolizer).await?);
    };
    let before = debuginfod.counts();
    // Of which files names are wanted, naming finds out.
    let profile = capture.clone().symbolize(symbolizer).await?;
    let pending = debuginfod.counts().pending;
    if pending > 0 {
        eprintln!(
            "memprof: waiting for debug information, {} s at most; files to come: {pending}",
            wait.limit.as_secs_f64()
        );
        tokio::select! {
            () = debuginfod.settled() => {}
            () = tokio::time::sleep(wait.limit) => {}
            () = wait.hurry.notified() => {}
        }
    }
    let counts = debuginfod.counts();
    if counts.pending > 0 {
        eprintln!(
            "memprof: debug information has not arrived, the profile is without; files missing: {}",
            counts.pending
        );
    }
    if counts.downloaded == before.downloaded {
        return Ok(profile);
    }
    Ok(capture.symbolize(symbolizer).await?)
}
