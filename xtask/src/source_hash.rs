//! One hash over everything that the prebuilt BPF object is made from.
//!
//! Used by two programs: `cargo xtask ebpf` records the hash beside the object,
//! and the build script of `memprof-daemon` includes this very file to find out
//! whether the object is stale. So it knows nothing but the standard library and
//! `sha2`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// Files and directories, relative to the workspace, that are hashed whole. Of
/// `Cargo.lock` and `Cargo.toml` only the parts that the object depends on are,
/// so that a new version of an unrelated crate does not make it stale.
pub(crate) const HASHED_PATHS: &[&str] = &[
    "memprof-common/Cargo.toml",
    "memprof-common/src",
    "memprof-ebpf/Cargo.toml",
    "memprof-ebpf/src",
];

/// The crates that the BPF program links; what they depend on follows from the
/// lock file. `memprof-common`'s own entry is left out: it names `aya`, which
/// only the daemon uses.
const LOCKED_ROOTS: &[&str] = &["aya-ebpf", "aya-log-ebpf"];

/// The hash of the BPF program's sources in the workspace at `root`, in
/// hexadecimal.
///
/// # Errors
///
/// A source that cannot be read, or a lock file without the BPF crates.
pub(crate) fn source_hash(root: &Path) -> io::Result<String> {
    let mut files = BTreeSet::new();
    for path in HASHED_PATHS {
        collect(root, Path::new(path), &mut files)?;
    }
    let mut hasher = Sha256::new();
    for file in &files {
        // One spelling of a path on every system.
        let name: Vec<_> = file.iter().map(|part| part.to_string_lossy()).collect();
        add(&mut hasher, &name.join("/"), &read(root, file)?);
    }
    let lock = read(root, Path::new("Cargo.lock"))?;
    add(&mut hasher, "Cargo.lock", &locked(&lock)?);
    let manifest = read(root, Path::new("Cargo.toml"))?;
    add(&mut hasher, "Cargo.toml", &release_profile(&manifest));
    Ok(hex(&hasher.finalize()))
}

/// SHA-256 of `bytes`, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lengths first, so that no text can pass for two others.
fn add(hasher: &mut Sha256, name: &str, content: &str) {
    for part in [name, content] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
}

/// The text of a file; a checkout with Windows line endings hashes alike.
fn read(root: &Path, file: &Path) -> io::Result<String> {
    let path = root.join(file);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.replace("\r\n", "\n")),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", path.display()),
        )),
    }
}

fn collect(root: &Path, path: &Path, files: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    let whole = root.join(path);
    if !whole.is_dir() {
        files.insert(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(whole)? {
        let path = path.join(entry?.file_name());
        let is_source = path.extension().is_some_and(|extension| extension == "rs");
        // What editors leave behind is not a source.
        if is_source || root.join(&path).is_dir() {
            collect(root, &path, files)?;
        }
    }
    Ok(())
}

/// The entries of the lock file that the BPF program is built from.
fn locked(lock: &str) -> io::Result<String> {
    let mut entries: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for entry in lock.split("[[package]]").skip(1) {
        let name = entry
            .lines()
            .find_map(|line| line.strip_prefix("name = "))
            .map_or("", |name| name.trim_matches('"'));
        entries.entry(name).or_default().push(entry.trim());
    }
    let mut wanted = BTreeSet::new();
    let mut queue: VecDeque<&str> = LOCKED_ROOTS.iter().copied().collect();
    while let Some(name) = queue.pop_front() {
        let Some(found) = entries.get(name) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("Cargo.lock has no entry for {name}"),
            ));
        };
        if wanted.insert(name) {
            for entry in found {
                queue.extend(dependencies(entry));
            }
        }
    }
    let kept: Vec<_> = wanted
        .into_iter()
        .filter_map(|name| entries.get(name))
        .flatten()
        .copied()
        .collect();
    Ok(kept.join("\n\n"))
}

/// The names in an entry's `dependencies`. A version may follow a name, if the
/// lock file has several; then all of them are taken.
fn dependencies(entry: &str) -> impl Iterator<Item = &str> {
    entry
        .lines()
        .skip_while(|line| !line.starts_with("dependencies = ["))
        .skip(1)
        .take_while(|line| !line.starts_with(']'))
        .filter_map(|line| line.trim().trim_matches([',', '"']).split(' ').next())
}

/// The sections of the workspace manifest that set how the object is compiled.
fn release_profile(manifest: &str) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.starts_with("[profile.release");
        }
        if inside && !line.trim().is_empty() && !line.starts_with('#') {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = r#"
[[package]]
name = "aya-ebpf"
version = "1.0.0"
dependencies = [
 "leaf 2.0.0",
]

[[package]]
name = "aya-log-ebpf"
version = "1.0.0"

[[package]]
name = "leaf"
version = "2.0.0"

[[package]]
name = "unrelated"
version = "3.0.0"
"#;

    /// Check that the lock file counts with what the BPF crates depend on, and
    /// with nothing else.
    #[test]
    fn lock_entries_are_the_closure() {
        let kept = locked(LOCK).unwrap();
        assert!(kept.contains("\"leaf\"") && kept.contains("\"aya-ebpf\""));
        assert!(!kept.contains("unrelated"));
        let other = LOCK.replace("version = \"3.0.0\"", "version = \"3.0.1\"");
        assert_eq!(locked(&other).unwrap(), kept);
        let newer = LOCK.replace("version = \"2.0.0\"", "version = \"2.0.1\"");
        assert_ne!(locked(&newer).unwrap(), kept);
        assert!(locked("").is_err());
    }

    /// Check that only the release profiles of the manifest count.
    #[test]
    fn manifest_counts_by_its_release_profiles() {
        let text =
            "[workspace]\nx = 1\n[profile.release.package.a]\ny = 2\n\n# z\n[lints]\nw = 3\n";
        assert_eq!(
            release_profile(text),
            "[profile.release.package.a]\ny = 2\n"
        );
    }

    /// Check that content, name and number of the files change the hash, and
    /// line endings and stray files do not.
    #[test]
    fn every_source_counts() {
        let root = std::env::temp_dir().join(format!("memprof-source-hash-{}", std::process::id()));
        for directory in ["memprof-common/src", "memprof-ebpf/src/deep"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        let write = |path: &str, text: &str| fs::write(root.join(path), text).unwrap();
        let hash = || source_hash(&root).unwrap();
        for file in ["memprof-common/Cargo.toml", "memprof-ebpf/Cargo.toml"] {
            write(file, "[package]\n");
        }
        write("Cargo.toml", "");
        write("Cargo.lock", LOCK);
        write("memprof-ebpf/src/main.rs", "a\nb\n");
        let first = hash();
        write("memprof-ebpf/src/main.rs", "a\r\nb\r\n");
        assert_eq!(hash(), first);
        write("memprof-ebpf/src/main.rs~", "junk");
        assert_eq!(hash(), first);
        write("memprof-ebpf/src/main.rs", "a\nc\n");
        let second = hash();
        assert_ne!(second, first);
        write("memprof-ebpf/src/deep/more.rs", "");
        assert_ne!(hash(), second);
        fs::remove_dir_all(&root).unwrap();
    }
}
