//! Requests to a running daemon.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode, Uri, body::Bytes, header};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use super::socket::DEFAULT_SOCKET;
use crate::export::http::Token;

/// How long a daemon may take to accept a connection.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Which daemon to ask.
#[derive(Clone, Debug, Args)]
pub(super) struct ClientArgs {
    /// Socket of the daemon
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,

    /// Ask the daemon that listens there, and not on a socket
    #[arg(long, value_name = "http://HOST:PORT", conflicts_with = "socket", value_parser = parse_url)]
    connect: Option<Authority>,

    /// File with the token that it demands
    #[arg(long, value_name = "FILE", requires = "connect")]
    token_file: Option<PathBuf>,
}

/// A host and a port.
pub(super) type Authority = hyper::http::uri::Authority;

fn parse_url(text: &str) -> Result<Authority, String> {
    let uri: Uri = text.parse().map_err(|_| "this is no URL".to_owned())?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => {
            return Err("memprof does not speak TLS: use a tunnel, such as `ssh -L`".to_owned());
        }
        _ => return Err("a URL such as http://127.0.0.1:9464 is needed".to_owned()),
    }
    let authority = uri
        .authority()
        .filter(|authority| authority.port().is_some());
    let authority = authority.ok_or("a host and a port are needed")?;
    if authority.as_str().contains('@') {
        return Err("a token does not belong here: use --token-file".to_owned());
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err("a host and a port are all that is needed".to_owned());
    }
    Ok(authority.clone())
}

/// Where the daemon is.
enum Place<'a> {
    Socket(&'a Path),
    Tcp(&'a Authority),
}

/// A daemon that can be asked.
pub(super) struct Client<'a> {
    place: Place<'a>,
    token: Option<Token>,
}

impl ClientArgs {
    /// The daemon that is meant. It is not asked yet.
    ///
    /// # Errors
    ///
    /// If there is no token in its file.
    pub(super) fn client(&self) -> anyhow::Result<Client<'_>> {
        let token = self.token_file.as_deref().map(Token::read).transpose()?;
        let place = match &self.connect {
            Some(authority) => Place::Tcp(authority),
            None => Place::Socket(&self.socket),
        };
        Ok(Client { place, token })
    }
}

impl Client<'_> {
    /// The body of the answer to a `GET`.
    ///
    /// # Errors
    ///
    /// As [`Self::request`].
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Bytes> {
        self.request(Method::GET, path, String::new()).await
    }

    /// The body of the answer to one request.
    ///
    /// # Errors
    ///
    /// If no daemon answers, with what to do about it, or if it refuses: then in its own
    /// words.
    pub(super) async fn request(
        &self,
        method: Method,
        path: &str,
        body: String,
    ) -> anyhow::Result<Bytes> {
        let connecting = async {
            let stream: Box<dyn Stream> = match self.place {
                Place::Socket(path) => {
                    let stream = UnixStream::connect(path).await;
                    Box::new(stream.map_err(|error| not_there(error, path))?)
                }
                Place::Tcp(authority) => {
                    let stream = TcpStream::connect(authority.as_str()).await;
                    Box::new(stream.with_context(|| {
                        format!(
                            "no daemon answers on {authority} (does it run with `--listen`, and \
                             is that its address?)"
                        )
                    })?)
                }
            };
            anyhow::Ok(stream)
        };
        let stream = tokio::time::timeout(CONNECT_TIME, connecting)
            .await
            .with_context(|| format!("{} takes no connection", self.name()))??;
        self.ask(stream, method, path, body).await
    }

    async fn ask(
        &self,
        stream: Box<dyn Stream>,
        method: Method,
        path: &str,
        body: String,
    ) -> anyhow::Result<Bytes> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .context("the daemon does not speak HTTP")?;
        let connection = tokio::spawn(connection);
        let host = match self.place {
            Place::Socket(_) => "localhost",
            Place::Tcp(authority) => authority.as_str(),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token.bearer());
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .context("cannot make the request")?;
        let response = sender
            .send_request(request)
            .await
            .context("the daemon did not answer")?;
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .context("the daemon's answer broke off")?
            .to_bytes();
        connection.abort();
        if !status.is_success() {
            bail!("{}", self.refusal(status, &body));
        }
        Ok(body)
    }

    fn name(&self) -> String {
        match self.place {
            Place::Socket(path) => path.display().to_string(),
            Place::Tcp(authority) => authority.to_string(),
        }
    }

    /// The daemon's own words, if it has any, and what to do if it is known.
    fn refusal(&self, status: StatusCode, body: &[u8]) -> String {
        if status == StatusCode::UNAUTHORIZED {
            return match self.token {
                Some(_) => format!("{} demands another token than that", self.name()),
                None => format!("{} demands a token: give --token-file FILE", self.name()),
            };
        }
        serde_json::from_slice::<serde_json::Value>(body)
            .ok()
            .and_then(|body| Some(body.get("error")?.as_str()?.to_owned()))
            .unwrap_or_else(|| format!("the daemon answered {status}"))
    }
}

/// Why nobody answers on a socket, and what to do.
fn not_there(error: io::Error, path: &Path) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            anyhow!(error).context(format!(
                "no daemon answers on {path}: start `memprof daemon`, or name its socket with \
                 --socket"
            ))
        }
        io::ErrorKind::PermissionDenied => anyhow!(error).context(format!(
            "{path} is not for this user: run as root, or give the daemon --socket-owner and \
             --socket-mode"
        )),
        _ => anyhow!(error).context(format!("cannot reach the daemon on {path}")),
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check which URLs are taken, and that the others are refused with what to do.
    #[test]
    fn urls() {
        for (text, authority) in [
            ("http://127.0.0.1:9464", "127.0.0.1:9464"),
            ("http://[::1]:9464/", "[::1]:9464"),
            ("http://probe.example:1", "probe.example:1"),
        ] {
            assert_eq!(parse_url(text).unwrap().as_str(), authority);
        }
        for (text, hint) in [
            ("https://127.0.0.1:9464", "TLS"),
            ("127.0.0.1:9464", "URL"),
            ("http://127.0.0.1", "port"),
            ("http://x:secret@127.0.0.1:1", "--token-file"),
            ("http://127.0.0.1:1/v1", "all that is needed"),
        ] {
            let error = parse_url(text).unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
