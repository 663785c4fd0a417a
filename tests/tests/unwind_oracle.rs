//! Stacks of programs without frame pointers, compared frame by frame with what framehop
//! makes of the same registers and memory.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use memprof_tests::{
    Running, TempDir, memprof,
    oracle::{Oracle, Summary, Verdict, read_walks},
    running::LONG_LIMIT,
    targets::target_with,
};
use nix::sys::signal::Signal;

/// What holds for every program: at least so many stacks, 99 % of them whole, 99.5 % as
/// framehop has them or said to be cut, and none otherwise: of the rest framehop has seen
/// the beginning only, since its copy or its rules end there.
fn expect(name: &str, summary: &Summary, least: usize) {
    println!("{name}: {summary}");
    let context = || format!("{name}: {summary}\n{}", summary.examples());
    assert!(summary.walks >= least, "{}", context());
    assert!(summary.percent(summary.complete) >= 99.0, "{}", context());
    assert_eq!(summary.count(Verdict::Differs), 0, "{}", context());
    let judged = [Verdict::Agrees, Verdict::AgreesOnCode, Verdict::Cut];
    let judged = summary.percent(judged.map(|verdict| summary.count(verdict)).iter().sum());
    assert!(judged >= 99.5, "{}", context());
}

fn maps_of(pid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/maps"))
        .ok()
        .filter(|maps| !maps.is_empty())
}

/// Records a program that runs already and waits; `work` makes it work.
fn attached(dir: &TempDir, interval: &str, pid: u32, work: impl FnOnce()) -> Summary {
    let copies = dir.file("copies");
    let mut command = memprof(&["record", "-i", interval, "--stack-copies", &copies]);
    command.args(["-p", &pid.to_string(), "-o", &dir.file("profile.json")]);
    let recording = Running::spawn(&mut command);
    recording.wait_stderr(|line| line.starts_with("memprof: recording"));
    work();
    let maps = maps_of(pid).expect("the program still runs");
    recording.signal(Signal::SIGINT);
    recording.finish().expect_code(0);
    let walks = read_walks(&copies);
    assert!(walks.iter().all(|walk| walk.pid == pid));
    Summary::of(&walks, &Oracle::new(&maps))
}

/// Records a command from its start to its end; its mappings are read as it runs.
fn command(dir: &TempDir, interval: &str, name: &str, words: &[&str]) -> Summary {
    let copies = dir.file("copies");
    let mut command = memprof(&["record", "-i", interval, "--stack-copies", &copies]);
    command
        .args(["-o", &dir.file("profile.json"), "--"])
        .args(words);
    command.current_dir(dir.path());
    let mut recording = Running::spawn(&mut command);
    let mut maps = String::new();
    while recording.is_running() {
        let children = fs::read_dir("/proc")
            .expect("/proc")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/status"))
                    .is_ok_and(|status| status.contains(&format!("\nPPid:\t{}\n", recording.pid())))
            });
        for now in children.filter_map(maps_of) {
            // Where a process ends while it is read, the rest is missing.
            if now.contains(name) && now.contains("[stack]") {
                maps = now;
            }
        }
        thread::sleep(Duration::from_millis(3));
    }
    recording.finish_within(LONG_LIMIT).expect_code(0);
    assert!(!maps.is_empty(), "{name} was not met");
    Summary::of(&read_walks(&copies), &Oracle::new(&maps))
}

/// An interpreter that has loaded what it needs, says so, and works when told.
fn interpreter(interval: &str, program: &str, words: &[&str]) -> Summary {
    assert!(Path::new(program).exists(), "the tests need {program}");
    let dir = TempDir::new("oracle");
    let mut target = Running::spawn(Command::new(program).args(words));
    target.wait_stdout(|line| line == "ready");
    let pid = target.pid();
    attached(&dir, interval, pid, || {
        target.send("go");
        target.wait_stdout_for(LONG_LIMIT, |line| line == "done");
    })
}

/// Check C code that has no frame pointers and uses rbp for other things.
#[test]
fn c() {
    let dir = TempDir::new("oracle");
    let target = target_with("deep.c", &["-O2", "-fomit-frame-pointer"]);
    expect("C", &command(&dir, "1", "deep", &[target.text()]), 1000);
}

/// Check C++ with exceptions, which allocate while they unwind.
#[test]
fn cpp() {
    let dir = TempDir::new("oracle");
    let target = target_with("throws.cpp", &["-O2", "-fomit-frame-pointer"]);
    expect("C++", &command(&dir, "1", "throws", &[target.text()]), 1000);
}

/// Check Rust.
#[test]
fn rust() {
    let dir = TempDir::new("oracle");
    let target = target_with(
        "collect.rs",
        &["-Copt-level=3", "-Cforce-frame-pointers=no"],
    );
    expect(
        "Rust",
        &command(&dir, "1", "collect", &[target.text()]),
        2000,
    );
}

