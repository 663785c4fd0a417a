//! Answers to the HTTP API.

use std::time::Duration;

use serde::Serialize;

use super::{
    capture::Capture,
    metrics::metrics,
    stats::{ProcessSummary, Stats, milliseconds},
    target::TargetError,
    tracer::{ConfigError, LeaveError, TracerHandle},
};
use crate::{
    causes::with_causes,
    config::{Config, ConfigChange},
    export::{
        http::{Backend, BackendError, Told},
        json::rfc_3339,
        metrics::Metrics,
        profile::Profile,
    },
    prefilter::error::DetachError,
    process::info::ProcessError,
    symbolize::{
        debuginfod::{Counts, Debuginfod},
        worker::SymbolizeHandle,
    },
};

/// The running pipeline, as those see it who ask for profiles.
#[derive(Clone, Debug)]
pub struct Service {
    /// Who counts.
    pub tracer: TracerHandle,
    /// Who names.
    pub symbolizer: SymbolizeHandle,
}

impl Service {
    /// A profile of one process or of all.
    ///
    /// # Errors
    ///
    /// [`BackendError::Ended`] if the pipeline has.
    pub async fn profile_of(&self, pid: Option<u32>) -> Result<Profile, BackendError> {
        let capture = self.tracer.capture(pid).await.ok_or(BackendError::Ended)?;
        self.name(capture).await
    }

    /// The same of what happens in a window that begins now.
    async fn profile_in(
        &self,
        pid: Option<u32>,
        window: Duration,
    ) -> Result<Profile, BackendError> {
        let mark = self.tracer.mark().await.ok_or(BackendError::Ended)?;
        if let Some(pid) = pid.filter(|&pid| !mark.has(pid)) {
            return Err(BackendError::NoSuchProcess(pid));
        }
        tokio::time::sleep(window).await;
        let capture = self.tracer.capture_since(pid, Some(mark)).await;
        self.name(capture.ok_or(BackendError::Ended)?).await
    }

    async fn name(&self, capture: Capture) -> Result<Profile, BackendError> {
        capture
            .symbolize(&self.symbolizer)
            .await
            .map_err(|error| BackendError::Failed(error.to_string()))
    }
}

/// What a process that cannot be traced means for who asked.
fn unfit(error: TargetError) -> BackendError {
    let message = with_causes(&error);
    match error {
        TargetError::Process(ProcessError::NotFound { .. })
        | TargetError::Leftover {
            error: DetachError::Process(ProcessError::NotFound { .. }),
            ..
        }
        | TargetError::Exited(_) => BackendError::NotFound(message),
        TargetError::Already(_) | TargetError::InUse(_) | TargetError::HasLeftover(_) => {
            BackendError::Conflict(message)
        }
        TargetError::Stopped => BackendError::Ended,
        TargetError::OverLimit(_) => BackendError::Busy(message),
        TargetError::Process(_)
        | TargetError::Find(_)
        | TargetError::Go { .. }
        | TargetError::Attach(_)
        | TargetError::Prefilter(_)
        | TargetError::Leftover { .. }
        | TargetError::TooMany(_) => BackendError::Unfit(message),
        TargetError::Map { .. } => BackendError::Failed(message),
    }
}

/// What is told of the pipeline.
#[derive(Debug, Serialize)]
pub struct ToldStats {
    #[serde(flatten)]
    tracer: Stats,
    /// If servers are asked for debug information.
    #[serde(skip_serializing_if = "Option::is_none")]
    debuginfod: Option<Counts>,
}

impl Told for ProcessSummary {
    fn pid(&self) -> u32 {
        self.facts.pid
    }

    fn comm(&self) -> &str {
        &self.facts.comm
    }

    fn state(&self) -> &str {
        self.facts.state
    }
}

impl Backend for Service {
    type Stats = ToldStats;
    type Process = ProcessSummary;

    async fn profile(
        &self,
        pid: Option<u32>,
        window: Option<Duration>,
    ) -> Result<Profile, BackendError> {
        let profile = match window {
            Some(window) => self.profile_in(pid, window).await?,
            None => self.profile_of(pid).await?,
        };
        match pid {
            Some(pid) if window.is_none() && profile.processes.is_empty() => {
                Err(BackendError::NoSuchProcess(pid))
            }
            _ => Ok(profile),
        }
    }

    fn profiles_at_a_time(&self) -> usize {
        self.tracer.profiles_at_a_time()
    }

    async fn stats(&self) -> Result<ToldStats, BackendError> {
        let tracer = self.tracer.stats().await.ok_or(BackendError::Ended)?;
        let debuginfod = self.symbolizer.debuginfod().map(Debuginfod::counts);
        Ok(ToldStats { tracer, debuginfod })
    }

    async fn config(&self) -> Result<Config, BackendError> {
        self.tracer.config().await.ok_or(BackendError::Ended)
    }

    async fn set_config(&self, change: ConfigChange) -> Result<Config, BackendError> {
        let answer = self.tracer.set_config(change).await;
        answer
            .ok_or(BackendError::Ended)?
            .map_err(|error| match error {
                ConfigError::Refused(_) => BackendError::Conflict(error.to_string()),
                ConfigError::Map(_) => BackendError::Failed(error.to_string()),
            })
    }

    async fn processes(&self) -> Result<Vec<ProcessSummary>, BackendError> {
        self.tracer.processes().await.ok_or(BackendError::Ended)
    }

    async fn metrics(&self) -> Result<Metrics, BackendError> {
        let stats = self.tracer.stats().await.ok_or(BackendError::Ended)?;
        Ok(metrics(stats))
    }

    async fn attach(&self, pid: u32) -> Result<serde_json::Value, BackendError> {
        let attached = self.tracer.attach(pid).await.map_err(unfit)?;
        Ok(serde_json::json!({
            "pid": attached.pid,
            "comm": attached.comm,
            "sites": attached.sites,
            "modules": attached.modules,
            "attach_ms": milliseconds(attached.attach_time),
        }))
    }

    async fn detach(&self, pid: u32) -> Result<serde_json::Value, BackendError> {
        let left = self.tracer.detach(pid).await.map_err(|error| match error {
            LeaveError::NotTraced(pid) => BackendError::NoSuchProcess(pid),
            LeaveError::Busy(_) => BackendError::Conflict(error.to_string()),
            LeaveError::Stopped => BackendError::Ended,
        })?;
        Ok(serde_json::json!({
            "pid": left.pid,
            "detach_ms": left.detach_time.map(milliseconds),
            "stopped_ms": milliseconds(left.stopped),
            "remains": left.remains,
        }))
    }

    async fn reset(&self) -> Result<serde_json::Value, BackendError> {
        let since = self.tracer.reset().await.ok_or(BackendError::Ended)?;
        Ok(serde_json::json!({ "counted_since": rfc_3339(since) }))
    }
}
