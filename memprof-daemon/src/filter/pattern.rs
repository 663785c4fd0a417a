//! A glob, and the text it was made of.

use globset::{GlobBuilder, GlobMatcher};

/// What `*` and `?` stop at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing: a name.
    Name,
    /// Slashes: a path. `**` crosses them.
    Path,
}

/// A glob. Two are equal if they are written alike.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    text: String,
    matcher: GlobMatcher,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl Pattern {
    /// # Errors
    ///
    /// What is wrong with the glob.
    pub(super) fn new(text: &str, kind: Kind) -> Result<Self, globset::Error> {
        let glob = GlobBuilder::new(text)
            .literal_separator(kind == Kind::Path)
            .backslash_escape(true)
            .build()?;
        Ok(Self {
            text: text.to_owned(),
            matcher: glob.compile_matcher(),
        })
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        self.matcher.is_match(text)
    }

    /// Whether it matches a path or one above it: what is in a directory matches with it.
    pub(super) fn matches_or_above(&self, path: &str) -> bool {
        if self.matches(path) || self.matches("/") {
            return true;
        }
        path.match_indices('/')
            .filter_map(|(place, _)| path.get(..place))
            .any(|above| !above.is_empty() && self.matches(above))
    }

    /// Whether nothing in it stands for something else.
    pub(super) fn is_literal(&self) -> bool {
        !self.text.contains(['*', '?', '[', '{', '\\'])
    }

    /// Whether it matches all there is.
    pub(super) fn is_everything(&self) -> bool {
        matches!(self.text.as_str(), "*" | "**" | "/**" | "/")
    }
}
