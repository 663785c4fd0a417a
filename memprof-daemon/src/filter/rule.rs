//! One rule: conditions that must hold together, as one line of text.

use std::{fmt, str::FromStr};

use nix::unistd::User;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use thiserror::Error;

use super::{
    Subject,
    pattern::{Kind, Pattern},
};
use crate::{probe::mode::ModeChoice, process::maps::split_deleted};

/// Bytes of a name that the kernel keeps (`TASK_COMM_LEN` in include/linux/sched.h, without
/// the zero).
const MAX_COMM_BYTES: usize = 15;

/// Why a text is no rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RuleError {
    /// It says nothing.
    #[error("a rule is needed, such as comm=redis* or exe=/usr/bin/*,probe=prefilter")]
    Empty,
    /// A part of it is no condition.
    #[error("`{0}` is no condition: KEY=VALUE is")]
    NoCondition(String),
    /// It asks for what rules do not know.
    #[error("`{0}` is none of pid, comm, exe, uid, cgroup, probe")]
    UnknownKey(String),
    /// It asks twice for the same.
    #[error("`{0}` is there twice; give two rules instead")]
    Twice(&'static str),
    /// A number was needed.
    #[error("`{0}` is not a process id")]
    Pid(String),
    /// A number or a name was needed.
    #[error("`{0}` is neither a user id nor the name of a user")]
    Uid(String),
    /// A glob that is none.
    #[error("{0}")]
    Glob(globset::Error),
    /// A name that no process can have.
    #[error("`{0}` has more than the {MAX_COMM_BYTES} bytes that the kernel keeps of a name")]
    LongComm(String),
    /// Paths begin with a slash.
    #[error("`{0}` can match no path: those begin with a slash")]
    Relative(String),
    /// How to probe it.
    #[error("`{0}`: the probe of a rule is one of auto, prefilter, uprobe")]
    Probe(String),
    /// How to probe what is not traced.
    #[error("a rule that excludes cannot say how to probe")]
    ExcludedProbe,
    /// The prefilter beside probes of all processes.
    #[error(
        "the prefilter is for processes that are named: with probe=auto or probe=prefilter in \
         one rule, each rule that includes needs a pid, comm, exe, uid or cgroup that does \
         not fit all"
    )]
    WideProbe,
}

/// Conditions, all of which must hold. `*` and `?` of names match all; those of paths stop
/// at slashes, and `**` does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pid: Option<u32>,
    comm: Option<Pattern>,
    exe: Option<Pattern>,
    uid: Option<u32>,
    cgroup: Option<Pattern>,
    probe: Option<ModeChoice>,
}

impl Rule {
    /// How to probe those it holds for, if it says so.
    #[must_use]
    pub fn probe(&self) -> Option<ModeChoice> {
        self.probe
    }

    /// Whether all of its conditions hold for a process.
    #[must_use]
    pub fn holds_for(&self, subject: &Subject<'_>) -> bool {
        // The mark of a program that was replaced, by an upgrade of its package.
        let (exe, _) = split_deleted(subject.exe.as_bytes());
        let exe = subject.exe.get(..exe.len()).unwrap_or(subject.exe);
        let fits = |pattern: &Option<Pattern>, text: &str| {
            pattern.as_ref().is_none_or(|pattern| pattern.matches(text))
        };
        self.pid.is_none_or(|pid| pid == subject.pid)
            && self.uid.is_none_or(|uid| uid == subject.uid)
            && fits(&self.comm, subject.comm)
            && fits(&self.exe, exe)
            && self
                .cgroup
                .as_ref()
                .is_none_or(|cgroup| cgroup.matches_or_above(subject.cgroup))
    }

    /// Whether it does not hold for all.
    pub(super) fn names_some(&self) -> bool {
        let patterns = [&self.comm, &self.exe, &self.cgroup];
        self.pid.is_some()
            || self.uid.is_some()
            || patterns.into_iter().flatten().any(|p| !p.is_everything())
    }

