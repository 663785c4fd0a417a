//! Programs that nobody here wrote, at work: Debian's redis-server, sqlite3 and
//! python3.

use std::{fs, io::Write as _, os::unix::net::UnixStream, path::Path, process::Command};

use memprof_tests::{
    Profile, Running, TempDir, daemon::eventually, memprof, pprof, profile::Frame,
};

/// Starts a program that has to be there.
fn start(program: &str, args: &[&str]) -> Running {
    assert!(Path::new(program).exists(), "the tests need {program}");
    Running::spawn(Command::new(program).args(args))
}

/// Records `pid` for three seconds as JSON, and as pprof; both have to be
/// readable, with samples in them. Returns the first.
fn record(dir: &TempDir, pid: u32) -> Profile {
    let record = |name: &str, format: &str| {
        let file = dir.file(name);
        let mut command = memprof(&[
            "record", "-d", "3", "-i", "64KiB", "-f", format, "-o", &file,
        ]);
        command.args(["-p", &pid.to_string()]);
        Running::spawn(&mut command).finish().expect_code(0);
        file
    };
    let profile = Profile::read(record("profile.json", "json"));
    assert_eq!(profile.sample_interval_bytes, 64 << 10);
    let process = profile.process();
    assert!(!process.exited, "it was still at work");
    assert!(
        process.totals().alloc_bytes > 0,
        "no samples: {:?}",
        process.losses
    );
    for stack in &process.stacks {
        assert!(stack.inuse_bytes <= stack.alloc_bytes, "{}", stack.path());
        assert!(
            stack.inuse_objects <= stack.alloc_objects,
            "{}",
            stack.path()
        );
    }

    let file = record("profile.pb.gz", "pprof");
    for index in [
        "alloc_objects",
        "alloc_space",
        "inuse_objects",
        "inuse_space",
    ] {
        let lines = pprof::top(dir, &file, index);
        if index.starts_with("alloc") {
            assert!(lines.iter().any(|line| line.flat > 0), "{index} is empty");
        }
    }
    profile
}

/// Fails the test unless some stack has a frame that `wanted` accepts.
#[track_caller]
fn expect_frame(profile: &Profile, wanted: impl Fn(&Frame) -> bool) {
    let stacks = &profile.process().stacks;
    let mut frames = stacks.iter().flat_map(|stack| &stack.frames);
    assert!(frames.any(wanted), "no such frame: {stacks:#?}");
}

/// Check redis-server, whose allocator is libjemalloc, under redis-benchmark.
#[test]
fn redis_server() {
    let dir = TempDir::new("real");
    let socket = dir.file("redis.sock");
    let server = start(
        "/usr/bin/redis-server",
        &[
            "--port",
            "0",
            "--unixsocket",
            &socket,
            "--dir",
            &dir.file(""),
            "--save",
            "",
            "--appendonly",
            "no",
        ],
    );
    eventually(|| {
        let mut stream = UnixStream::connect(&socket).ok()?;
        stream.write_all(b"PING\r\n").ok()
    });
    let benchmark = start(
        "/usr/bin/redis-benchmark",
        &[
            "-s",
            &socket,
            "-t",
            "set,lpush",
            "-d",
            "500",
            "-r",
            "100000",
            "-l",
            "-q",
        ],
    );
    let profile = record(&dir, server.pid());
    let mut sites = profile.probe.sites.iter();
    assert!(
        sites.any(|site| site.function == "malloc" && site.module.contains("libjemalloc")),
        "{:?}",
        profile.probe.sites
    );
    assert_eq!(profile.process().comm, "redis-server");
    expect_frame(&profile, |frame| frame.function.is_some());
    drop(benchmark);
}

/// Check sqlite3 on a script that does not end before the recording does.
#[test]
fn sqlite3() {
    let dir = TempDir::new("real");
    let script = dir.file("script.sql");
    let mut text = String::from(
        "CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, body BLOB);\n\
         CREATE INDEX by_name ON t(name);\n",
    );
    for round in 0..100_000 {
        text.push_str(&format!(
            "INSERT INTO t(name, body) SELECT 'name' || value || '-{round}', randomblob(2000) \
             FROM generate_series(1, 200);\n\
             SELECT count(*) FROM (SELECT name, group_concat(length(body)) FROM t GROUP BY name);\n\
             DELETE FROM t WHERE id % 3 = {};\n",
            round % 3
        ));
    }
    fs::write(&script, text).expect("writing the script");
    assert!(
        Path::new("/usr/bin/sqlite3").exists(),
        "the tests need /usr/bin/sqlite3"
    );
    let mut command = Command::new("/bin/sh");
    // The shell becomes sqlite3; the harness has its own use for stdin.
    command.args([
        "-c",
        "exec /usr/bin/sqlite3 :memory: < \"$1\"",
        "sh",
        &script,
    ]);
    let mut sqlite = Running::spawn(&mut command);
    // Its first row: the program is there and at work.
    sqlite.wait_stdout(|line| line.parse::<u64>().is_ok());
    let profile = record(&dir, sqlite.pid());
    assert_eq!(profile.process().exe, "/usr/bin/sqlite3");
    // One static function in the stripped libsqlite3 makes all calls of malloc,
    // and no frame pointer leads on from there: module and offset it is.
    expect_frame(&profile, |frame| {
        let module = frame.module.as_deref().unwrap_or_default();
        module.contains("libsqlite3") && frame.file_offset > Some(0)
    });
    assert!(sqlite.is_running());
}

/// Check Debian's python3, which links its interpreter into the program.
#[test]
fn python3() {
    let dir = TempDir::new("real");
    let script = "
print('ready', flush=True)
kept = []
while True:
    for i in range(1000):
        kept.append(bytearray(2000 + i))
        if len(kept) > 5000:
            del kept[:4000]
    table = {str(i): [i] * 100 for i in range(2000)}
";
    let mut python = start("/usr/bin/python3", &["-c", script]);
    python.wait_stdout(|line| line == "ready");
    let profile = record(&dir, python.pid());
    assert!(
        profile.process().exe.starts_with("/usr/bin/python3"),
        "{}",
        profile.process().exe
    );
    expect_frame(&profile, |frame| frame.function.is_some());
    assert!(python.is_running());
}
