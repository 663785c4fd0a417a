use super::*;
use crate::process::{
    files::FileStore, info::ProcessInfo, mapping::MappingTable, maps::read_mappings,
};
use std::{
    fs,
    io::Read,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

/// Starts `command`, and gives back what it maps while it is held.
fn mappings_when_held(command: Command) -> (Launched, MappingTable) {
    let mut mappings = None;
    let launched = launch(command, |pid, _| {
        read_mappings(pid, &FileStore::default()).map(|table| mappings = Some(table))
    });
    (launched.unwrap(), mappings.unwrap())
}

fn maps_file(table: &MappingTable, name: &str) -> bool {
    table.iter().any(|mapping| mapping.name.contains(name))
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

/// A program that writes "constructor" before main, and "main" in it.
fn build(name: &str, options: &[&str]) -> PathBuf {
    let directory = std::env::temp_dir();
    let stem = format!("memprof-launch-{}-{name}", std::process::id());
    let source = directory.join(format!("{stem}.c"));
    let program = directory.join(stem);
    let code = "#include <unistd.h>\n\
        __attribute__((constructor)) void c(void) { write(1, \"constructor\", 11); }\n\
        int main(void) { write(1, \"main\", 4); return 0; }";
    fs::write(&source, code).unwrap();
    let status = Command::new("cc")
        .arg("-o")
        .args([&program, &source])
        .args(options)
        .status()
        .unwrap();
    assert!(status.success());
    fs::remove_file(source).unwrap();
    program
}

/// Check that a dynamic and a static program are held before their constructors
/// run, with the C library mapped, and then run to their end.
#[test]
fn held_before_constructors() {
    for (name, options) in [("dynamic", &[][..]), ("static", &["-static"][..])] {
        let program = build(name, options);
        let mut command = Command::new(&program);
        command.stdout(Stdio::piped());
        let (mut launched, table) = mappings_when_held(command);
        assert_eq!(launched.held(), Held::Loaded, "{name}");
        assert_eq!(maps_file(&table, "libc"), name == "dynamic");
        assert!(maps_file(&table, program.to_str().unwrap()));
        let mut output = String::new();
        let mut stdout = launched.child.stdout.take().unwrap();
        stdout.read_to_string(&mut output).unwrap();
        assert_eq!(output, "constructormain");
        assert!(launched.wait().unwrap().success());
        fs::remove_file(program).unwrap();
    }
}

/// Check that nothing the program writes is there while it is held.
#[test]
fn silent_while_held() {
    let program = build("silent", &[]);
    let (reader, writer) = io::pipe().unwrap();
    let mut command = Command::new(&program);
    command.stdout(writer);
    let mut launched = launch(command, |_, _| {
        let mut fds = [rustix::event::PollFd::new(
            &reader,
            rustix::event::PollFlags::IN,
        )];
        let wait = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        match rustix::event::poll(&mut fds, Some(&wait)) {
            Ok(0) => Ok(()),
            _ => Err(io::Error::other("the program ran")),
        }
    })
    .unwrap();
    assert!(launched.wait().unwrap().success());
    fs::remove_file(program).unwrap();
}

/// Check that a preloaded allocator and all needed libraries are mapped when the
/// program is held.
#[test]
fn preloaded_library_is_mapped() {
    let mut command = Command::new("/bin/true");
    command.env("LD_PRELOAD", "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2");
    let (mut launched, table) = mappings_when_held(command);
    assert!(maps_file(&table, "libjemalloc.so.2") && maps_file(&table, "libc.so.6"));
    assert!(maps_file(&table, "libstdc++"), "jemalloc needs it");
    assert!(launched.wait().unwrap().success());
}

/// Check that exit codes and fatal signals come back as a shell would tell them,
/// and that the shell's own children run untraced.
#[test]
fn statuses() {
    let code = |script| {
        let mut launched = launch(shell(script), |_, _| Ok::<_, io::Error>(())).unwrap();
        exit_code(launched.wait().unwrap())
    };
    assert_eq!(code("exit 3"), 3);
    assert_eq!(code("kill -TERM $$"), 128 + 15);
    assert_eq!(code("kill -TRAP $$"), 128 + 5);
    assert_eq!(code("/bin/true && ! /bin/false"), 0);
}

/// Check that a missing command, one that is not executable, and a directory are
/// told apart by the codes that shells use.
#[test]
fn not_a_command() {
    let start = |name| launch(Command::new(name), |_, _| Ok::<_, io::Error>(())).unwrap_err();
    let missing = start("/no/such/command");
    assert!(matches!(missing, LaunchError::NotFound { .. }));
    assert_eq!(missing.exit_code(), 127);
    assert_eq!(start("no-such-command-at-all").exit_code(), 127);
    let plain = start("/etc/passwd");
    assert!(matches!(plain, LaunchError::NotExecutable { .. }));
    assert_eq!(plain.exit_code(), 126);
    assert_eq!(start("/etc").exit_code(), 126);
}

/// Check that a command is killed and reaped if what is to be done while it is
/// held fails.
#[test]
fn failure_while_held() {
    let mut pid = 0;
    let error = launch(shell("sleep 60"), |held, _| {
        pid = held;
        Err(io::Error::other("probes do not fit"))
    })
    .unwrap_err();
    assert!(matches!(error, LaunchError::OnLoaded(_)));
    assert!(ProcessInfo::read(pid).is_err());
}

/// Check that a signal sent while the command is held takes effect when it is
/// let go, and that a stop signal does so too.
#[test]
fn signals_while_held() {
    let send = |signal| {
        move |pid: u32, _| signal::kill(Pid::from_raw(pid as i32), signal).map_err(io::Error::from)
    };
    let mut launched = launch(shell("sleep 60"), send(Signal::SIGTERM)).unwrap();
    assert_eq!(exit_code(launched.wait().unwrap()), 128 + 15);

    let mut launched = launch(shell("exit 4"), send(Signal::SIGSTOP)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let stat = format!("/proc/{}/stat", launched.pid());
    while !fs::read_to_string(&stat).unwrap().contains(") T ") {
        assert!(Instant::now() < deadline, "never stopped");
    }
    send(Signal::SIGCONT)(launched.pid(), Held::Loaded).unwrap();
    assert_eq!(launched.wait().unwrap().code(), Some(4));

    let killed = launch(shell("sleep 60"), send(Signal::SIGKILL)).unwrap();
    let mut killed = killed;
    assert_eq!(exit_code(killed.wait().unwrap()), 128 + 9);
}

/// Check that the command sees no blocked signal and no ignored SIGPIPE, is not
/// traced any more, and inherits the rest.
#[test]
fn looks_as_from_a_shell() {
    let mut command = Command::new("/bin/cat");
    command.arg("/proc/self/status").stdout(Stdio::piped());
    let mut launched = launch(command, |_, _| Ok::<_, io::Error>(())).unwrap();
    let mut status = String::new();
    let mut stdout = launched.child.stdout.take().unwrap();
    stdout.read_to_string(&mut status).unwrap();
    launched.wait().unwrap();
    let field = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    assert_eq!(field("SigBlk:"), "0000000000000000");
    assert_eq!(field("TracerPid:"), "0");
    let ignored = u64::from_str_radix(&field("SigIgn:"), 16).unwrap();
    assert_eq!(ignored >> (Signal::SIGPIPE as u32 - 1) & 1, 0);
}

/// Check that the end of a launched command is seen through its watch.
#[tokio::test]
async fn watch_tells_the_end() {
    let launched = tokio::task::spawn_blocking(|| {
        launch(shell("exit 5"), |_, _| Ok::<_, io::Error>(())).unwrap()
    });
    let mut launched = launched.await.unwrap();
    launched.watch().exited().await.unwrap();
    let status = launched.try_wait().unwrap().unwrap();
    assert_eq!(status.code(), Some(5));
}

/// Check that a program that never sets up a thread is let go at its end.
#[test]
fn program_without_c_library() {
    let directory = std::env::temp_dir();
    let stem = directory.join(format!("memprof-launch-{}-bare", std::process::id()));
    let source = stem.with_extension("c");
    let code = "void _start(void) { __asm__ volatile (\"syscall\" :: \"a\"(60), \"D\"(6)); }";
    fs::write(&source, code).unwrap();
    let status = Command::new("cc")
        .args(["-static", "-nostdlib", "-o"])
        .args([&stem, &source])
        .status()
        .unwrap();
    assert!(status.success());
    let mut launched = launch(Command::new(&stem), |_, _| Ok::<_, io::Error>(())).unwrap();
    assert_eq!(launched.held(), Held::BeforeSyscall(60));
    assert_eq!(launched.wait().unwrap().code(), Some(6));
    fs::remove_file(&stem).unwrap();
    fs::remove_file(&source).unwrap();
}
