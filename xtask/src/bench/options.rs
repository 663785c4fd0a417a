//! What `cargo xtask bench` is asked to do.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

pub(super) const USAGE: &str = "\
usage: cargo xtask bench [OPTION...]

  --quick           three minutes instead of twenty, and rougher numbers
  --only NAME,...   these sections only: pair, programs, trace, dump,
                    attach, unwind, tables, many, excluded
  --json FILE       the results [default: target/bench/benchmarks.json]
  --memprof PATH    this memprof, not the one built from here
  --floor PATH      this `floor`, not the one built from here
  --render FILE     measure nothing: write docs/benchmarks.md from results";

/// A part of the measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    /// What a malloc and a free cost under each tool.
    Pair,
    /// What real programs cost.
    Programs,
    /// Every allocation of a busy program.
    Trace,
    /// Attach, dump and detach with a million live blocks.
    Dump,
    /// How long a process of many threads stands still.
    Attach,
    /// A sample whose stack is walked by tables, and by the kernel.
    Unwind,
    /// Unwind tables of large files.
    Tables,
    /// Many processes under one daemon.
    Many,
    /// A process that a daemon for all does not trace.
    Excluded,
}

impl Section {
    /// In the order they are measured.
    pub(super) const ALL: [Self; 9] = [
        Self::Pair,
        Self::Programs,
        Self::Trace,
        Self::Dump,
        Self::Attach,
        Self::Unwind,
        Self::Tables,
        Self::Many,
        Self::Excluded,
    ];

    /// Its name on the command line.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Programs => "programs",
            Self::Trace => "trace",
            Self::Dump => "dump",
            Self::Attach => "attach",
            Self::Unwind => "unwind",
            Self::Tables => "tables",
            Self::Many => "many",
            Self::Excluded => "excluded",
        }
    }
}

/// The command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// Fewer and shorter rounds.
    pub(super) quick: bool,
    /// Only usage was asked for.
    pub(super) help: bool,
    /// Sections to measure.
    pub(super) sections: Vec<Section>,
    /// File for the results.
    pub(super) json: Option<PathBuf>,
    /// A memprof other than the built one.
    pub(super) memprof: Option<PathBuf>,
    /// A `floor` other than the built one.
    pub(super) floor: Option<PathBuf>,
    /// Results to render instead of measuring.
    pub(super) render: Option<PathBuf>,
}

impl Options {
    /// Reads the words after `bench`.
    ///
    /// # Errors
    ///
    /// A word that is not an option, or a missing value.
    pub(super) fn parse(words: &[String]) -> Result<Self> {
        let mut options = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || {
                let value = words.next();
                value.with_context(|| format!("{word} needs a value\n{USAGE}"))
            };
            match word.as_str() {
                "--quick" => options.quick = true,
                "--help" | "-h" => options.help = true,
                "--json" => options.json = Some(value()?.into()),
                "--memprof" => options.memprof = Some(value()?.into()),
                "--floor" => options.floor = Some(value()?.into()),
                "--render" => options.render = Some(value()?.into()),
                "--only" => options.sections = sections(value()?)?,
                _ => bail!("`{word}` is not an option\n{USAGE}"),
            }
        }
        if options.sections.is_empty() {
            options.sections = Section::ALL.to_vec();
        }
        Ok(options)
    }
}

fn sections(names: &str) -> Result<Vec<Section>> {
    let section = |name: &str| {
        let found = Section::ALL.into_iter().find(|one| one.name() == name);
        found.with_context(|| format!("`{name}` is not a section\n{USAGE}"))
    };
    names.split(',').map(section).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options> {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        Options::parse(&words)
    }

    /// Check that everything is measured unless told otherwise.
    #[test]
    fn defaults() {
        let options = parse(&[]).expect("no words");
        assert_eq!(options.sections, Section::ALL);
        assert!(!options.quick);
    }

    /// Check that options and their values are read.
    #[test]
    fn values() {
        let options = parse(&["--quick", "--only", "dump,pair", "--json", "x"]).expect("options");
        assert!(options.quick);
        assert_eq!(options.sections, [Section::Dump, Section::Pair]);
        assert_eq!(options.json, Some("x".into()));
    }

    /// Check that a misspelt word is refused, not ignored.
    #[test]
    fn refused() {
        assert!(parse(&["--fast"]).is_err());
        assert!(parse(&["--json"]).is_err());
        assert!(parse(&["--only", "pairs"]).is_err());
    }
}
