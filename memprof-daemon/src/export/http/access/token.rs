//! A secret that clients have to know, from a file that only its owner can read.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use subtle::ConstantTimeEq as _;
use thiserror::Error;

/// Fewer characters than these can be guessed.
const MIN_BYTES: usize = 16;

/// More than that is another file than was meant.
const MAX_BYTES: u64 = 4096;

/// Why a token cannot be used.
#[derive(Debug, Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Others can read or change the file.
    #[error(
        "the token in {} is no secret: its mode is {mode:03o}; `chmod 600` it, or 640 for a group",
        path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Somebody else owns it, and can change it.
    #[error("{} belongs to user {uid}, neither to root nor to memprof's user", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Who.
        uid: u32,
    },
    /// It is a pipe or a device.
    #[error("{} is not a regular file", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
    },
    /// It can be guessed, or not be sent.
    #[error(
        "a token has one line of at least {MIN_BYTES} printable characters without spaces: \
         `head -c 24 /dev/urandom | base64` makes one"
    )]
    Unfit,
}

/// The secret.
pub struct Token(Vec<u8>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// Reads it from a file.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is no secret, or makes no token.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let unreadable = |source| TokenError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(unreadable)?;
        // Of the file that is open, whatever has the name by now.
        let metadata = file.metadata().map_err(unreadable)?;
        let path = path.to_owned();
        if !metadata.is_file() {
            return Err(TokenError::NoFile { path });
        }
        let mode = metadata.mode() & 0o777;
        // The group may read it: then it is the group's secret.
        if mode & 0o037 != 0 {
            return Err(TokenError::Open { path, mode });
        }
        let uid = metadata.uid();
        if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
            return Err(TokenError::Foreign { path, uid });
        }
        let mut text = Vec::new();
        file.take(MAX_BYTES)
            .read_to_end(&mut text)
            .map_err(|source| TokenError::Unreadable { path, source })?;
        Self::new(&text)
    }

    /// The token in a text: its one line.
    pub(super) fn new(text: &[u8]) -> Result<Self, TokenError> {
        let line = text.trim_ascii();
        if line.len() < MIN_BYTES || !line.iter().all(u8::is_ascii_graphic) {
            return Err(TokenError::Unfit);
        }
        Ok(Self(line.to_owned()))
    }

    /// For the `Authorization` of a client.
    #[must_use]
    pub fn bearer(&self) -> String {
        format!("Bearer {}", String::from_utf8_lossy(&self.0))
    }

    /// Whether it is in the value of an `Authorization` header.
    pub(super) fn is_in(&self, authorization: &str) -> bool {
        let Some((scheme, rest)) = authorization.split_once(' ') else {
            return false;
        };
        let rest = rest.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            return self.is(rest.as_bytes());
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let decoded = BASE64_STANDARD.decode(rest).unwrap_or_default();
            let mut parts = decoded.splitn(2, |&byte| byte == b':');
            return parts.nth(1).is_some_and(|password| self.is(password));
        }
        false
    }

    /// Takes the same time wherever the two differ; only the length shows.
    fn is(&self, other: &[u8]) -> bool {
        self.0.ct_eq(other).into()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    /// Check that a file which others can read or change is refused with its mode, and that
    /// what is no token is.
    #[test]
    fn files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let write = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            Token::read(&path)
        };
        for mode in [0o600, 0o400, 0o640] {
            let token = write("0123456789abcdef\n", mode).unwrap();
            assert_eq!(token.bearer(), "Bearer 0123456789abcdef");
            assert!(!format!("{token:?}").contains("0123"));
        }
        for mode in [0o644, 0o604, 0o620, 0o660, 0o602] {
            let error = write("0123456789abcdef\n", mode).unwrap_err().to_string();
            assert!(error.contains(&format!("{mode:o}")), "{error}");
        }
        for text in [
            "",
            "short",
            "two words in one line",
            "0123456789abcdef\nmore",
        ] {
            let error = write(text, 0o600).unwrap_err();
            assert!(matches!(error, TokenError::Unfit), "{text}: {error}");
        }
        assert!(matches!(
            Token::read(dir.path()),
            Err(TokenError::NoFile { .. })
        ));
        assert!(matches!(
            Token::read(&dir.path().join("none")),
            Err(TokenError::Unreadable { .. })
        ));
    }
}
