//! Names by debuginfod, from a server of our own.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use memprof_tests::{
    Daemon, End, Profile, Record, Recorded, Running, TempDir,
    debuginfod::{Answer, Debuginfod},
    memprof,
    stripped::Stripped,
    targets::target_with,
};

/// No dump and no end of a recording may take as long as a server that says nothing.
const PROMPT: Duration = Duration::from_secs(20);

struct Setting {
    dir: TempDir,
    stripped: Stripped,
    server: Debuginfod,
}

impl Setting {
    fn new() -> Self {
        let dir = TempDir::new("debuginfod");
        let stripped = Stripped::new(&target_with("hold.c", &["-Wl,--build-id"]), &dir);
        Self {
            dir,
            stripped,
            server: Debuginfod::start(),
        }
    }

    fn answer(&self, answer: Answer) {
        self.server.answer(&self.stripped.build_id, answer);
    }

    fn file(&self) -> Answer {
        Answer::File(self.stripped.debug.clone())
    }

    fn asked(&self) -> usize {
        self.server.asked(&self.stripped.build_id)
    }

    fn environment(&self) -> [(&'static str, String); 2] {
        [
            ("DEBUGINFOD_URLS", self.server.url.clone()),
            ("DEBUGINFOD_CACHE_PATH", self.dir.file("cache")),
        ]
    }

    fn record(&self, options: &[&str]) -> Recorded {
        let mut record = Record::every_allocation(&self.dir).options(options);
        for (name, value) in self.environment() {
            record = record.env(name, &value);
        }
        record.attach(&mut Command::new(&self.stripped.program), End::TargetExits)
    }
}

/// The function and the line that the program allocates in.
fn name(profile: &Profile) -> Option<(String, Option<u64>)> {
    let stacks = &profile.process().stacks;
    let mut leaves = stacks.iter().map(|stack| &stack.frames[0]);
    let leaf = leaves
        .find(|frame| {
            frame
                .module
                .as_deref()
                .is_some_and(|path| path.ends_with("/program"))
        })
        .expect("a stack from the program");
    Some((leaf.function.clone()?, leaf.line))
}

fn expect_named(profile: &Profile) {
    let (function, line) = name(profile).expect("a name");
    assert_eq!(function, "hold_here");
    assert!(line.is_some());
}

/// Check that a dump does not wait for a server that says nothing, that a later one has
/// the names, and that the file is where other clients find it.
#[test]
fn a_dump_does_not_wait() {
    let setting = Setting::new();
    setting.answer(Answer::Hang);
    let mut target = Running::spawn(&mut Command::new(&setting.stripped.program));
    target.wait_stdout(|line| line == "ready");
    let pid = target.pid();
    let [urls, cache] = setting.environment();
    let environment = [(urls.0, &*urls.1), (cache.0, &*cache.1)];
    let socket = setting.dir.file("memprof.sock");
    let daemon = Daemon::start_with(&socket, &[pid], &["--debuginfod"], &environment);
    target.send("go");
    target.wait_stdout(|line| line == "done");

    let start = Instant::now();
    let profile = daemon.profile_when(pid, |profile| !profile.process().stacks.is_empty());
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
    assert_eq!(name(&profile), None);
    memprof_tests::daemon::eventually(|| (setting.asked() == 1).then_some(()));
    assert_eq!(name(&daemon.profile(pid)), None);
    setting.answer(setting.file());
    let profile = daemon.profile_when(pid, |profile| name(profile).is_some());
    expect_named(&profile);
    let counts = daemon.get("/v1/stats").json()["debuginfod"].clone();
    assert_eq!(counts["downloaded"], 1, "{counts}");
    assert_eq!(setting.asked(), 1);
    let kept = format!("cache/{}/debuginfo", setting.stripped.build_id);
    let kept = fs::read(setting.dir.file(&kept)).expect("a file in the cache");
    assert!(kept == setting.stripped.debug, "another file");
    target.close_stdin();
    target.finish().expect_code(0);
    daemon.stop();
}

/// Check that nobody is asked without the option, that a recording waits for what the
/// server sends, and that the next takes it from the cache.
#[test]
fn a_recording_waits() {
    let setting = Setting::new();
    setting.answer(setting.file());
    assert_eq!(name(&setting.record(&[]).profile), None);
    assert_eq!(setting.asked(), 0);
    for _ in 0..2 {
        expect_named(&setting.record(&["--debuginfod"]).profile);
        assert_eq!(setting.asked(), 1);
    }
}

/// Check that a recording waits no longer than it is told to, and says what is missing.
#[test]
fn a_recording_does_not_wait_for_ever() {
    let setting = Setting::new();
    setting.answer(Answer::Hang);
    for wait in ["0", "0.5"] {
        let start = Instant::now();
        let recorded = setting.record(&["--debuginfod", "--debuginfod-wait", wait]);
        assert!(start.elapsed() < PROMPT, "{wait}: {:?}", start.elapsed());
        assert_eq!(name(&recorded.profile), None);
        let says = recorded.memprof.stderr.contains("has not arrived");
        assert_eq!(says, wait != "0", "{}", recorded.memprof.stderr);
    }
}

/// Check that a file which the server has not is not asked for again by the next run, and
/// that a file for another build id is refused, and asked for again by the next run.
#[test]
fn absent_and_wrong_files() {
    let setting = Setting::new();
    for _ in 0..2 {
        assert_eq!(name(&setting.record(&["--debuginfod"]).profile), None);
        assert_eq!(setting.asked(), 1);
    }

    let setting = Setting::new();
    let dir = TempDir::new("other");
    let other = Stripped::new(&target_with("brief.c", &["-Wl,--build-id"]), &dir);
    setting.answer(Answer::File(other.debug));
    let recorded = setting.record(&["--debuginfod"]);
    assert_eq!(name(&recorded.profile), None);
    recorded.memprof.expect_stderr(&["not for this build id"]);
    setting.answer(setting.file());
    expect_named(&setting.record(&["--debuginfod"]).profile);
}

/// Check that the option without a server is an error that says what to set, before
/// anything is traced.
#[test]
fn needs_a_server() {
    for (value, message) in [("", "set DEBUGINFOD_URLS"), ("ftp://host", "ftp://host")] {
        let mut command = memprof(&["record", "--debuginfod", "--", "/bin/true"]);
        let finished = Running::spawn(command.env("DEBUGINFOD_URLS", value)).finish();
        finished.expect_code(1).expect_stderr(&[message]);
    }
}
