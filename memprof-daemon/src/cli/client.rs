//! Requests to a running daemon.

use std::path::Path;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// One request to the daemon on `socket`; the body of its answer.
///
/// # Errors
///
/// If no daemon answers, or if it refuses: then in its own words.
pub(super) async fn request(
    socket: &Path,
    method: Method,
    path: &str,
    body: String,
) -> anyhow::Result<Bytes> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!(
            "no daemon answers on {} (is `memprof daemon` running?)",
            socket.display()
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .context("the daemon does not speak HTTP")?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "localhost")
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
    if status != StatusCode::OK {
        bail!("{}", message(status, &body));
    }
    Ok(body)
}

/// The daemon's own words, if it has any.
fn message(status: StatusCode, body: &[u8]) -> String {
    serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|body| Some(body.get("error")?.as_str()?.to_owned()))
        .unwrap_or_else(|| format!("the daemon answered {status}"))
}
