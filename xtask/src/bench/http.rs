//! The least of HTTP over a Unix socket. Version 1.0, whose answers end with the
//! connection and are never chunked.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// The body of the answer to `GET path`.
///
/// # Errors
///
/// No answer within two minutes, or another status than 200.
pub(super) fn get(socket: &Path, path: &str) -> Result<Vec<u8>> {
    ask(socket, "GET", path, "")
}

/// Sends `content` by `PUT path`.
///
/// # Errors
///
/// As [`get`].
pub(super) fn put(socket: &Path, path: &str, content: &str) -> Result<()> {
    ask(socket, "PUT", path, content).map(drop)
}

fn ask(socket: &Path, method: &str, path: &str, content: &str) -> Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).context("cannot reach the daemon")?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let length = content.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: memprof\r\nContent-Length: {length}\r\n\r\n{content}"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("no answer")?;
    body(answer).with_context(|| format!("{method} {path}"))
}

/// The answer to `GET path`, read as JSON.
///
/// # Errors
///
/// As [`get`], or no JSON.
pub(super) fn json(socket: &Path, path: &str) -> Result<Value> {
    serde_json::from_slice(&get(socket, path)?).with_context(|| format!("GET {path}: no JSON"))
}

fn body(mut answer: Vec<u8>) -> Result<Vec<u8>> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let body = answer.split_off(end.context("no header")? + 4);
    let header = String::from_utf8_lossy(&answer);
    let status = header.split_whitespace().nth(1).unwrap_or_default();
    if status != "200" {
        bail!("status {status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a body is what follows the header, and errors are told.
    #[test]
    fn answers() {
        let answer = b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}".to_vec();
        assert_eq!(body(answer).expect("a body"), b"{}");
        assert!(body(b"HTTP/1.0 404 Not Found\r\n\r\n{}".to_vec()).is_err());
        assert!(body(b"HTTP/1.0".to_vec()).is_err());
    }
}
