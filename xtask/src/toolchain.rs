//! Finds a toolchain that can build BPF programs.
//!
//! A program for `bpfel-unknown-none` needs a `core` for that target, which no
//! stable toolchain of rustup has. Two others do: a nightly that builds `core`
//! from its `rust-src` component, and Debian's `rustc-web`, which comes with one
//! ready-made.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// The LLVM that `bpf-linker` 0.10 is made for: the compiler's bitcode and the
/// library that the linker loads must both be of it.
const LLVM_MAJOR: &str = "22";

const TARGET: &str = "bpfel-unknown-none";

const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";

/// How a machine without a BPF toolchain gets one.
const MEND: &str = "\
install one of them:
  Debian:  apt-get install rustc-web cargo-web libstd-rust-web-dev-bpf
  rustup:  rustup toolchain install nightly --component rust-src   (a nightly of LLVM 22)
and the linker:
           cargo install bpf-linker@0.10.3 --locked";

enum Kind {
    Nightly,
    Debian,
}

/// A compiler for BPF, and what belongs to it.
pub(crate) struct Toolchain {
    kind: Kind,
    /// `rustc --version`.
    pub(crate) compiler: String,
    /// The version of its LLVM.
    pub(crate) llvm: String,
    /// `bpf-linker --version`.
    pub(crate) linker: String,
    /// The directory of the linker.
    linker_directory: PathBuf,
    /// A directory that holds the LLVM for the linker.
    llvm_library: PathBuf,
    sysroot: PathBuf,
}

impl Toolchain {
    /// The first toolchain that works here.
    ///
    /// # Errors
    ///
    /// None is there: why each was not taken, and how to install one.
    pub(crate) fn find() -> Result<Self> {
        let mut rejected = Vec::new();
        let mut report = |name: &str, error: anyhow::Error| {
            rejected.push(format!("  {name}: {error:#}"));
        };
        let (linker_directory, linker) = match find_linker() {
            Ok(found) => found,
            Err(error) => {
                report("bpf-linker", error);
                (PathBuf::new(), String::new())
            }
        };
        let found = nightly().map_err(|error| report("rustup's nightly", error));
        let found = found.or_else(|()| debian().map_err(|error| report("Debian's rustc", error)));
        match found {
            Ok(toolchain) if !linker.is_empty() => Ok(Self {
                linker_directory,
                linker,
                ..toolchain
            }),
            _ => bail!(
                "no toolchain that builds BPF programs\n{}\n{MEND}",
                rejected.join("\n")
            ),
        }
    }

    /// `cargo build` for the BPF target, to be completed by what to build.
    /// `target` is the target directory to use.
    pub(crate) fn cargo_build(&self, workspace: &Path, target: &Path) -> Result<Command> {
        let mut command = match self.kind {
            Kind::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
                command
            }
            Kind::Debian => {
                let mut command = Command::new(DEBIAN_CARGO);
                command.arg("build").env("RUSTC", DEBIAN_RUSTC).env(
                    // The two crates that use unstable features, and no other.
                    "RUSTC_BOOTSTRAP",
                    "aya_ebpf,memprof_ebpf",
                );
                command
            }
        };
        let mut path = env::var_os("PATH").unwrap_or_default();
        path.push(":");
        path.push(&self.linker_directory);
        command
            .args(["--release", "--locked", "--target", TARGET])
            .current_dir(workspace)
            .env("PATH", path)
            .env("LD_LIBRARY_PATH", self.private_llvm(target)?)
            .env("CARGO_TARGET_DIR", target)
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags(workspace, target))
            // Set by the cargo that runs this program, for its own toolchain.
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("CARGO");
        if matches!(self.kind, Kind::Nightly) {
            command.env_remove("RUSTC");
        }
        Ok(command)
    }

    /// No path of this machine may get into the object, or it would be another
    /// one in each checkout.
    fn flags(&self, workspace: &Path, target: &Path) -> String {
        let cargo_home = env::var_os("CARGO_HOME").map_or_else(
            || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
            PathBuf::from,
        );
        // The last one that matches wins: the narrower path after the wider.
        [
            (cargo_home.as_path(), "/cargo"),
            (self.sysroot.as_path(), "/rust"),
            (workspace, "/memprof"),
            (target, "/target"),
        ]
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
        .join("\u{1f}")
    }

    /// A directory with the LLVM for the linker and no other library: the
    /// linker takes the first LLVM it meets, and a system directory may hold
    /// several.
    fn private_llvm(&self, target: &Path) -> Result<PathBuf> {
        let directory = target.join("llvm");
        fs::create_dir_all(&directory)?;
        let name = self.llvm_library.file_name().context("no file name")?;
        let link = directory.join(name);
        if fs::read_link(&link).ok().as_ref() != Some(&self.llvm_library) {
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(&self.llvm_library, &link)
                .with_context(|| format!("link {}", link.display()))?;
        }
        Ok(directory)
    }
}

