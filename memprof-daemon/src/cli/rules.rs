//! Options that choose among all processes.

use clap::Args;

use crate::filter::{Filters, Rule, RuleError};

/// Rules: which of all processes are traced, and how.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct RuleArgs {
    /// Trace only processes that this fits, or another one given so: conditions that must
    /// hold together, of pid, comm, exe, uid and cgroup, with globs; and probe=auto or
    /// probe=prefilter if memprof may write to them. Such as comm=redis*,probe=auto
    #[arg(long, value_name = "RULE")]
    include: Vec<Rule>,

    /// Leave processes alone that this fits, whatever includes them
    #[arg(long, value_name = "RULE")]
    exclude: Vec<Rule>,
}

impl RuleArgs {
    /// # Errors
    ///
    /// They make no sense together.
    pub(super) fn filters(&self) -> Result<Filters, RuleError> {
        Filters::new(self.include.clone(), self.exclude.clone())
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }
}
