//! Profiles in the formats that others read: one file a format, each a function
//! from a [`Profile`] to a writer.

pub mod folded;
mod go;
pub mod http;
pub mod json;
mod line;
pub(crate) mod losses;
pub mod metrics;
mod numbers;
pub mod pprof;
pub mod profile;
#[cfg(test)]
mod testing;
pub mod text;
pub mod totals;
pub mod units;

use std::{
    fmt,
    io::{self, Write},
    str::FromStr,
};

pub(crate) use numbers::Numbers;
pub use numbers::ValueType;
use profile::Profile;

/// How a profile is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Format {
    /// Schema `memprof.profile/1`.
    Json,
    /// profile.proto, gzip'ed: for `go tool pprof` and profile stores.
    Pprof,
    /// One line a stack with its in-use bytes: for flame graphs.
    Folded,
    /// For people, at a terminal.
    Text,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::Json, Self::Pprof, Self::Folded, Self::Text];

    /// As a user types it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Pprof => "pprof",
            Self::Folded => "folded",
            Self::Text => "text",
        }
    }

    /// What HTTP calls it. pprof has no type of its own; Go's handlers say this
    /// too, and no encoding, since the gzip is part of the format.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Pprof => "application/octet-stream",
            Self::Folded | Self::Text => "text/plain; charset=utf-8",
        }
    }

    /// What a file's name ends in, without the dot.
    #[must_use]
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Pprof => "pb.gz",
            Self::Folded => "folded",
            Self::Text => "txt",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// No format has that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown format {0:?}: it is one of json, pprof, folded, text")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// Writes a profile, with each format's defaults.
///
/// # Errors
///
/// Those of the writer.
pub fn write(format: Format, profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    match format {
        Format::Json => json::write(profile, out),
        Format::Pprof => pprof::write(profile, pprof::Options::default(), out),
        Format::Folded => folded::write(profile, ValueType::InuseSpace, out),
        Format::Text => text::write(profile, &text::Options::default(), out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a format is read back from its name, and that others are
    /// refused with the names there are.
    #[test]
    fn names() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        let error = "svg".parse::<Format>().unwrap_err().to_string();
        for format in Format::ALL {
            assert!(error.contains(format.name()), "{error}");
        }
    }

    /// Check that each format writes something for a profile with everything
    /// in it, and for an empty one, and passes a full disk on.
    #[test]
    fn writes_every_format() {
        for format in Format::ALL {
            for profile in [testing::profile(), testing::empty_profile()] {
                write(format, &profile, &mut Vec::new()).unwrap();
            }
            let mut full = &mut [0_u8; 16][..];
            let result = write(format, &testing::profile(), &mut full);
            assert!(result.is_err(), "{format}");
        }
    }
}