    fn add(&mut self, condition: &str) -> Result<(), RuleError> {
        let (key, value) = condition
            .split_once('=')
            .filter(|(_, value)| !value.is_empty())
            .ok_or_else(|| RuleError::NoCondition(condition.to_owned()))?;
        match key.trim() {
            "pid" => {
                let pid = value.parse().ok().filter(|&pid| pid != 0);
                let pid = pid.ok_or_else(|| RuleError::Pid(value.to_owned()))?;
                once("pid", &mut self.pid, pid)
            }
            "uid" => once("uid", &mut self.uid, user_id(value)?),
            "comm" => {
                let comm = Pattern::new(value, Kind::Name).map_err(RuleError::Glob)?;
                if comm.is_literal() && value.len() > MAX_COMM_BYTES {
                    return Err(RuleError::LongComm(value.to_owned()));
                }
                once("comm", &mut self.comm, comm)
            }
            "exe" => once("exe", &mut self.exe, path(value)?),
            "cgroup" => once("cgroup", &mut self.cgroup, path(value)?),
            "probe" => {
                let probe = match value.parse() {
                    // The others are of all processes: programs are loaded for one of them.
                    Ok(ModeChoice::Only(_)) | Err(_) => {
                        return Err(RuleError::Probe(value.to_owned()));
                    }
                    Ok(probe) => probe,
                };
                once("probe", &mut self.probe, probe)
            }
            key => Err(RuleError::UnknownKey(key.to_owned())),
        }
    }
}

fn once<T>(key: &'static str, place: &mut Option<T>, value: T) -> Result<(), RuleError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(RuleError::Twice(key)),
    }
}

fn path(value: &str) -> Result<Pattern, RuleError> {
    let pattern = Pattern::new(value, Kind::Path).map_err(RuleError::Glob)?;
    // `*/bin/x` and `{/a,/b}` may; `redis` is a mistake for `**/redis`.
    if pattern.is_literal() && !value.starts_with('/') {
        return Err(RuleError::Relative(value.to_owned()));
    }
    Ok(pattern)
}

/// A number, or the name of a user of this host, as of now.
fn user_id(value: &str) -> Result<u32, RuleError> {
    if let Ok(uid) = value.parse() {
        return Ok(uid);
    }
    match User::from_name(value) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        _ => Err(RuleError::Uid(value.to_owned())),
    }
}

