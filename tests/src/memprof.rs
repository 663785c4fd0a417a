//! The program under test.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// A command that runs `memprof` with `args`. Fails the test unless it is root
/// that runs it.
#[must_use]
pub fn memprof<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Command {
    require_root();
    let mut command = Command::new(binary());
    command.args(args);
    // What the user has set for other runs.
    for name in [
        "MEMPROF_SAMPLE_INTERVAL",
        "MEMPROF_FUNCTION",
        "MEMPROF_FREE_FUNCTION",
        "MEMPROF_CHILDREN",
        "DEBUGINFOD_URLS",
        "DEBUGINFOD_CACHE_PATH",
        "DEBUGINFOD_TIMEOUT",
        "DEBUGINFOD_MAXTIME",
        "DEBUGINFOD_MAXSIZE",
    ] {
        command.env_remove(name);
    }
    // Servers of the tests are on loopback.
    command.env("NO_PROXY", "127.0.0.1");
    command
}

/// Fails the test unless root runs it.
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "the end-to-end tests load BPF programs into the running kernel: run them as root"
    );
}

/// The binary: `$MEMPROF_BIN`, or else the one that cargo builds beside the
/// tests.
#[must_use]
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match env::var_os("MEMPROF_BIN") {
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(path.is_file(), "MEMPROF_BIN: no file {}", path.display());
            path
        }
        None => build(),
    })
}

/// The directory of the profile that the tests were built in: `target/debug`.
#[must_use]
pub fn profile_dir() -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    // target/debug/deps/test-0123456789abcdef
    let dir = test.parent().and_then(Path::parent);
    dir.expect("a test in target/*/deps").to_owned()
}

/// `cargo test` builds no other package's binaries, and one that is there may be
/// of yesterday's sources: let cargo decide.
fn build() -> PathBuf {
    let dir = profile_dir();
    let profile = match dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--package",
            "memprof-daemon",
            "--bin",
            "memprof",
        ])
        .args(["--profile", profile])
        .arg("--target-dir")
        .arg(dir.parent().expect("a target directory"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .output()
        .expect("cannot run cargo");
    assert!(
        output.status.success(),
        "cannot build memprof:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    dir.join("memprof")
}
