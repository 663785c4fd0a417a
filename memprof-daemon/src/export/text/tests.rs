use std::time::Duration;

use super::{header::duration, *};
use crate::export::{
    profile::{Engine, GoFacts},
    testing,
};

fn text(profile: &Profile, options: &Options) -> String {
    let mut out = Vec::new();
    write(profile, options, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// Check the whole report of a process, word by word.
#[test]
fn report() {
    let mut profile = testing::profile();
    profile.processes.truncate(1);
    assert_eq!(
        text(&profile, &Options::default()),
        include_str!("expected.txt")
    );
}

/// Check that numbers counted exactly have no ranges.
#[test]
fn exact_numbers_have_no_ranges() {
    let mut profile = testing::profile();
    profile.sample_interval_bytes = 1;
    profile.coarsest_interval_bytes = 1;
    for stack in profile
        .processes
        .iter_mut()
        .flat_map(|process| &mut process.stacks)
    {
        stack.counters.alloc_variance = 0.0;
        stack.counters.free_variance = 0.0;
        stack.counters.coarsest_interval_bytes = 1;
    }
    let text = text(&profile, &Options::default());
    assert!(text.contains("8 MiB in 824 objects"), "{text}");
    assert!(!text.contains("rough"), "{text}");
    assert!(text.contains("8 MiB  >99.9%  819 objects"), "{text}");
}

/// Check that a report says so when nothing was sampled, and what to try.
#[test]
fn nothing_sampled() {
    let mut profile = testing::empty_profile();
    for (interval, hint) in [
        (524_288, "-i 16KiB"),
        (1, "Record for longer (-d)"),
        (0, "sampling is off"),
    ] {
        profile.sample_interval_bytes = interval;
        profile.coarsest_interval_bytes = interval;
        let text = text(&profile, &Options::default());
        assert!(text.contains(hint), "{text}");
        assert!(
            text.contains("leaky;app (pid 4242, 7 in its namespace)"),
            "{text}"
        );
        assert!(!text.contains("Lost or late"), "{text}");
    }
    profile.processes.clear();
    assert_eq!(
        text(&profile, &Options::default()),
        "No process was profiled.\n"
    );
}

/// Check that every process is reported, and an exited one as such, without the
/// memory that nobody could read.
#[test]
fn several_processes() {
    let text = text(&testing::profile(), &Options::default());
    let (_, other) = text.split_once("other (pid 4243)").unwrap();
    assert!(
        other.starts_with("  /opt/other/app  has exited\n"),
        "{other}"
    );
    assert!(!other.contains("resident"), "{other}");
}

/// Check that the tables and stacks are cut where asked, and say so.
#[test]
fn options_cut() {
    let options = Options {
        top: 1,
        max_lines: 1,
        color: false,
    };
    let text = text(&testing::profile(), &options);
    assert!(text.contains("STILL IN USE: top 1 of 3 stacks, >99.9% of 8 MiB"));
    assert!(text.contains("... 2 more callers\n"), "{text}");
    assert!(!text.contains("#2"), "{text}");
}

/// Check that names cannot steer the terminal, and that colours are used only
/// when asked for.
#[test]
fn no_foreign_control_characters() {
    let mut profile = testing::profile();
    profile.processes[0].comm = "\x1b]0;owned\x07\n".to_owned();
    let text = text(&profile, &Options::default());
    assert!(text.starts_with("?]0;owned?? (pid 4242, 7 in"), "{text}");
    assert!(!text.contains('\x1b'));

    let options = Options {
        color: true,
        ..Options::default()
    };
    let colored = self::text(&profile, &options);
    assert!(colored.contains("\x1b[1m"));
    let plain = ["\x1b[1m", "\x1b[2m", "\x1b[1;33m", "\x1b[0m"]
        .iter()
        .fold(colored, |text, sequence| text.replace(sequence, ""));
    assert_eq!(plain, text);
}

/// Check that durations are in the unit that one would say them in.
#[test]
fn durations() {
    for (seconds, expected) in [
        (0.25, "0.2 s"),
        (30.04, "30.0 s"),
        (312.0, "5 min 12 s"),
        (10_930.0, "3 h 2 min"),
    ] {
        assert_eq!(duration(Duration::from_secs_f64(seconds)), expected);
    }
}

/// Check what is said of a Go program: whose numbers these are, from when, and what is wrong
/// with them.
#[test]
fn go_programs() {
    let mut profile = testing::profile();
    profile.processes.truncate(1);
    let process = &mut profile.processes[0];
    process.engine = Engine::GoRuntime;
    process.totals = None;
    let go = GoFacts {
        version: "go1.19.8".to_owned(),
        rate_bytes: Some(4096),
        interval_bytes: 4096,
        age: Some(Duration::from_millis(10)),
        has_collected: true,
        is_settled: true,
        is_since_start: true,
        ..GoFacts::default()
    };
    process.go = Some(go.clone());
    let said = text(&profile, &Options::default());
    for expected in [
        "objects, since its start\n",
        "samples, one every 4 KiB on average;",
        "  engine      go runtime\n  go          go1.19.8, as of its last garbage collection\n",
    ] {
        assert!(said.contains(expected), "{expected:?}: {said}");
    }

    let process = &mut profile.processes[0];
    process.exited = true;
    process.go = Some(GoFacts {
        rate_bytes: Some(0),
        has_collected: false,
        is_settled: false,
        is_since_start: false,
        failure: Some("it\x1bis gone".to_owned()),
        ..go
    });
    let said = text(&profile, &Options::default());
    for expected in [
        "objects, in 30.0 s\n",
        "go1.19.8, before its first garbage collection: nothing is known to be freed; \
         read 0.0 s before its end\n",
        "(MemProfileRate is 0); before, it was 4 KiB\n",
        "counts changed while they were read",
        "the last try to read it failed: it?is gone\n",
    ] {
        assert!(said.contains(expected), "{expected:?}: {said}");
    }

    let process = &mut profile.processes[0];
    process.go = None;
    process.go_refusal = Some("it is too new".to_owned());
    let said = text(&profile, &Options::default());
    let expected = "  go          its Go heap is not here: it is too new\n";
    assert!(said.contains(expected), "{said}");
}
