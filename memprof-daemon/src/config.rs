//! What of a running tracer can be changed, and how it is written.

use memprof_common::limits::MAX_SAMPLE_INTERVAL_BYTES;
use serde::{Deserialize, Serialize};

use crate::filter::Filters;

/// The settings that can be changed while processes are traced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Mean sampling gap; 1 takes every allocation, 0 none.
    pub sample_interval_bytes: u64,
    /// Nothing is sampled until this is taken back, whatever the interval. Calls are
    /// counted all the same.
    #[serde(default)]
    pub paused: bool,
    /// Which processes are traced, where all could be.
    #[serde(default)]
    pub filters: Filters,
}

/// A change of some of them; what is none stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ConfigChange {
    /// See [`Config::sample_interval_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample_interval_bytes: Option<u64>,
    /// See [`Config::paused`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
    /// See [`Config::filters`]; replaces all rules.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filters: Option<Filters>,
}

/// The body of `PUT /v1/config`. A misspelt field must not be ignored: nothing
/// would change, and nobody would know.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigBody {
    #[serde(default)]
    sample_interval: Option<String>,
    #[serde(default)]
    sample_interval_bytes: Option<u64>,
    #[serde(default)]
    paused: Option<bool>,
    #[serde(default)]
    filters: Option<Filters>,
}

impl Config {
    /// The interval that is in force.
    #[must_use]
    pub const fn interval_in_force(&self) -> u64 {
        if self.paused {
            0
        } else {
            self.sample_interval_bytes
        }
    }

    /// The settings after a change.
    #[must_use]
    pub fn changed(&self, change: ConfigChange) -> Self {
        Self {
            sample_interval_bytes: change
                .sample_interval_bytes
                .unwrap_or(self.sample_interval_bytes),
            paused: change.paused.unwrap_or(self.paused),
            filters: change.filters.unwrap_or_else(|| self.filters.clone()),
        }
    }
}

impl ConfigChange {
    /// Reads `{"sample_interval_bytes": 65536}` or `{"sample_interval": "64KiB"}`,
    /// `{"paused": true}`, `{"filters": {"include": ["comm=redis*"], "exclude": []}}`, each
    /// alone or with others.
    ///
    /// # Errors
    ///
    /// What is wrong with it, in words.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let body: ConfigBody = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let sample_interval_bytes = match (body.sample_interval, body.sample_interval_bytes) {
            (Some(text), None) => Some(parse_interval(&text)?),
            (None, Some(bytes)) => Some(check_interval(bytes)?),
            (None, None) => None,
            (Some(_), Some(_)) => {
                return Err("one of sample_interval, such as \"64KiB\", and \
                            sample_interval_bytes will do"
                    .to_owned());
            }
        };
        let change = Self {
            sample_interval_bytes,
            paused: body.paused,
            filters: body.filters,
        };
        if change == Self::default() {
            return Err("nothing is to be changed: sample_interval, \
                        sample_interval_bytes, paused or filters is needed"
                .to_owned());
        }
        Ok(change)
    }
}

/// Reads a sampling interval: a number of bytes, at most 4 GiB.
///
/// # Errors
///
/// What is wrong with it, in words.
pub fn parse_interval(text: &str) -> Result<u64, String> {
    parse_bytes(text).and_then(check_interval)
}

fn check_interval(bytes: u64) -> Result<u64, String> {
    if bytes > MAX_SAMPLE_INTERVAL_BYTES {
        return Err(format!("at most {MAX_SAMPLE_INTERVAL_BYTES} bytes"));
    }
    Ok(bytes)
}

/// A whole number and a unit: none or `B`; `K`, `KiB`, `M`, `MiB`, `G`, `GiB` in
/// powers of 1024; `kB`, `MB`, `GB` in powers of 1000.
///
/// # Errors
///
/// What is wrong with it, in words.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| "a number of bytes is needed, such as 1, 4096, 64KiB or 512KiB".to_owned())?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        unit => return Err(format!("`{unit}` is no unit; use B, KiB, MiB or GiB")),
    };
    number
        .checked_mul(factor)
        .ok_or_else(|| "too many bytes".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that both ways to write an interval are read, and that what makes no
    /// sense is refused: nothing, both, other fields, other types, too much.
    #[test]
    fn bodies() {
        for (body, bytes) in [
            (r#"{"sample_interval": "64KiB"}"#, 65_536),
            (r#"{"sample_interval": "1"}"#, 1),
            (r#"{"sample_interval_bytes": 0}"#, 0),
            (r#"{"sample_interval_bytes": 4294967295}"#, 4_294_967_295),
        ] {
            let change = ConfigChange::parse(body.as_bytes()).unwrap();
            assert_eq!(change.sample_interval_bytes, Some(bytes), "{body}");
            assert_eq!((change.paused, change.filters), (None, None));
        }
        for body in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"sample_interval": 1}"#,
            r#"{"sample_interval": "5GiB"}"#,
            r#"{"sample_interval": "often"}"#,
            r#"{"sample_interval_bytes": "1"}"#,
            r#"{"sample_interval_bytes": -1}"#,
            r#"{"sample_interval_bytes": 1.5}"#,
            r#"{"sample_interval_bytes": 4294967296}"#,
            r#"{"sample_interval": "1", "sample_interval_bytes": 1}"#,
            r#"{"sample_interval": "1", "stack_depth": 3}"#,
            r#"{"paused": null}"#,
            r#"{"paused": "yes"}"#,
            r#"{"filters": []}"#,
            r#"{"filters": {"include": ["comm"]}}"#,
            r#"{"filters": {"include": [], "only": []}}"#,
        ] {
            assert!(ConfigChange::parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    /// Check that a change changes what it names and nothing else, rules as a whole, that
    /// nothing is sampled while paused, and that settings as they are shown can be sent back.
    #[test]
    fn changes() {
        let change = |body: &str| ConfigChange::parse(body.as_bytes()).unwrap();
        let mut config = Config {
            sample_interval_bytes: 4096,
            paused: false,
            filters: Filters::default(),
        };
        for (body, shown, in_force) in [
            (
                r#"{"paused": true}"#,
                r#"{"sample_interval_bytes":4096,"paused":true,"filters":{"include":[],"exclude":[]}}"#,
                0,
            ),
            (
                r#"{"sample_interval": "1", "filters": {"include": ["comm=a"]}}"#,
                r#"{"sample_interval_bytes":1,"paused":true,"filters":{"include":["comm=a"],"exclude":[]}}"#,
                0,
            ),
            (
                r#"{"paused": false, "filters": {"exclude": ["uid=3"]}}"#,
                r#"{"sample_interval_bytes":1,"paused":false,"filters":{"include":[],"exclude":["uid=3"]}}"#,
                1,
            ),
        ] {
            config = config.changed(change(body));
            assert_eq!(serde_json::to_string(&config).unwrap(), shown, "{body}");
            assert_eq!(config.interval_in_force(), in_force, "{body}");
            assert_eq!(config.changed(change(shown)), config);
            assert_eq!(serde_json::from_str::<Config>(shown).unwrap(), config);
        }
        let partial = change(r#"{"paused": false}"#);
        assert_eq!(
            serde_json::to_string(&partial).unwrap(),
            r#"{"paused":false}"#
        );
    }
}
