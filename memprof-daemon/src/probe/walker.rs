//! The ways for BPF to go from frame to frame, best first.

use std::{fmt, str::FromStr};

use thiserror::Error;

use super::mode::ProbeMode;

/// How BPF walks a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walker {
    /// By unwind tables, in a loop of the kernel's: `bpf_loop` (Linux 5.17).
    Loop,
    /// By unwind tables, a few frames a program, and each program calls the next.
    TailCalls,
    /// Not at all: the kernel does, by frame pointers.
    FramePointers,
}

impl Walker {
    /// Every way, best first.
    pub const ALL: [Self; 3] = [Self::Loop, Self::TailCalls, Self::FramePointers];

    /// As a user types it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loop => "loop",
            Self::TailCalls => "tail-calls",
            Self::FramePointers => "frame-pointers",
        }
    }

    /// The best that the running kernel should have.
    #[must_use]
    pub fn best() -> Self {
        if has_loop() {
            Self::Loop
        } else {
            Self::TailCalls
        }
    }

    /// Checks that this way is there with probes attached like this.
    ///
    /// # Errors
    ///
    /// [`UnsupportedWalker`].
    pub(super) fn try_out(self, mode: ProbeMode) -> Result<Self, UnsupportedWalker> {
        match self {
            Self::Loop if !has_loop() => Err(UnsupportedWalker::NoLoop),
            // A kernel with sessions has the loop.
            Self::TailCalls if mode == ProbeMode::Session => Err(UnsupportedWalker::InSession),
            _ => Ok(self),
        }
    }
}

/// Whether the kernel has `bpf_loop` (Linux 5.17).
fn has_loop() -> bool {
    aya::sys::is_helper_supported(
        aya::programs::ProgramType::KProbe,
        aya_obj::generated::bpf_func_id::BPF_FUNC_loop,
    )
    .unwrap_or(false)
}

/// A way to walk that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UnsupportedWalker {
    /// An old kernel.
    #[error("this kernel cannot walk stacks by `loop`, which needs Linux 5.17: no bpf_loop")]
    NoLoop,
    /// There is no program for it.
    #[error("stacks are walked by `tail-calls` in the probe modes multi and perf only")]
    InSession,
}

impl fmt::Display for Walker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Walker {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|walker| walker.name() == name)
            .ok_or_else(|| "it is one of loop, tail-calls, frame-pointers".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a way is read back from its name, and others are refused.
    #[test]
    fn names() {
        for walker in Walker::ALL {
            assert_eq!(walker.to_string().parse(), Ok(walker));
        }
        assert!("fp".parse::<Walker>().is_err());
    }

    /// Check that tail calls are there wherever the loop may be missing.
    #[test]
    fn where_they_are() {
        for mode in ProbeMode::ALL {
            let tail_calls = Walker::TailCalls.try_out(mode);
            assert_eq!(tail_calls.is_ok(), mode != ProbeMode::Session);
        }
        let best = Walker::best();
        assert_eq!(best.try_out(ProbeMode::Perf), Ok(best));
    }
}
