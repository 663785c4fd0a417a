//! Bad input: a clear error, a status that is not 0, and nothing half-done.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use memprof_tests::{
    Finished, Running, TempDir,
    memprof::{self, memprof},
    target,
    targets::{copy_program, freestanding},
};

fn run(args: &[&str]) -> Finished {
    let finished = Running::spawn(&mut memprof(args)).finish();
    finished.expect_no_panic();
    finished
}

/// `memprof record -d 5 -p PID -o FILE`
fn record(pid: u32, dir: &TempDir) -> Finished {
    let file = dir.file("profile.json");
    let finished = run(&["record", "-d", "5", "-o", &file, "-p", &pid.to_string()]);
    if finished.code() != 0 {
        assert!(!Path::new(&file).exists(), "half a profile: {finished}");
    }
    finished
}

/// A process that has no output of ours to wait for. Killed when dropped.
struct Bystander(Child);

impl Bystander {
    fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Self(child.unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Check that a process id that nobody has is an error that names it.
#[test]
fn no_such_process() {
    let dir = TempDir::new("errors");
    // Above the largest the kernel gives out: PID_MAX_LIMIT is 2^22.
    let finished = record(4_194_305, &dir);
    finished.expect_code(1).expect_stderr(&["4194305"]);
    run(&["daemon", "--socket", &dir.file("s"), "-p", "4194305"])
        .expect_code(1)
        .expect_stderr(&["4194305"]);
}

/// Check that a process that has exited but is not yet waited for is an error.
#[test]
fn zombie() {
    let dir = TempDir::new("errors");
    let zombie = Bystander::start(&mut Command::new("true"));
    let stat = format!("/proc/{}/stat", zombie.0.id());
    memprof_tests::daemon::eventually(|| {
        fs::read_to_string(&stat)
            .expect("its state")
            .contains(") Z ")
            .then_some(())
    });
    record(zombie.0.id(), &dir).expect_code(1);
}

/// Check that one bad process among good ones is an error before anything is
/// recorded.
#[test]
fn one_of_several() {
    let dir = TempDir::new("errors");
    let file = dir.file("profile.json");
    let hold = Running::spawn(&mut target("hold.c").command(&[]));
    hold.wait_stdout(|line| line == "ready");
    let pid = hold.pid().to_string();
    let finished = run(&[
        "record", "-d", "5", "-o", &file, "-p", &pid, "-p", "4194305",
    ]);
    finished.expect_code(1).expect_stderr(&["4194305"]);
    assert!(!Path::new(&file).exists());
}

/// Check that without privileges each command says which are needed.
#[test]
fn not_root() {
    let dir = TempDir::new("errors");
    let binary = dir.file("memprof");
    memprof::require_root();
    copy_program(memprof::binary(), binary.as_ref());
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).expect("its permissions");
    let hold = Running::spawn(&mut target("hold.c").command(&[]));
    hold.wait_stdout(|line| line == "ready");
    let pid = hold.pid().to_string();
    let socket = dir.file("memprof.sock");
    let commands: [&[&str]; 3] = [
        &["record", "-d", "5", "-o", "-", "-p", &pid],
        &["daemon", "--socket", &socket, "-p", &pid],
        &["record", "--", "true"],
    ];
    for arguments in commands {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", &binary])
            .args(arguments);
        let finished = Running::spawn(&mut command).finish();
        finished.expect_code(1).expect_stderr(&["root", "CAP_"]);
    }
}

/// Check that a target without an allocator is an error that says what was looked
/// for.
#[test]
fn no_allocator() {
    let dir = TempDir::new("errors");
    let program = Running::spawn(&mut freestanding("no_allocator.c").command(&[]));
    program.wait_stdout(|line| line == "ready");
    record(program.pid(), &dir)
        .expect_code(1)
        .expect_stderr(&["malloc"]);
}

/// A program for 32-bit x86 that does nothing but wait for signals: an ELF
/// header, one program header, and `pause` in a loop.
fn pause_32_bit() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    // mov $29, %eax; int $0x80; jmp back
    const CODE: &[u8] = &[0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let size = HEADERS + u32::try_from(CODE.len()).expect("few bytes");

    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    half(&mut file, 2); // ET_EXEC
    half(&mut file, 3); // EM_386
    word(&mut file, 1); // EV_CURRENT
    word(&mut file, BASE + HEADERS); // entry
    word(&mut file, 52); // program headers
    word(&mut file, 0); // no section headers
    word(&mut file, 0); // flags
    for value in [52, 32, 1, 40, 0, 0] {
        half(&mut file, value);
    }
    // PT_LOAD of the whole file, readable and executable.
    for value in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        word(&mut file, value);
    }
    file.extend(CODE);
    file
}

