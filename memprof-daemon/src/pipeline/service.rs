//! Answers to the HTTP API.

use super::{
    capture::Capture,
    tracer::{ConfigError, TracerHandle},
};
use crate::{
    config::{Config, ConfigChange},
    export::{
        http::{Backend, BackendError},
        profile::Profile,
    },
    symbolize::worker::SymbolizeHandle,
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
        let capture: Capture = self.tracer.capture(pid).await.ok_or(BackendError::Ended)?;
        capture
            .symbolize(&self.symbolizer)
            .await
            .map_err(|error| BackendError::Failed(error.to_string()))
    }
}

impl Backend for Service {
    async fn profile(&self, pid: Option<u32>) -> Result<Profile, BackendError> {
        let profile = self.profile_of(pid).await?;
        match pid {
            Some(pid) if profile.processes.is_empty() => Err(BackendError::NoSuchProcess(pid)),
            _ => Ok(profile),
        }
    }

    async fn stats(&self) -> Result<serde_json::Value, BackendError> {
        let stats = self.tracer.stats().await.ok_or(BackendError::Ended)?;
        let failed = |error: serde_json::Error| BackendError::Failed(error.to_string());
        let mut stats = serde_json::to_value(stats).map_err(failed)?;
        if let Some(debuginfod) = self.symbolizer.debuginfod()
            && let Some(stats) = stats.as_object_mut()
        {
            let counts = serde_json::to_value(debuginfod.counts()).map_err(failed)?;
            stats.insert("debuginfod".to_owned(), counts);
        }
        Ok(stats)
    }

    async fn config(&self) -> Result<Config, BackendError> {
        self.tracer.config().await.ok_or(BackendError::Ended)
    }

    async fn set_config(&self, change: ConfigChange) -> Result<Config, BackendError> {
        let answer = self.tracer.set_config(change).await;
        answer
            .ok_or(BackendError::Ended)?
            .map_err(|error| match error {
                ConfigError::Refused(_) => BackendError::Refused(error.to_string()),
                ConfigError::Map(_) => BackendError::Failed(error.to_string()),
            })
    }

    async fn processes(&self) -> Result<serde_json::Value, BackendError> {
        let processes = self.tracer.processes().await.ok_or(BackendError::Ended)?;
        serde_json::to_value(processes).map_err(|error| BackendError::Failed(error.to_string()))
    }
}
