//! Which processes are traced where all could be, by rules that can be changed while running.
//!
//! A process is traced if no exclude rule holds for it, and either an include rule does or
//! there is none. Of the include rules the first that holds says how it is probed.

mod pattern;
mod rule;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::rule::{Rule, RuleError};
use crate::probe::mode::ModeChoice;

/// A process, as rules look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject<'a> {
    /// Process id, in memprof's own pid namespace.
    pub pid: u32,
    /// Name of its main thread.
    pub comm: &'a str,
    /// Path of its program, as the kernel shows it.
    pub exe: &'a str,
    /// Effective user id.
    pub uid: u32,
    /// Path of its cgroup.
    pub cgroup: &'a str,
}

/// What the rules say of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is left alone.
    Exclude,
    /// It is traced.
    Include {
        /// How, if the rule says so.
        probe: Option<ModeChoice>,
    },
}

/// Rules. Without any, every process is traced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<Side, Vec<Rule>>")]
pub struct Filters {
    include: Vec<Rule>,
    exclude: Vec<Rule>,
}

/// The fields of [`Filters`]. A map of them, unlike a struct, is not read from a list.
#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Include,
    Exclude,
}

impl TryFrom<BTreeMap<Side, Vec<Rule>>> for Filters {
    type Error = RuleError;

    fn try_from(mut body: BTreeMap<Side, Vec<Rule>>) -> Result<Self, RuleError> {
        let mut rules = |side| body.remove(&side).unwrap_or_default();
        Self::new(rules(Side::Include), rules(Side::Exclude))
    }
}

impl Filters {
    /// Rules in the order in which they are asked.
    ///
    /// # Errors
    ///
    /// [`RuleError::ExcludedProbe`] if an exclude rule says how to probe;
    /// [`RuleError::WideProbe`] if an include rule asks for the prefilter, and not all of them
    /// name some processes.
    pub fn new(include: Vec<Rule>, exclude: Vec<Rule>) -> Result<Self, RuleError> {
        if exclude.iter().any(|rule| rule.probe().is_some()) {
            return Err(RuleError::ExcludedProbe);
        }
        let filters = Self { include, exclude };
        if filters.may_write() && !filters.names_few() {
            return Err(RuleError::WideProbe);
        }
        Ok(filters)
    }

    /// Include rules.
    #[must_use]
    pub fn include(&self) -> &[Rule] {
        &self.include
    }

    /// Exclude rules.
    #[must_use]
    pub fn exclude(&self) -> &[Rule] {
        &self.exclude
    }

    /// Whether there are no rules at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// What the rules say of a process.
    #[must_use]
    pub fn verdict(&self, subject: &Subject<'_>) -> Verdict {
        if self.exclude.iter().any(|rule| rule.holds_for(subject)) {
            return Verdict::Exclude;
        }
        if self.include.is_empty() {
            return Verdict::Include { probe: None };
        }
        match self.include.iter().find(|rule| rule.holds_for(subject)) {
            Some(rule) => Verdict::Include {
                probe: rule.probe(),
            },
            None => Verdict::Exclude,
        }
    }

    /// Whether a process can get the prefilter.
    #[must_use]
    pub fn may_write(&self) -> bool {
        let probes = self.include.iter().filter_map(Rule::probe);
        probes.into_iter().any(ModeChoice::may_write)
    }

    /// Whether they name those that are traced, rather than those that are not: then few are,
    /// and all others should not pay for them.
    #[must_use]
    pub fn names_few(&self) -> bool {
        !self.include.is_empty() && self.include.iter().all(Rule::names_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(include: &[&str], exclude: &[&str]) -> Filters {
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Filters::new(rules(include), rules(exclude)).unwrap()
    }

    fn subject() -> Subject<'static> {
        Subject {
            pid: 4242,
            comm: "redis-server",
            exe: "/usr/bin/redis-server",
            uid: 107,
            cgroup: "/system.slice/redis-server.service",
        }
    }

    const INCLUDED: Verdict = Verdict::Include { probe: None };

    /// Check that without rules all are traced, that include rules leave only what they name,
    /// and that an exclude rule is stronger.
    #[test]
    fn verdicts() {
        for (include, exclude, verdict) in [
            (&[][..], &[][..], INCLUDED),
            (&["comm=redis*"], &[], INCLUDED),
            (&["comm=nginx"], &[], Verdict::Exclude),
            (&["comm=nginx", "uid=107"], &[], INCLUDED),
            (&["comm=nginx,uid=107"], &[], Verdict::Exclude),
            (&[], &["pid=4242"], Verdict::Exclude),
            (&[], &["pid=4243"], INCLUDED),
            (&["comm=redis*"], &["exe=/usr/bin/*"], Verdict::Exclude),
        ] {
            let verdict_now = filters(include, exclude).verdict(&subject());
            assert_eq!(verdict_now, verdict, "{include:?} {exclude:?}");
        }
    }

    /// Check that the first include rule that holds says how to probe, also if it says nothing.
    #[test]
    fn first_rule_says_how() {
        let how = |include: &[&str]| filters(include, &[]).verdict(&subject());
        let prefilter = Verdict::Include {
            probe: Some(ModeChoice::Prefilter),
        };
        assert_eq!(how(&["comm=redis*,probe=prefilter", "comm=r*"]), prefilter);
        assert_eq!(how(&["comm=r*", "comm=redis*,probe=prefilter"]), INCLUDED);
        assert_eq!(how(&["comm=a", "uid=107,probe=prefilter"]), prefilter);
    }

    /// Check that few are named only if each include rule names some.
    #[test]
    fn few() {
        for (include, exclude, few) in [
            (&[][..], &[][..], false),
            (&[], &["comm=redis*"], false),
            (&["comm=redis*"], &[], true),
            (&["pid=1", "uid=0", "cgroup=/a", "exe=/b"], &[], true),
            (&["comm=redis*,probe=prefilter"], &["uid=0"], true),
            (&["comm=redis*", "probe=uprobe"], &[], false),
            (&["comm=redis*", "comm=*"], &[], false),
            (&["exe=/**"], &[], false),
            (&["cgroup=/"], &[], false),
            (&["comm=*,uid=3"], &[], true),
        ] {
            assert_eq!(filters(include, exclude).names_few(), few, "{include:?}");
        }
    }

    /// Check that rules are written as they are read, and that what makes no sense is refused:
    /// other fields, other types, rules that are none, and how to probe what is not traced.
    #[test]
    fn in_json() {
        let text =
            r#"{"include":["comm=redis*,probe=prefilter","uid=107"],"exclude":["exe=/bin/{a,b}"]}"#;
        let read: Filters = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        let some: Filters = serde_json::from_str(r#"{"exclude":["pid=1"]}"#).unwrap();
        assert_eq!(some, filters(&[], &["pid=1"]));
        let none: Filters = serde_json::from_str("{}").unwrap();
        assert!(none.is_empty() && none == Filters::default());
        for text in [
            "[]",
            r#"{"includes":[]}"#,
            r#"{"include":"comm=a"}"#,
            r#"{"include":[1]}"#,
            r#"{"include":["name=a"]}"#,
            r#"{"exclude":["comm=a,probe=uprobe"]}"#,
            r#"{"include":["comm=a,probe=auto","comm=*"]}"#,
            r#"{"include":["probe=prefilter"]}"#,
        ] {
            assert!(serde_json::from_str::<Filters>(text).is_err(), "{text}");
        }
    }
}
