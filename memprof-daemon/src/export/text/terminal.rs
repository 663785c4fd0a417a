//! What a terminal makes of text.

use std::borrow::Cow;

/// Sequences that switch a terminal's colours, or nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) bold: &'static str,
    pub(super) dim: &'static str,
    pub(super) warn: &'static str,
    pub(super) plain: &'static str,
}

impl Style {
    pub(super) const fn new(color: bool) -> Self {
        if color {
            Self {
                bold: "\x1b[1m",
                dim: "\x1b[2m",
                warn: "\x1b[1;33m",
                plain: "\x1b[0m",
            }
        } else {
            Self {
                bold: "",
                dim: "",
                warn: "",
                plain: "",
            }
        }
    }
}

/// A name without control characters. Names come from processes and files, who
/// must not be able to steer the terminal of the one who looks at them.
pub(super) fn printable(name: &str) -> Cow<'_, str> {
    if name.chars().any(char::is_control) {
        let replace = |char: char| if char.is_control() { '?' } else { char };
        Cow::Owned(name.chars().map(replace).collect())
    } else {
        Cow::Borrowed(name)
    }
}
