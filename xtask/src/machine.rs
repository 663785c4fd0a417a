//! What this machine has.

use std::{
    env,
    path::{Path, PathBuf},
};

/// A program, or why it is not there.
pub(crate) type Found = Result<PathBuf, String>;

/// The program `name` on the PATH, or the package to install.
pub(crate) fn installed(name: &str, package: &str) -> Found {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("not installed: {package}"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir(workspace: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from)
}
