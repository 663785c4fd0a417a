//! What is said of a Go program's own profile.

use std::time::Duration;

use serde::Serialize;

use super::{profile::GoFacts, text::duration, units};

/// A reading older than this is no present one.
const FRESH: Duration = Duration::from_secs(2);

/// As JSON has it.
#[derive(Serialize)]
pub(super) struct GoObject<'a> {
    version: &'a str,
    mem_profile_rate: Option<u64>,
    rate_changed: bool,
    sample_interval_bytes: u64,
    age_s: Option<f64>,
    collected: bool,
    settled: bool,
    since_start: bool,
    failure: Option<&'a str>,
}

impl<'a> From<&'a GoFacts> for GoObject<'a> {
    fn from(facts: &'a GoFacts) -> Self {
        Self {
            version: &facts.version,
            mem_profile_rate: facts.rate_bytes,
            rate_changed: facts.rate_changed,
            sample_interval_bytes: facts.interval_bytes,
            age_s: facts.age.map(|age| (age.as_secs_f64() * 1e3).round() / 1e3),
            collected: facts.has_collected,
            settled: facts.is_settled,
            since_start: facts.is_since_start,
            failure: facts.failure.as_deref(),
        }
    }
}

impl GoFacts {
    /// One line for people: which profile this is.
    pub(super) fn line(&self, exited: bool) -> String {
        let Some(age) = self.age else {
            return format!("{}; it has not begun to run", self.version);
        };
        let state = if self.has_collected {
            "as of its last garbage collection"
        } else {
            "before its first garbage collection: nothing is known to be freed"
        };
        let mut line = format!("{}, {state}", self.version);
        if exited {
            line += &format!("; read {} before its end", duration(age));
        } else if age > FRESH {
            line += &format!("; read {} ago", duration(age));
        }
        line
    }

    /// What readers of the numbers have to know, a line each.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.rate_bytes == Some(0) {
            notes.push(match self.interval_bytes {
                0 | 1 => {
                    "the program has turned its profiling off (MemProfileRate is 0)".to_owned()
                }
                interval => format!(
                    "the program has turned its profiling off (MemProfileRate is 0); before, it \
                     was {}",
                    units::bytes(interval)
                ),
            });
        } else if self.rate_changed {
            notes.push(
                "the program has changed MemProfileRate: what it sampled before is estimated as \
                 if it had not"
                    .to_owned(),
            );
        }
        if !self.is_settled {
            notes.push(
                "counts changed while they were read: some may be one cycle apart".to_owned(),
            );
        }
        if let Some(failure) = &self.failure {
            notes.push(format!("the last try to read it failed: {failure}"));
        }
        notes
    }
}