/// Check Debian's python3 with modules written in C.
#[test]
fn python() {
    const SCRIPT: &str = r#"
import json, re, sqlite3, sys
db = sqlite3.connect(":memory:")
db.execute("create table t(a, b)")
json.loads(json.dumps({"a": 1}))
print("ready", flush=True)
sys.stdin.readline()
for i in range(150):
    json.loads(json.dumps({"a": list(range(200)), "b": "x" * 1000}))
    db.executemany("insert into t values(?, ?)", [(i, "y" * 500)] * 20)
    re.compile("a{%d}(b|c)*d+" % (i % 50 + 1)).findall("aab" * 100)
    db.execute("select a, count(*) from t group by a order by b").fetchall()
print("done", flush=True)
sys.stdin.readline()
"#;
    let words = ["-c", SCRIPT];
    let summary = interpreter("16KiB", "/usr/bin/python3", &words);
    expect("python3", &summary, 500);
}

/// Check Debian's perl.
#[test]
fn perl() {
    const SCRIPT: &str = r#"
$| = 1; print "ready\n"; <STDIN>;
for my $i (1..300) { my %h = map { $_ => "x" x 50 } 1..300; my $s = join ",", sort keys %h;
  $s =~ s/(\d+),/<$1>/g; my @p = split /</, $s; }
print "done\n"; <STDIN>;
"#;
    let summary = interpreter("8KiB", "/usr/bin/perl", &["-e", SCRIPT]);
    expect("perl", &summary, 500);
}

/// Check Debian's sqlite3.
#[test]
fn sqlite() {
    let dir = TempDir::new("oracle");
    let mut target = Running::spawn(Command::new("/usr/bin/sqlite3").arg(":memory:"));
    target.send("create table t(a, b); select 'ready';");
    target.wait_stdout(|line| line == "ready");
    let summary = attached(&dir, "16KiB", target.pid(), || {
        target.send(
            "with recursive n(i) as (select 1 union all select i + 1 from n where i < 30000) \
             insert into t select i, hex(randomblob(50)) from n; create index x on t(b); \
             select count(*) from (select a, b from t order by b); select 'done';",
        );
        target.wait_stdout_for(LONG_LIMIT, |line| line == "done");
    });
    expect("sqlite3", &summary, 500);
}

/// Check Debian's redis-server, whose allocator is another one.
#[test]
fn redis() {
    let dir = TempDir::new("oracle");
    let socket = dir.file("redis");
    let words = ["--port", "0", "--save", "", "--unixsocket", &socket];
    let server = Running::spawn(Command::new("/usr/bin/redis-server").args(words));
    server.wait_stdout(|line| {
        line.contains("ready to accept connections") || line.contains("is now ready")
    });
    let summary = attached(&dir, "16KiB", server.pid(), || {
        let words = [
            "-s",
            &socket,
            "-q",
            "-n",
            "20000",
            "-t",
            "set,lpush,hset,sadd",
        ];
        let client = Running::spawn(Command::new("/usr/bin/redis-benchmark").args(words));
        client.finish_within(LONG_LIMIT).expect_code(0);
    });
    expect("redis-server", &summary, 500);
}

/// Check gcc's compiler proper.
#[test]
fn cc1() {
    let dir = TempDir::new("oracle");
    let source: String = (0..400)
        .map(|n| {
            format!(
                "int f{n}(int *p, int n) {{ int s = {n}; for (int i = 0; i < n; i++) \
                 s += p[i] * {n} ^ (s >> 3); return s; }}\n"
            )
        })
        .collect();
    fs::write(dir.file("large.c"), source).expect("a source");
    let path = Command::new("gcc")
        .arg("-print-prog-name=cc1")
        .output()
        .expect("gcc");
    let path = String::from_utf8(path.stdout).expect("a path");
    let words = [path.trim(), "-quiet", "-O2", "large.c", "-o", "large.s"];
    expect("cc1", &command(&dir, "64KiB", "cc1", &words), 300);
}

/// Check Debian's libLLVM: 107 MB of C++.
#[test]
fn llvm() {
    let target = target_with("llvm.c", &["-O2", "-fomit-frame-pointer"]);
    let summary = interpreter("4KiB", target.text(), &["10"]);
    expect("libLLVM", &summary, 1000);
}

/// Check Debian's git.
#[test]
fn git() {
    let dir = TempDir::new("oracle");
    let git = |words: &[&str]| {
        let status = Command::new("/usr/bin/git")
            .current_dir(dir.path())
            .args(["-c", "user.name=a", "-c", "user.email=a@b"])
            .args(words)
            .output()
            .expect("git");
        assert!(status.status.success(), "{words:?}");
    };
    git(&["init", "-q", "."]);
    for round in 0..40 {
        for file in 0..10 {
            let text: String = (0..200)
                .map(|line| format!("{}\n", line * round * file))
                .collect();
            fs::write(dir.path().join(format!("f{file}")), text).expect("a file");
        }
        git(&[
            "add", "f0", "f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9",
        ]);
        git(&["commit", "-q", "-m", "round"]);
    }
    let words = ["/usr/bin/git", "--no-pager", "log", "--stat", "-p"];
    expect("git", &command(&dir, "64KiB", "git", &words), 300);
}
