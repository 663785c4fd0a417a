//! What of a running tracer can be changed, and how it is written.

use memprof_common::limits::MAX_SAMPLE_INTERVAL_BYTES;
use serde::{Deserialize, Serialize};

/// The settings that can be changed while processes are traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Mean sampling gap; 1 takes every allocation, 0 none.
    pub sample_interval_bytes: u64,
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
}

impl Config {
    /// Reads `{"sample_interval_bytes": 65536}` or `{"sample_interval": "64KiB"}`.
    ///
    /// # Errors
    ///
    /// What is wrong with it, in words.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let body: ConfigBody = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let sample_interval_bytes = match (body.sample_interval, body.sample_interval_bytes) {
            (Some(text), None) => parse_interval(&text)?,
            (None, Some(bytes)) => check_interval(bytes)?,
            _ => {
                return Err("one of sample_interval, such as \"64KiB\", and \
                            sample_interval_bytes is needed"
                    .to_owned());
            }
        };
        Ok(Self {
            sample_interval_bytes,
        })
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
            let config = Config::parse(body.as_bytes()).unwrap();
            assert_eq!(config.sample_interval_bytes, bytes, "{body}");
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
        ] {
            assert!(Config::parse(body.as_bytes()).is_err(), "{body}");
        }
    }
}
