//! `memprof daemon --config FILE`: the daemon's options in TOML, each by its long name.
//!
//! What the command line and the environment leave open is taken from the file, as if it stood
//! on the command line: so a value is read and checked the same wherever it comes from.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory as _, FromArgMatches as _,
    error::{ContextKind, ContextValue},
    parser::ValueSource,
    value_parser,
};
use toml::de::{DeTable, DeValue};

use super::Cli;

/// The subcommand that has a file, and its option for it.
const SUBCOMMAND: &str = "daemon";
const OPTION: &str = "config";

/// A command line, put together.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) cli: Cli,
    /// Of a daemon with a file: to read it again.
    pub(super) source: Option<Source>,
}

/// Where a daemon's options come from.
#[derive(Clone, Debug)]
pub(super) struct Source {
    arguments: Vec<OsString>,
    path: PathBuf,
    /// The values in force when it was read, by the long names of the options.
    values: BTreeMap<String, Vec<OsString>>,
}

/// Why a command line cannot be used.
#[derive(Debug)]
pub(super) enum ParseError {
    /// clap's word on it, which can also be the help that was asked for.
    Usage(clap::Error),
    /// The file is at fault, and where.
    File(String),
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(error) => error.fmt(f),
            Self::File(error) => f.write_str(error),
        }
    }
}

/// Reads a command line, and the file that it names.
///
/// # Errors
///
/// [`ParseError`]: also for help.
pub(super) fn parse(arguments: Vec<OsString>) -> Result<Parsed, ParseError> {
    let Some(path) = path_of(&arguments) else {
        let cli = Cli::command().try_get_matches_from(&arguments);
        let cli = cli.and_then(|matches| Cli::from_arg_matches(&matches));
        let cli = cli.map_err(ParseError::Usage)?;
        return Ok(Parsed { cli, source: None });
    };
    let (cli, values) = parse_with(&arguments, &path)?;
    Ok(Parsed {
        cli,
        source: Some(Source {
            arguments,
            path,
            values,
        }),
    })
}

impl Source {
    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file again; the options that have other values now than at the start.
    ///
    /// # Errors
    ///
    /// [`ParseError`] if it makes no sense any more.
    pub(super) fn reread(&self) -> Result<(Cli, Vec<String>), ParseError> {
        let (cli, now) = parse_with(&self.arguments, &self.path)?;
        let names = self.values.keys().chain(now.keys());
        let mut changed: Vec<String> = names
            .filter(|&name| self.values.get(name) != now.get(name))
            .cloned()
            .collect();
        changed.sort();
        changed.dedup();
        Ok((cli, changed))
    }
}

/// The daemon's options, with all that clap derives.
fn daemon_command() -> Option<Command> {
    let mut command = Cli::command();
    command.build();
    command.find_subcommand(SUBCOMMAND).cloned()
}

/// The file that a command line names. None, too, if it makes no sense: clap will say why.
fn path_of(arguments: &[OsString]) -> Option<PathBuf> {
    let given = given(&daemon_command()?, arguments)?;
    given.get_one::<OsString>(OPTION).map(PathBuf::from)
}

/// What a command line and the environment have of the daemon's options, whatever is missing
/// or in conflict there: the file may bring it, or be left out for it.
fn given(daemon: &Command, arguments: &[OsString]) -> Option<ArgMatches> {
    let (_, arguments) = arguments.split_first()?;
    if arguments.first()? != SUBCOMMAND {
        return None;
    }
    let command = Command::new(SUBCOMMAND).args(options(daemon).map(lenient));
    command.try_get_matches_from(arguments).ok()
}

/// Options that have a long name, except for help.
fn options(daemon: &Command) -> impl Iterator<Item = &Arg> {
    let is_option = |arg: &&Arg| {
        let action = arg.get_action();
        let is_help = matches!(
            action,
            ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
        );
        arg.get_long().is_some() && !is_help
    };
    daemon.get_arguments().filter(is_option)
}

/// The same option, that takes every value and demands nothing.
fn lenient(arg: &Arg) -> Arg {
    let action = arg.get_action().clone();
    let mut lenient = Arg::new(arg.get_id().clone()).action(action.clone());
    if action.takes_values() {
        lenient = lenient.value_parser(value_parser!(OsString));
        lenient = lenient.num_args(arg.get_num_args().unwrap_or_default());
    } else {
        // A variable says yes or no in its own way.
        lenient = lenient.value_parser(arg.get_value_parser().clone());
    }
    if let Some(long) = arg.get_long() {
        lenient = lenient.long(long.to_owned());
    }
    if let Some(short) = arg.get_short() {
        lenient = lenient.short(short);
    }
    match arg.get_env() {
        Some(variable) => lenient.env(variable.to_owned()),
        None => lenient,
    }
}