fn find_linker() -> Result<(PathBuf, String)> {
    let path = env::var_os("PATH").unwrap_or_default();
    let home = PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo/bin");
    let directory = env::split_paths(&path)
        .chain([home])
        .find(|directory| directory.join("bpf-linker").is_file())
        .context("not in PATH")?;
    let version = output(Command::new(directory.join("bpf-linker")).arg("--version"))?;
    if !version.starts_with("bpf-linker 0.10.") {
        bail!("{version} is not 0.10, the version for LLVM {LLVM_MAJOR}");
    }
    Ok((directory, version))
}

fn nightly() -> Result<Toolchain> {
    let rustc = || {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "rustc"]);
        command
    };
    let sysroot = PathBuf::from(output(rustc().args(["--print", "sysroot"]))?);
    if !sysroot
        .join("lib/rustlib/src/rust/library/core/src/lib.rs")
        .is_file()
    {
        bail!("has no rust-src component");
    }
    let (compiler, llvm) = version(&mut rustc())?;
    let llvm_library = find_llvm(&[sysroot.join("lib")])?;
    Ok(Toolchain {
        kind: Kind::Nightly,
        compiler,
        llvm,
        linker: String::new(),
        linker_directory: PathBuf::new(),
        llvm_library,
        sysroot,
    })
}

fn debian() -> Result<Toolchain> {
    let rustc = || Command::new(DEBIAN_RUSTC);
    if !Path::new(DEBIAN_CARGO).is_file() {
        bail!("there is no {DEBIAN_CARGO}");
    }
    let libraries = output(rustc().args(["--print", "target-libdir", "--target", TARGET]))?;
    let has_core = fs::read_dir(&libraries).is_ok_and(|mut entries| {
        entries.any(|entry| {
            entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
        })
    });
    if !has_core {
        bail!("has no core library for {TARGET} in {libraries}");
    }
    let (compiler, llvm) = version(&mut rustc())?;
    // Debian's own LLVM; rustup's stable has the same at times.
    let mut places = Vec::new();
    for entry in fs::read_dir("/usr/lib")?.flatten() {
        if entry.file_name().to_string_lossy().ends_with("-linux-gnu") {
            places.push(entry.path());
        }
    }
    places.push(PathBuf::from(format!("/usr/lib/llvm-{LLVM_MAJOR}/lib")));
    if let Ok(sysroot) = output(Command::new("rustc").args(["--print", "sysroot"])) {
        places.push(PathBuf::from(sysroot).join("lib"));
    }
    let llvm_library = find_llvm(&places)?;
    Ok(Toolchain {
        kind: Kind::Debian,
        compiler,
        llvm,
        linker: String::new(),
        linker_directory: PathBuf::new(),
        llvm_library,
        sysroot: PathBuf::from(output(rustc().args(["--print", "sysroot"]))?).join("lib/rustlib"),
    })
}

/// Version of the compiler and of its LLVM.
fn version(rustc: &mut Command) -> Result<(String, String)> {
    let text = output(rustc.arg("-vV"))?;
    let compiler = text.lines().next().unwrap_or_default().to_owned();
    let llvm = text
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .context("rustc does not say which LLVM it has")?;
    if llvm.split('.').next() != Some(LLVM_MAJOR) {
        bail!("{compiler} has LLVM {llvm}; bpf-linker 0.10 reads the bitcode of LLVM {LLVM_MAJOR}");
    }
    Ok((compiler, llvm.to_owned()))
}

/// The shared library of LLVM itself, not a link to it.
fn find_llvm(places: &[PathBuf]) -> Result<PathBuf> {
    for place in places {
        let Ok(entries) = fs::read_dir(place) else {
            continue;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(&format!("libLLVM.so.{LLVM_MAJOR}"))
                || name.starts_with(&format!("libLLVM-{LLVM_MAJOR}"))
            {
                return Ok(fs::canonicalize(entry.path())?);
            }
        }
    }
    let places: Vec<_> = places
        .iter()
        .map(|place| place.display().to_string())
        .collect();
    bail!("no libLLVM {LLVM_MAJOR} in {}", places.join(", "))
}

/// Standard output of a command that must succeed, without the last newline.
fn output(command: &mut Command) -> Result<String> {
    let result = command
        .env_remove("RUSTUP_TOOLCHAIN")
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !result.status.success() {
        let reason = String::from_utf8_lossy(&result.stderr);
        bail!("{}", reason.lines().next().unwrap_or("failed").trim());
    }
    Ok(String::from_utf8_lossy(&result.stdout)
        .trim_end()
        .to_owned())
}