/// Check that a 32-bit target is refused, in these words.
#[test]
fn target_of_32_bits() {
    let dir = TempDir::new("errors");
    let program = dir.file("pause32");
    fs::write(&program, pause_32_bit()).expect("writing a program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("its permissions");
    let program = Bystander::start(&mut Command::new(&program));
    record(program.0.id(), &dir)
        .expect_code(1)
        .expect_stderr(&["32-bit"]);
}

/// Check that an output that cannot be written is said before the command runs.
#[test]
fn unwritable_output() {
    let dir = TempDir::new("errors");
    let ran = dir.file("ran");
    for output in [
        dir.file("none/profile.json"),
        dir.path().to_str().expect("UTF-8").to_owned(),
    ] {
        let finished = run(&["record", "-o", &output, "--", "touch", &ran]);
        finished.expect_code(1).expect_stderr(&[&output]);
        assert!(!Path::new(&ran).exists(), "the command ran: {finished}");
    }
    run(&[
        "record",
        "-o",
        &dir.file("profile.json"),
        "--",
        "touch",
        &ran,
    ])
    .expect_code(0);
    assert!(Path::new(&ran).exists());
}

/// Check that a command line that makes no sense is refused as such.
#[test]
fn usage() {
    let command_lines: &[&[&str]] = &[
        &["record", "-i", "-1", "--", "true"],
        &["record", "-i", "1.5.5", "--", "true"],
        &["record", "-i", "lots", "--", "true"],
        &["record", "-i", "5XB", "--", "true"],
        &["record", "-i", "", "--", "true"],
        &["record", "-i", "99999999999999999999999", "--", "true"],
        &["record", "-i", "1TiB", "--", "true"],
        &["record", "-d", "soon", "--", "true"],
        &["record", "-f", "xml", "--", "true"],
        &["record", "--stack-depth", "0", "--", "true"],
        &["record", "--stack-depth", "100000", "--", "true"],
        &["record", "--ring-size", "some", "--", "true"],
        &["record", "-p", "none"],
        &["record", "-p", "0"],
        &["record", "-p", "-1"],
        &["record", "-p", "1", "--", "true"],
        &["record"],
        &["daemon"],
        &["nothing"],
        &["record", "--nothing", "--", "true"],
        &[],
    ];
    for arguments in command_lines {
        let finished = run(arguments);
        finished.expect_code(2);
        assert!(!finished.stderr.is_empty(), "{finished}");
        assert!(finished.stdout.is_empty(), "{finished}");
    }
}

/// Check that a command that cannot be started ends with a shell's status.
#[test]
fn command_not_started() {
    let dir = TempDir::new("errors");
    let file = dir.file("profile.json");
    run(&["record", "-o", &file, "--", "/no/such/command"])
        .expect_code(127)
        .expect_stderr(&["/no/such/command"]);
    run(&["record", "-o", &file, "--", "no-such-command-in-the-path"]).expect_code(127);
    let script = dir.file("script");
    fs::write(&script, "#!/bin/sh\n").expect("writing a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o644)).expect("its permissions");
    run(&["record", "-o", &file, "--", &script])
        .expect_code(126)
        .expect_stderr(&[&script]);
}

/// Check that a process that exits while memprof attaches is an error or a
/// profile, and never more: with lives of many lengths, some end in every phase.
#[test]
fn exit_during_attach() {
    let dir = TempDir::new("errors");
    for milliseconds in (0..600).step_by(20) {
        let brief = Bystander::start(&mut target("brief.c").command(&[&milliseconds.to_string()]));
        let finished = record(brief.0.id(), &dir);
        assert!(
            [0, 1].contains(&finished.code()),
            "{milliseconds} ms: {finished}"
        );
        let file = dir.file("profile.json");
        if finished.code() == 0 {
            assert!(
                memprof_tests::Profile::read(&file).process().exited,
                "{finished}"
            );
            fs::remove_file(&file).expect("removing the profile");
        } else {
            assert!(!finished.stderr.is_empty(), "{finished}");
        }
    }
}

/// Check that `memprof check` says yes on a host that runs these tests, a line a
/// requirement, and names what is missing without privileges.
#[test]
fn check() {
    let finished = run(&["check"]);
    finished.expect_code(0);
    assert!(finished.stdout.lines().count() > 1, "{finished}");

    let dir = TempDir::new("errors");
    let binary = dir.file("memprof");
    copy_program(memprof::binary(), binary.as_ref());
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).expect("its permissions");
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        &binary,
        "check",
    ]);
    let finished = Running::spawn(&mut command).finish();
    finished.expect_code(1);
    let said = format!("{}{}", finished.stdout, finished.stderr);
    assert!(said.contains("root") || said.contains("CAP_"), "{finished}");
}
