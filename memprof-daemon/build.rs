//! Embeds the prebuilt BPF object, and refuses one that is older than its
//! sources: a daemon whose two sides disagree on their records would read
//! nonsense. Where it comes from goes into the long form of the version.

#[path = "../xtask/src/provenance.rs"]
mod provenance;
#[path = "../xtask/src/source_hash.rs"]
mod source_hash;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use provenance::Provenance;
use source_hash::{HASHED_PATHS, sha256, source_hash};

/// What mends every error here.
const MEND: &str = "run: cargo xtask ebpf";

/// Turns a stale object into a warning, so that one can work on the daemon in
/// the middle of a change to the BPF program, without a BPF toolchain.
const SKIP: &str = "MEMPROF_SKIP_BPF_CHECK";

fn main() -> ExitCode {
    match embed() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn embed() -> Result<(), String> {
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let workspace = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("..");
    let prebuilt = workspace.join("memprof-ebpf/prebuilt");
    let object = prebuilt.join("memprof.bpf.o");
    let provenance = prebuilt.join("PROVENANCE.toml");

    println!("cargo::rerun-if-env-changed={SKIP}");
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rerun-if-changed={}", provenance.display());
    // cargo looks into directories, too.
    for path in HASHED_PATHS.iter().chain(&["Cargo.lock", "Cargo.toml"]) {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }

    let bytes =
        fs::read(&object).map_err(|error| format!("{}: {error}\n{MEND}", object.display()))?;
    let origin = match check(&workspace, &provenance, &bytes) {
        Ok(recorded) => describe(&recorded),
        Err(reason) if env::var_os(SKIP).is_none() => return Err(format!("{reason}\n{MEND}")),
        Err(reason) => {
            println!("cargo::warning={reason}; embedded all the same, since {SKIP} is set");
            format!(
                "BPF object  sha256 {}\n            {reason}",
                sha256(&bytes)
            )
        }
    };
    let version = format!("{}\n\n{origin}", variable("CARGO_PKG_VERSION")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    for (name, key, content) in [
        ("memprof.bpf.o", "MEMPROF_BPF_OBJECT", bytes.as_slice()),
        ("version.txt", "MEMPROF_LONG_VERSION", version.as_bytes()),
    ] {
        let path = out.join(name);
        fs::write(&path, content).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("cargo::rustc-env={key}={}", path.display());
    }
    Ok(())
}

/// What the long form of the version says of the object.
fn describe(recorded: &Provenance) -> String {
    [
        format!("BPF object  sha256 {}", recorded.object_sha256),
        format!("sources     sha256 {}", recorded.source_sha256),
        format!("compiler    {}", recorded.compiler),
        format!("LLVM        {}", recorded.llvm),
        format!("linker      {}", recorded.linker),
    ]
    .join("\n")
}

fn check(workspace: &Path, provenance: &Path, object: &[u8]) -> Result<Provenance, String> {
    let name = provenance.display();
    let text = fs::read_to_string(provenance).map_err(|error| format!("{name}: {error}"))?;
    let recorded = Provenance::parse(&text).map_err(|key| format!("{name} lacks {key}"))?;
    if sha256(object) != recorded.object_sha256 {
        return Err(format!(
            "the prebuilt BPF object is not the one {name} describes"
        ));
    }
    let sources = source_hash(workspace).map_err(|error| error.to_string())?;
    if sources != recorded.source_sha256 {
        return Err("the prebuilt BPF object is older than its sources".into());
    }
    Ok(recorded)
}
