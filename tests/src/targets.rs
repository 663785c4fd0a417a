//! Builds the programs in `targets/`.
//!
//! A built program is named after a hash of everything it was built from, and
//! moved into its place when it is complete: tests, and test processes, can build
//! at the same time and never see half a program or yesterday's.

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::{Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::memprof::profile_dir;

const C_FLAGS: &[&str] = &[
    "-g",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fno-optimize-sibling-calls",
    "-pthread",
    "-Wall",
];
const RUST_FLAGS: &[&str] = &[
    "--edition=2021",
    "-g",
    "-Copt-level=1",
    "-Cforce-frame-pointers=yes",
];
const GO_FLAGS: &[&str] = &["build"];

/// The `go` that programs in Go are built with: `MEMPROF_GO`, for those that Debian has not.
#[must_use]
pub fn go() -> String {
    std::env::var("MEMPROF_GO").unwrap_or_else(|_| "go".to_owned())
}

/// A built program.
#[derive(Clone, Debug)]
pub struct Target(PathBuf);

impl Target {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where it is, as text.
    #[must_use]
    pub fn text(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }

    /// A command that runs it with `args`.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.0);
        command.args(args);
        command
    }
}

/// Builds `targets/<file>`, if that has not been done.
#[must_use]
pub fn target(file: &str) -> Target {
    build(file, &[])
}

/// Builds `targets/<file>` without a C library.
#[must_use]
pub fn freestanding(file: &str) -> Target {
    build(
        file,
        &[
            "-static",
            "-nostdlib",
            "-ffreestanding",
            "-no-pie",
            "-fno-stack-protector",
        ],
    )
}

/// Builds `targets/<file>` with more flags for the compiler, which come last and win.
#[must_use]
pub fn target_with(file: &str, flags: &[&str]) -> Target {
    build(file, flags)
}

/// Copies a program that is to be run. Not by this process: what another test starts at that
/// moment would hold the copy open for writing, and such a file cannot be run (`ETXTBSY`).
pub fn copy_program(from: &Path, to: &Path) {
    let status = Command::new("cp").arg(from).arg(to).status();
    assert!(
        status.expect("cp").success(),
        "cannot copy {}",
        from.display()
    );
}

/// Builds `targets/<file>` as a shared library.
#[must_use]
pub fn shared_library(file: &str) -> Target {
    build(file, &["-shared", "-fPIC", "-fno-builtin"])
}

fn build(file: &str, more: &[&str]) -> Target {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("targets");
    let (stem, kind) = file.rsplit_once('.').expect("a file with an extension");
    let (compiler, flags) = match kind {
        "c" => ("cc".to_owned(), C_FLAGS),
        "cpp" => ("c++".to_owned(), C_FLAGS),
        "rs" => ("rustc".to_owned(), RUST_FLAGS),
        "go" => (go(), GO_FLAGS),
        _ => panic!("no compiler for {file}"),
    };

    let mut hasher = DefaultHasher::new();
    (&compiler, flags, more, &sources).hash(&mut hasher);
    for part in [file, "target.h", "threads.h"] {
        let content = fs::read(sources.join(part));
        content
            .unwrap_or_else(|error| panic!("targets/{part}: {error}"))
            .hash(&mut hasher);
    }

    let dir = profile_dir().join("../e2e-targets");
    fs::create_dir_all(&dir).expect("a directory for the targets");
    let dir = dir.canonicalize().expect("a directory for the targets");
    let path = dir.join(format!("{stem}-{:016x}", hasher.finish()));
    if !path.exists() {
        compile(&compiler, flags, more, &sources.join(file), &path);
    }
    Target(path)
}

fn compile(compiler: &str, flags: &[&str], more: &[&str], source: &Path, path: &Path) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // No dot in it: rustc takes what follows for an extension.
    let unfinished = path.with_file_name(format!("unfinished-{}-{number}", process::id()));
    let cache = path.with_file_name("go-cache");
    let output = Command::new(compiler)
        // Of Go only: a file is a program by itself, and nothing is fetched.
        .env("GO111MODULE", "off")
        .env("GOTOOLCHAIN", "local")
        .env("GOFLAGS", "")
        .env("GOCACHE", cache)
        .args(flags)
        .args(more)
        .arg("-o")
        .arg(&unfinished)
        .arg(source)
        .output()
        .unwrap_or_else(|error| panic!("the tests need {compiler}: {error}"));
    assert!(
        output.status.success(),
        "{compiler} {}:\n{}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    fs::rename(&unfinished, path).expect("moving a target into its place");
}

/// A package in `targets/`, built by cargo.
#[derive(Clone, Debug)]
pub struct Package {
    /// Its program.
    pub program: Target,
    /// What its build has left.
    pub build_dir: PathBuf,
}

/// Builds the package `targets/<name>`, which has a program of that name.
#[must_use]
pub fn package(name: &str) -> Package {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("targets")
        .join(name);
    let dir = profile_dir().join("../e2e-packages");
    fs::create_dir_all(&dir).expect("a directory for the packages");
    let dir = dir.canonicalize().expect("a directory for the packages");
    let output = Command::new("cargo")
        .args(["build", "--release", "--locked", "--target-dir"])
        .arg(&dir)
        .current_dir(&sources)
        // What cargo tells the tests of their own package.
        .env_remove("RUSTFLAGS")
        .output()
        .expect("the tests need cargo");
    assert!(
        output.status.success(),
        "cargo build in {}:\n{}",
        sources.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let build_dir = dir.join("release");
    Package {
        program: Target(build_dir.join(name)),
        build_dir,
    }
}
