use super::*;
use crate::cli::{Command as Subcommand, daemon::DaemonArgs};

/// `memprof daemon` with arguments, and what a file says.
fn daemon(text: &str, more: &[&str]) -> Result<(DaemonArgs, Parsed), String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let path = file.path().to_str().unwrap();
    let arguments = ["memprof", "daemon", "--config", path];
    let arguments = arguments.iter().chain(more).map(OsString::from).collect();
    let again = Vec::clone(&arguments);
    let parsed = parse(arguments).map_err(|error| error.to_string().replace(path, "FILE"))?;
    let Subcommand::Daemon(args) = parsed.cli.command else {
        panic!("{parsed:?}")
    };
    let parsed = parse(again).unwrap();
    Ok((args, parsed))
}

fn interval(text: &str, more: &[&str]) -> u64 {
    let (args, _) = daemon(text, more).unwrap_or_else(|error| panic!("{text}: {error}"));
    args.change().unwrap().sample_interval_bytes.unwrap()
}

/// A value in force, as it was given.
fn value(parsed: &Parsed, name: &str) -> Vec<String> {
    let values = &parsed.source.as_ref().unwrap().values;
    let values = values.get(name).cloned().unwrap_or_default();
    values
        .iter()
        .map(|value| value.to_string_lossy().into_owned())
        .collect()
}

/// Check that options are read in each of TOML's ways to write them, and defaults stand.
#[test]
fn values_of_each_kind() {
    let text = r#"
        # a comment
        pid = [12, "13"]
        sample-interval = "64KiB"
        stack-depth = 0x10
        attach-timeout = 0.5
        bpf-log = true
        debuginfod = false
        socket = '/tmp/with = and "'
        probe = "uprobe"
    "#;
    let (args, parsed) = daemon(text, &[]).unwrap();
    assert_eq!(args.change().unwrap().sample_interval_bytes, Some(65_536));
    for (name, expected) in [
        ("pid", &["12", "13"][..]),
        ("stack-depth", &["16"]),
        ("attach-timeout", &["0.5"]),
        ("bpf-log", &["true"]),
        ("debuginfod", &["false"]),
        ("socket", &["/tmp/with = and \""]),
        ("unwind", &["auto"]),
    ] {
        assert_eq!(value(&parsed, name), expected, "{name}");
    }
    assert_eq!(interval("pid = 1\nsample-interval = 1", &[]), 1);
}

/// Check that the command line is stronger than the file, in all its ways to write an option,
/// and that the file is stronger than defaults.
#[test]
fn precedence() {
    let text = "pid = 1\nsample-interval = \"64KiB\"\n";
    assert_eq!(interval(text, &[]), 65_536);
    assert_eq!(interval("pid = 1", &[]), 512 << 10);
    for more in [
        &["-i", "3"][..],
        &["-i3"],
        &["--sample-interval=3"],
        &["--sample-interval", "3"],
    ] {
        assert_eq!(interval(text, more), 3, "{more:?}");
    }
    // A list is replaced, not continued.
    let (_, parsed) = daemon(text, &["-p", "7"]).unwrap();
    assert_eq!(value(&parsed, "pid"), ["7"]);
    // Half here, half there.
    let (_, parsed) = daemon("pid = 1\ndump-dir = \"/d\"", &["--dump-every", "3"]).unwrap();
    assert_eq!(value(&parsed, "dump-dir"), ["/d"]);
}

/// Check that what is wrong in a file is told with its place: TOML that is none, options that
/// are none, values of another kind, and values that make no sense.
#[test]
fn mistakes() {
    for (text, place, word) in [
        ("pid = 1\npid = 2\n", "line 2, column 1", "duplicate"),
        ("pid = \n", "line 1, column 7", ""),
        (
            "pid = 1\n  sample_interval = 1",
            "line 2, column 3",
            "`sample_interval`",
        ),
        ("pid = 1\nconfig = \"x\"", "line 2, column 1", "`config`"),
        ("pid = 1\nhelp = true", "line 2, column 1", "`help`"),
        (
            "pid = 1\n[sample-interval]\na = 1",
            "line 2, column 1",
            "table",
        ),
        ("pid = 1\nstack-depth = [1, 2]", "line 2, column 15", "list"),
        (
            "pid = 1\nbpf-log = \"yes\"",
            "line 2, column 11",
            "true or false",
        ),
        ("pid = 1\nprobe = true", "line 2, column 9", "boolean"),
        (
            "pid = 1\nsample-interval = \"often\"",
            "line 2, column 1",
            "often",
        ),
        ("pid = 1\nstack-depth = 0", "line 2, column 1", "0"),
        ("pid = [1, 0]", "line 1, column 1", "0"),
        ("pid = 1\n\n\u{e4} = 1", "line 3, column 1", ""),
        ("pid = 1\n'\u{e4}' = 1", "line 2, column 1", "`\u{e4}`"),
    ] {
        let error = daemon(text, &[]).map(drop).unwrap_err();
        assert!(
            error.starts_with(&format!("FILE: {place}: ")),
            "{text}: {error}"
        );
        assert!(error.contains(word), "{text}: {error}");
    }
    // Not the file's fault.
    let error = daemon("sample-interval = 1", &[]).map(drop).unwrap_err();
    assert!(error.contains("--pid"), "{error}");
    let error = daemon("pid = 1", &["-i", "often"]).map(drop).unwrap_err();
    assert!(!error.contains("FILE"), "{error}");
    let missing = ["memprof", "daemon", "--config", "/no/such/file"];
    let error = parse(missing.iter().map(OsString::from).collect()).unwrap_err();
    assert!(error.to_string().contains("/no/such/file"), "{error}");
}

/// Check that a file read again tells which options have other values, and that one which
/// makes no sense any more is an error.
#[test]
fn reading_again() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let arguments = ["memprof", "daemon", "--stack-depth", "9", "--config"];
    let arguments = arguments.iter().map(OsString::from);
    let arguments = arguments.chain([file.path().into()]).collect();
    fs::write(
        file.path(),
        "pid = 1\nring-size = \"1MiB\"\nstack-depth = 3",
    )
    .unwrap();
    let source = parse(arguments).unwrap().source.unwrap();
    assert_eq!(source.path(), file.path());
    assert_eq!(source.reread().unwrap().1, [""; 0]);
    // Overruled before and now: nothing has changed.
    fs::write(file.path(), "pid = 1\nsample-interval = 1\nstack-depth = 4").unwrap();
    assert_eq!(source.reread().unwrap().1, ["ring-size", "sample-interval"]);
    fs::write(file.path(), "pid = 1\nsample-interval = -1").unwrap();
    assert!(source.reread().is_err());
}

/// Check that other subcommands, and a daemon without a file, are read as before.
#[test]
fn without_a_file() {
    for line in [
        "memprof check",
        "memprof daemon -p 1",
        "memprof record -- daemon --config x",
    ] {
        let parsed = parse(line.split(' ').map(OsString::from).collect()).unwrap();
        assert!(parsed.source.is_none(), "{line}");
    }
    for line in [
        "memprof",
        "memprof daemon",
        "memprof daemon --config",
        "memprof daemon --help",
    ] {
        let error = parse(line.split(' ').map(OsString::from).collect()).unwrap_err();
        assert!(matches!(error, ParseError::Usage(_)), "{line}");
    }
}
