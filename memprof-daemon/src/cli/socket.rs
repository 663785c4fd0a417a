//! The daemon's socket.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;

/// Where the daemon listens unless told otherwise.
pub(super) const DEFAULT_SOCKET: &str = "/run/memprof.sock";

/// A bound socket; its file goes with it.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Binds `path` with mode 0600. A socket that nobody listens on any more is
    /// replaced.
    ///
    /// # Errors
    ///
    /// If a daemon listens there, if something else is there, or if the
    /// directory cannot be written.
    pub(super) fn bind(path: &Path) -> anyhow::Result<(Self, UnixListener)> {
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => match UnixStream::connect(path) {
                Ok(_) => bail!("{} is in use by a running daemon", path.display()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path)
                        .with_context(|| format!("cannot replace stale {}", path.display()))?;
                }
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!("cannot tell whether {} is in use", path.display())
                    });
                }
            },
            Ok(_) => bail!("{} exists and is not a socket", path.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot use {}", path.display()));
            }
        }
        // By umask, not by chmod afterwards: there is no moment at which others
        // could connect. Nothing else creates files at this point.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(before);
        let listener = bound.with_context(|| format!("cannot listen on {}", path.display()))?;
        let inode = fs::symlink_metadata(path)
            .with_context(|| format!("cannot find {}", path.display()))?
            .ino();
        Ok((
            Self {
                path: path.to_owned(),
                inode,
            },
            listener,
        ))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Ours still, and not that of a daemon that has taken the name.
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
