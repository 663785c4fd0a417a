//! `memprof daemon --dump-every`: profiles written by themselves.

use std::{fs, path::Path};

use memprof_tests::{Daemon, Profile, Running, TempDir, daemon::eventually, target};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

fn holder() -> Running {
    let hold = Running::spawn(&mut target("hold.c").command(&["10", "100"]));
    hold.wait_stdout(|line| line == "ready");
    hold
}

/// The complete files in a directory, oldest name first.
fn files(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("the directory of dumps");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .path()
                .to_str()
                .expect("UTF-8")
                .to_owned()
        })
        .collect();
    names.sort();
    names
}

fn dump_dir(dir: &TempDir) -> String {
    let dumps = dir.file("dumps");
    fs::create_dir(&dumps).expect("a directory for dumps");
    dumps
}

/// Check that dumps come by themselves, that only as many stay as were asked for,
/// and that the last one is of the end.
#[test]
fn periodic_and_last() {
    let dir = TempDir::new("dumps");
    let dumps = dump_dir(&dir);
    let mut hold = holder();
    let options = [
        "--dump-every",
        "1",
        "--dump-dir",
        &dumps,
        "--dump-keep",
        "2",
        "--dump-format",
        "json",
    ];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    eventually(|| (files(&dumps).len() == 2).then_some(()));
    let early = files(&dumps);
    // The early ones are removed for later ones.
    eventually(|| {
        early
            .iter()
            .all(|file| !Path::new(file).exists())
            .then_some(())
    });
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    daemon.stop();

    let last = files(&dumps);
    assert_eq!(last.len(), 2, "{last:?}");
    for file in &last {
        assert!(file.ends_with(".json"), "{file}");
        let _ = Profile::read(file);
    }
    let profile = Profile::read(&last[1]);
    assert_eq!(
        profile.process().totals().alloc_objects,
        10,
        "the last dump is of the end"
    );
}

/// Check that there is a last dump also if the period was never over, in the
/// format asked for.
#[test]
fn last_only() {
    let dir = TempDir::new("dumps");
    for (format, extension) in [("pprof", ".pb.gz"), ("folded", ".folded"), ("text", ".txt")] {
        let dumps = dir.file(format);
        fs::create_dir(&dumps).expect("a directory for dumps");
        let mut hold = holder();
        let options = [
            "--dump-every",
            "3600",
            "--dump-dir",
            &dumps,
            "--dump-format",
            format,
        ];
        let daemon = Daemon::start(&dir, &[hold.pid()], &options);
        hold.send("go");
        hold.wait_stdout(|line| line == "done");
        daemon.stop();
        let files = files(&dumps);
        assert_eq!(files.len(), 1, "{files:?}");
        assert!(files[0].ends_with(extension), "{files:?}");
        assert!(fs::metadata(&files[0]).expect("the dump").len() > 0);
    }
}

/// Check that `-` as directory writes to stdout.
#[test]
fn to_stdout() {
    let dir = TempDir::new("dumps");
    let mut hold = holder();
    let options = [
        "--dump-every",
        "3600",
        "--dump-dir",
        "-",
        "--dump-format",
        "json",
    ];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    let finished = daemon.stop();
    let profile = Profile::parse(&finished.stdout_bytes);
    assert_eq!(profile.process().totals().alloc_objects, 10);
}

/// A file system of one page.
struct TinyDisk(String);

impl TinyDisk {
    fn mount(path: String) -> Self {
        mount(
            Some("none"),
            path.as_str(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=4k"),
        )
        .expect("mounting a tmpfs");
        Self(path)
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.as_str(), MntFlags::MNT_DETACH);
    }
}

/// Check that a full disk is said, leaves nothing half-written, and ends nothing.
#[test]
fn full_disk() {
    let dir = TempDir::new("dumps");
    let disk = TinyDisk::mount(dump_dir(&dir));
    let filler = format!("{}/filler", disk.0);
    fs::write(&filler, vec![0; 4096]).expect("filling the disk");
    let mut hold = holder();
    let options = [
        "--dump-every",
        "1",
        "--dump-dir",
        &disk.0,
        "--dump-format",
        "json",
    ];
    let daemon = Daemon::start(&dir, &[hold.pid()], &options);
    hold.send("go");
    hold.wait_stdout(|line| line == "done");
    daemon
        .running
        .wait_stderr(|line| line.contains("No space left on device"));
    assert_eq!(daemon.get("/healthz").status, 200);
    let profile = daemon.profile_when(hold.pid(), |profile| {
        profile.process().totals().alloc_objects == 10
    });
    assert!(!profile.process().exited);
    daemon.stop();
    assert_eq!(
        files(&disk.0),
        [filler],
        "a dump that did not fit is removed"
    );
}

/// Check that a directory that is not there is an error before anything begins.
#[test]
fn no_directory() {
    let dir = TempDir::new("dumps");
    let hold = holder();
    let mut command = memprof_tests::memprof(&["daemon", "--socket", &dir.file("memprof.sock")]);
    command.args(["--dump-every", "1", "--dump-dir", &dir.file("none")]);
    command.args(["-p", &hold.pid().to_string()]);
    let finished = Running::spawn(&mut command).finish();
    finished.expect_code(1).expect_stderr(&["none"]);
}
