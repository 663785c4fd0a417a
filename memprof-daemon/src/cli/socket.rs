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
use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    sys::stat::{Mode, umask},
    unistd::{Gid, Group, Uid, User, fchownat},
};
use tokio::net::UnixListener;

/// Where the daemon listens unless told otherwise.
pub(super) const DEFAULT_SOCKET: &str = "/run/memprof.sock";

/// Who may open the socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guard {
    /// Its mode.
    pub(super) mode: u32,
    /// Its owner, if not the daemon's own.
    pub(super) owner: Option<Owner>,
}

/// A user and a group; what is none stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    user: Option<Uid>,
    group: Option<Gid>,
}

/// Reads `USER`, `USER:GROUP` or `:GROUP`, names or numbers.
pub(super) fn parse_owner(text: &str) -> Result<Owner, String> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let failed = |error: nix::Error| format!("cannot look it up: {error}");
    let user = match user {
        "" if group.is_some() => None,
        user => Some(match user.parse() {
            Ok(number) => Uid::from_raw(number),
            Err(_) => {
                let user = User::from_name(user).map_err(failed)?;
                user.ok_or("there is no such user")?.uid
            }
        }),
    };
    let group = match group {
        None => None,
        Some(group) => Some(match group.parse() {
            Ok(number) => Gid::from_raw(number),
            Err(_) => {
                let group = Group::from_name(group).map_err(failed)?;
                group.ok_or("there is no such group")?.gid
            }
        }),
    };
    Ok(Owner { user, group })
}

/// Reads a mode in octal.
pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|&mode| mode <= 0o777)
        .ok_or_else(|| "a mode in octal is needed, such as 660".to_owned())
}

/// A bound socket; its file goes with it.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Binds `path`. A socket that nobody listens on any more is
    /// replaced.
    ///
    /// # Errors
    ///
    /// If a daemon listens there, if something else is there, or if the
    /// directory cannot be written.
    pub(super) fn bind(path: &Path, guard: &Guard) -> anyhow::Result<(Self, UnixListener)> {
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
        let before = umask(Mode::from_bits_truncate(!guard.mode & 0o777));
        let bound = UnixListener::bind(path);
        umask(before);
        let listener = bound.with_context(|| format!("cannot listen on {}", path.display()))?;
        let bound = Self {
            path: path.to_owned(),
            inode: inode(path)?,
        };
        if let Some(Owner { user, group }) = guard.owner {
            // Before that only our own group could open it, if any.
            fchownat(AT_FDCWD, path, user, group, AtFlags::AT_SYMLINK_NOFOLLOW)
                .with_context(|| format!("cannot give {} away", path.display()))?;
        }
        Ok((bound, listener))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn inode(path: &Path) -> anyhow::Result<u64> {
    let metadata =
        fs::symlink_metadata(path).with_context(|| format!("cannot find {}", path.display()))?;
    Ok(metadata.ino())
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Ours still, and not that of a daemon that has taken the name.
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that owners are read by name and number, alone and together.
    #[test]
    fn owners() {
        let root = Uid::from_raw(0);
        for (text, user, group) in [
            ("root", Some(root), None),
            ("0", Some(root), None),
            ("root:root", Some(root), Some(Gid::from_raw(0))),
            (":7", None, Some(Gid::from_raw(7))),
        ] {
            assert_eq!(parse_owner(text), Ok(Owner { user, group }), "{text}");
        }
        for text in ["", "no-such-user", "root:no-such-group", "root:"] {
            assert!(parse_owner(text).is_err(), "{text}");
        }
    }

    /// Check that modes are octal, and permissions alone.
    #[test]
    fn modes() {
        assert_eq!(parse_mode("0660"), Ok(0o660));
        for text in ["", "9", "1777", "rw", "-1"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }
}