/// Parses a command line with what the file adds to it.
fn parse_with(
    arguments: &[OsString],
    path: &Path,
) -> Result<(Cli, BTreeMap<String, Vec<OsString>>), ParseError> {
    let in_file = |what: &dyn fmt::Display| ParseError::File(format!("{}: {what}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| in_file(&error))?;
    let daemon = daemon_command().ok_or_else(|| in_file(&"there is no daemon"))?;
    let given =
        given(&daemon, arguments).ok_or_else(|| in_file(&"the command line is no daemon's"))?;
    let added = added(&text, &daemon, &given)
        .map_err(|(span, what)| in_file(&format!("{}: {what}", place(&text, &span))))?;

    let mut all = arguments.to_vec();
    all.extend(added.iter().flat_map(|added| added.arguments.clone()));
    let matches = Cli::command().try_get_matches_from(all);
    let parsed = matches.and_then(|matches| {
        let values = matches
            .subcommand_matches(SUBCOMMAND)
            .map_or_else(BTreeMap::new, |matches| values(&daemon, matches));
        Ok((Cli::from_arg_matches(&matches)?, values))
    });
    parsed.map_err(|error| {
        // Is it about something that the file has brought?
        let blamed = blamed(&error);
        let at_fault = added.iter().find(|added| blamed.contains(&added.name));
        match at_fault {
            Some(added) => in_file(&format!(
                "{}: {}",
                place(&text, &added.span),
                message(&error)
            )),
            None => ParseError::Usage(error),
        }
    })
}

/// What one line of the file adds to the command line.
struct Added {
    /// The option's long name.
    name: String,
    /// Where in the file.
    span: Range<usize>,
    arguments: Vec<OsString>,
}

/// What the file adds, or where it is wrong and why.
fn added(
    text: &str,
    daemon: &Command,
    given: &ArgMatches,
) -> Result<Vec<Added>, (Range<usize>, String)> {
    let table = DeTable::parse(text)
        .map_err(|error| (error.span().unwrap_or_default(), error.message().to_owned()))?;
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let is_given = |arg: &Arg| {
        matches!(
            given.value_source(arg.get_id().as_str()),
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        )
    };
    let mut all = Vec::new();
    for (key, value) in entries {
        let name = key.get_ref().as_ref();
        let arg = options(daemon)
            .find(|arg| arg.get_long() == Some(name) && name != OPTION)
            .ok_or_else(|| {
                let what = format!("`{name}` is no option of `memprof {SUBCOMMAND}`");
                (key.span(), what)
            })?;
        let arguments = arguments(arg, value.get_ref())
            .map_err(|what| (value.span(), format!("{name}: {what}")))?;
        // What the command line has is not only stronger than the same in the file, but also
        // than what cannot be beside it.
        let is_overruled = options(daemon)
            .filter(|other| is_given(other))
            .any(|other| {
                other.get_id() == arg.get_id()
                    || conflict(daemon, arg, other)
                    || conflict(daemon, other, arg)
            });
        if !is_overruled {
            all.push(Added {
                name: name.to_owned(),
                span: key.span(),
                arguments,
            });
        }
    }
    Ok(all)
}

fn conflict(daemon: &Command, arg: &Arg, other: &Arg) -> bool {
    let conflicts = daemon.get_arg_conflicts_with(arg);
    conflicts.iter().any(|one| one.get_id() == other.get_id())
}

/// A value as arguments: `--name=value`, again for each of a list.
fn arguments(arg: &Arg, value: &DeValue<'_>) -> Result<Vec<OsString>, String> {
    let name = arg.get_long().unwrap_or_default();
    if !arg.get_action().takes_values() {
        return match value.as_bool() {
            Some(true) => Ok(vec![format!("--{name}").into()]),
            Some(false) => Ok(Vec::new()),
            None => Err("true or false is needed".to_owned()),
        };
    }
    let option = |value: &DeValue<'_>| Ok(OsString::from(format!("--{name}={}", scalar(value)?)));
    match value.as_array() {
        Some(values) if matches!(arg.get_action(), ArgAction::Append) => {
            values.iter().map(|value| option(value.get_ref())).collect()
        }
        Some(_) => Err("one value is needed, not a list".to_owned()),
        None => Ok(vec![option(value)?]),
    }
}

/// A value as one types it.
fn scalar(value: &DeValue<'_>) -> Result<String, String> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    if let Some(number) = value.as_integer() {
        let number = i128::from_str_radix(number.as_str(), number.radix());
        return number
            .map(|number| number.to_string())
            .map_err(|error| error.to_string());
    }
    if let Some(number) = value.as_float() {
        return Ok(number.as_str().to_owned());
    }
    Err(format!(
        "text or a number is needed, not {}",
        value.type_str()
    ))
}

/// The values in force, as they were given.
fn values(daemon: &Command, matches: &ArgMatches) -> BTreeMap<String, Vec<OsString>> {
    let value = |arg: &Arg| {
        let raw = matches.get_raw(arg.get_id().as_str())?;
        Some((
            arg.get_long()?.to_owned(),
            raw.map(OsStr::to_owned).collect(),
        ))
    };
    options(daemon).filter_map(value).collect()
}

/// The long names of the options that an error is about.
fn blamed(error: &clap::Error) -> Vec<String> {
    let kinds = [ContextKind::InvalidArg, ContextKind::PriorArg];
    let texts = kinds.into_iter().filter_map(|kind| error.get(kind));
    let names = texts.flat_map(|value| match value {
        ContextValue::String(text) => vec![text.clone()],
        ContextValue::Strings(texts) => texts.clone(),
        _ => Vec::new(),
    });
    // `--name <VALUE>`
    let name = |text: String| {
        let name = text.strip_prefix("--")?.split([' ', '=']).next()?;
        Some(name.to_owned())
    };
    names.filter_map(name).collect()
}

/// clap's first sentence, without what belongs to a command line.
fn message(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// Line and column, both from 1 on.
fn place(text: &str, span: &Range<usize>) -> String {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .unwrap_or_default()
        .chars()
        .count()
        + 1;
    format!("line {line}, column {column}")
}

#[cfg(test)]
mod tests;
