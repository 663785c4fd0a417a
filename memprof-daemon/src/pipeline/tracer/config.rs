//! Changing the settings of a running tracer.

use aya::maps::MapError;
use thiserror::Error;
use tracing::{info, warn};

use super::Tracer;
use crate::config::{Config, ConfigChange};

/// Why settings were not changed.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// They make no sense for this tracer.
    #[error("{0}")]
    Refused(&'static str),
    /// A BPF map could not be written.
    #[error("cannot tell the BPF programs: {0}")]
    Map(#[from] MapError),
}

impl Tracer {
    /// The settings in force.
    pub(super) fn config(&self) -> Config {
        Config {
            sample_interval_bytes: self.options.sample_interval_bytes,
            paused: self.is_paused,
            filters: self.options.filters.clone(),
        }
    }

    /// Puts new settings in force, for the present targets and those to come:
    /// for all or for none.
    ///
    /// BPF reads a target's interval once a call, decides by it and sends it along
    /// with the sample. So nothing that was sampled before changes its weight.
    pub(super) fn set_config(&mut self, change: ConfigChange) -> Result<Config, ConfigError> {
        let before = self.config();
        let config = before.changed(change);
        if config.filters != before.filters {
            self.check_filters(&config.filters)?;
        }
        if let Err(error) = self.write_interval(config.interval_in_force()) {
            if let Err(error) = self.write_interval(before.interval_in_force()) {
                warn!(%error, "cannot take the change of the settings back");
            }
            return Err(error.into());
        }
        self.options.sample_interval_bytes = config.sample_interval_bytes;
        self.is_paused = config.paused;
        self.set_prefilter_intervals(config.interval_in_force());
        self.coarsest_interval_bytes = self
            .coarsest_interval_bytes
            .max(config.sample_interval_bytes);
        self.set_filters(&config.filters);
        info!(?before, now = ?config, "the settings have changed");
        Ok(config)
    }

    /// Rewrites the interval of each target and of each slot that may become one's, and nothing else of what BPF was
    /// told of it. A target that it has not been told of yet gets the interval
    /// that is in force then.
    fn write_interval(&mut self, sample_interval_bytes: u64) -> Result<(), MapError> {
        for (&pid, target) in self.targets.iter().filter(|(_, target)| target.is_live()) {
            let slot = u32::from(target.slot);
            let mut entry = self.target_map.get(&slot, 0)?;
            if entry.pid == pid {
                entry.sample_interval_bytes = sample_interval_bytes;
                self.target_map.set(slot, entry, 0)?;
            }
        }
        for slot in self.slots.stock() {
            let slot = u32::from(slot);
            let mut entry = self.target_map.get(&slot, 0)?;
            entry.sample_interval_bytes = sample_interval_bytes;
            self.target_map.set(slot, entry, 0)?;
        }
        Ok(())
    }
}
