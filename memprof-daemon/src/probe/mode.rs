//! The ways to attach the probes, best first.

use std::{fmt, str::FromStr};

use thiserror::Error;

use super::{object::AttachType, uprobe_multi};

/// How the probes of a target are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeMode {
    /// `uprobe.session` (Linux 6.13): the program at entry decides whether the
    /// return is probed, so an unsampled call costs one trap.
    Session,
    /// `uprobe_multi` (Linux 6.6): one link a file for all entries, one for all
    /// returns. Every call that hands out a block costs two traps.
    Multi,
    /// One perf event a probe (Linux 5.15). Traps as with `Multi`; attaching and
    /// detaching take longer.
    Perf,
}

impl ProbeMode {
    /// Every mode, best first.
    pub const ALL: [Self; 3] = [Self::Session, Self::Multi, Self::Perf];

    /// As a user types it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Multi => "multi",
            Self::Perf => "perf",
        }
    }

    /// Whether the running kernel has it, found out by trying.
    ///
    /// # Errors
    ///
    /// Why it has not.
    pub fn try_out(self) -> Result<(), Unsupported> {
        match self {
            Self::Session => uprobe_multi::try_out(AttachType::Session)
                .map_err(|reason| Unsupported::new(self, "6.13", reason)),
            Self::Multi => uprobe_multi::try_out(AttachType::Multi)
                .map_err(|reason| Unsupported::new(self, "6.6", reason)),
            Self::Perf => Ok(()),
        }
    }

    /// The best mode that the running kernel has.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL
            .into_iter()
            .find(|mode| match mode.try_out() {
                Ok(()) => true,
                Err(error) => {
                    tracing::debug!(%error, "a way to attach is not there");
                    false
                }
            })
            .unwrap_or(Self::Perf)
    }
}

impl fmt::Display for ProbeMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A way to attach that the running kernel does not have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("this kernel cannot attach probes by `{mode}`, which needs Linux {since}: {reason}")]
pub struct Unsupported {
    mode: ProbeMode,
    since: &'static str,
    reason: String,
}

impl Unsupported {
    const fn new(mode: ProbeMode, since: &'static str, reason: String) -> Self {
        Self {
            mode,
            since,
            reason,
        }
    }
}

/// What the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModeChoice {
    /// The prefilter where a target allows it, else uprobes in the best mode.
    #[default]
    Auto,
    /// The prefilter or nothing.
    Prefilter,
    /// Uprobes in the best mode: nothing is ever written to a target.
    Uprobe,
    /// Uprobes in this mode or none.
    Only(ProbeMode),
}

impl ModeChoice {
    /// The mode to use uprobes in on the running kernel.
    ///
    /// # Errors
    ///
    /// If the one that is wanted is not there.
    pub fn resolve(self) -> Result<ProbeMode, Unsupported> {
        match self {
            Self::Auto | Self::Prefilter | Self::Uprobe => Ok(ProbeMode::best()),
            Self::Only(mode) => mode.try_out().map(|()| mode),
        }
    }

    /// Whether code may be written to targets.
    #[must_use]
    pub const fn may_write(self) -> bool {
        matches!(self, Self::Auto | Self::Prefilter)
    }

    /// Whether uprobes on the allocators of targets will do.
    #[must_use]
    pub const fn may_probe(self) -> bool {
        !matches!(self, Self::Prefilter)
    }
}

impl fmt::Display for ModeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Prefilter => f.pad("prefilter"),
            Self::Uprobe => f.pad("uprobe"),
            Self::Only(mode) => mode.fmt(f),
        }
    }
}

impl FromStr for ModeChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Self::Auto, Self::Prefilter, Self::Uprobe]
            .into_iter()
            .chain(ProbeMode::ALL.map(Self::Only))
            .find(|choice| choice.to_string() == name)
            .ok_or_else(|| "it is one of auto, prefilter, uprobe, session, multi, perf".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a choice is read back from its name, and others are refused.
    #[test]
    fn names() {
        for choice in ProbeMode::ALL.map(ModeChoice::Only).into_iter().chain([
            ModeChoice::Auto,
            ModeChoice::Prefilter,
            ModeChoice::Uprobe,
        ]) {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("kprobe".parse::<ModeChoice>().is_err());
    }

    /// Check that the best mode is one that is there, and that perf always is.
    #[test]
    fn best_is_there() {
        assert_eq!(ProbeMode::best().try_out(), Ok(()));
        assert_eq!(
            ModeChoice::Only(ProbeMode::Perf).resolve(),
            Ok(ProbeMode::Perf)
        );
        assert_eq!(ModeChoice::Auto.resolve(), Ok(ProbeMode::best()));
    }
}