/// The parts between commas, except such as are in braces or behind a backslash: those are
/// of a glob.
fn conditions(text: &str) -> Vec<&str> {
    let (mut depth, mut is_escaped, mut start) = (0_u32, false, 0);
    let mut parts = Vec::new();
    for (place, character) in text.char_indices() {
        let is_literal = is_escaped;
        is_escaped = character == '\\' && !is_literal;
        match character {
            _ if is_literal => {}
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.extend(text.get(start..place));
                start = place + 1;
            }
            _ => {}
        }
    }
    parts.extend(text.get(start..));
    parts
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(RuleError::Empty);
        }
        let mut rule = Self::default();
        for condition in conditions(text) {
            rule.add(condition)?;
        }
        Ok(rule)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |pattern: &Option<Pattern>| pattern.as_ref().map(|p| p.text().to_owned());
        let conditions = [
            ("pid", self.pid.map(|pid| pid.to_string())),
            ("comm", text(&self.comm)),
            ("exe", text(&self.exe)),
            ("uid", self.uid.map(|uid| uid.to_string())),
            ("cgroup", text(&self.cgroup)),
            ("probe", self.probe.map(|probe| probe.to_string())),
        ];
        let mut separator = "";
        for (key, value) in conditions {
            if let Some(value) = value {
                write!(f, "{separator}{key}={value}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse()
            .map_err(|error| D::Error::custom(format_args!("`{text}`: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// Whether a rule holds for a process that differs from a usual one.
    fn holds(text: &str, differ: impl FnOnce(&mut Subject<'_>)) -> bool {
        let mut subject = Subject {
            pid: 7,
            comm: "kworker/0:1-ev",
            exe: "/opt/a,b/bin/app",
            uid: 0,
            cgroup: "/kubepods.slice/pod1.slice/docker-ab.scope/init",
        };
        differ(&mut subject);
        rule(text).holds_for(&subject)
    }

    /// Check which names, paths and cgroups globs match: those of names cross slashes, those
    /// of paths do not, and a cgroup matches with all above it.
    #[test]
    fn globs() {
        for (text, expected) in [
            ("comm=kworker*", true),
            ("comm=kworker/?:1-ev", true),
            ("comm=kworker", false),
            ("comm=*-ev", true),
            ("exe=/opt/*", false),
            ("exe=/opt/**", true),
            ("exe=/opt/*/bin/app", true),
            (r"exe=/opt/a\,b/bin/app", true),
            ("exe=/opt/{x,a,b}/bin/app", false),
            ("exe=/opt/*/bin/{app,tool}", true),
            ("exe=/opt/**/[a-c]pp", true),
            ("exe=**/app", true),
            ("cgroup=/", true),
            ("cgroup=/kubepods.slice", true),
            ("cgroup=/kubepods.slice/*/docker-*.scope", true),
            ("cgroup=/kubepods.slice/docker-*.scope", false),
            ("cgroup=/kubepods", false),
            ("cgroup=/**/init", true),
        ] {
            assert_eq!(holds(text, |_| {}), expected, "{text}");
        }
    }

    /// Check that all conditions of a rule must hold, and that a program whose file was
    /// replaced is still that program.
    #[test]
    fn conditions_hold_together() {
        assert!(holds("pid=7,uid=0,comm=kw*", |_| {}));
        assert!(!holds("pid=7,uid=0,comm=kw*", |subject| subject.uid = 1));
        assert!(!holds("pid=7,uid=0,comm=kw*", |subject| subject.pid = 8));
        let replaced = |subject: &mut Subject<'_>| subject.exe = "/usr/bin/app (deleted)";
        assert!(holds("exe=/usr/bin/app", replaced));
        assert!(holds("exe=/usr/bin/*", replaced));
        // As of a process of another mount namespace, or of none.
        assert!(!holds("cgroup=/a", |subject| subject.cgroup = ""));
        assert!(holds("cgroup=/", |subject| subject.cgroup = "/"));
    }

    /// Check that a rule is written as it is read, in one order, and names of users as numbers.
    #[test]
    fn round_trip() {
        for (text, written) in [
            ("comm=redis*", "comm=redis*"),
            (" uid=3,pid=4 ", "pid=4,uid=3"),
            ("probe=uprobe,exe=/a/{b,c}", "exe=/a/{b,c},probe=uprobe"),
            (r"comm=a\,b,uid=root", r"comm=a\,b,uid=0"),
            ("comm=a=b", "comm=a=b"),
        ] {
            assert_eq!(rule(text).to_string(), written, "{text}");
            assert_eq!(rule(written), rule(text), "{text}");
        }
        assert_ne!(rule("comm=a"), rule("comm=b"));
    }

    /// Check that what is no rule is refused, and why.
    #[test]
    fn refusals() {
        use RuleError as E;
        let owned = str::to_owned;
        for (text, error) in [
            ("", E::Empty),
            ("redis", E::NoCondition(owned("redis"))),
            ("comm=", E::NoCondition(owned("comm="))),
            ("comm=a,", E::NoCondition(owned(""))),
            ("name=a", E::UnknownKey(owned("name"))),
            ("comm=a,comm=b", E::Twice("comm")),
            ("pid=0", E::Pid(owned("0"))),
            ("pid=all", E::Pid(owned("all"))),
            ("uid=-1", E::Uid(owned("-1"))),
            ("uid=no-such-user", E::Uid(owned("no-such-user"))),
            (
                "comm=redis-server-16c",
                E::LongComm(owned("redis-server-16c")),
            ),
            ("exe=redis", E::Relative(owned("redis"))),
            ("cgroup=system.slice", E::Relative(owned("system.slice"))),
            ("probe=session", E::Probe(owned("session"))),
            ("probe=fast", E::Probe(owned("fast"))),
        ] {
            assert_eq!(text.parse::<Rule>(), Err(error), "{text}");
        }
        assert!(matches!("exe=/a/[b".parse::<Rule>(), Err(E::Glob(_))));
        assert!(matches!("exe=/a/{b,c".parse::<Rule>(), Err(E::Glob(_))));
        // As long as it may be, and a glob of any length.
        assert!("comm=redis-server-15".parse::<Rule>().is_ok());
        assert!("comm=*-a-name-that-is-long".parse::<Rule>().is_ok());
    }
}
