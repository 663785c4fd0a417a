//! `memprof dump`.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use clap::Args;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::{
    output::{Output, format_for},
    socket::DEFAULT_SOCKET,
};
use crate::export::Format;

/// Ask a running daemon for a profile.
#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    /// Socket of the daemon
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,

    /// Process to show [default: all that the daemon traces]
    #[arg(short = 'p', long = "pid", value_name = "PID")]
    pid: Option<u32>,

    /// Format of the profile [default: by the file's name, else json; text to
    /// the terminal]
    #[arg(short = 'f', long)]
    format: Option<Format>,

    /// File to write, `-` for standard output
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(args: DumpArgs) -> anyhow::Result<ExitCode> {
    let output = Output::open(args.output.as_deref(), false)?;
    let format = format_for(args.format, args.output.as_deref());
    let mut query = format!("/v1/profile?format={format}");
    if let Some(pid) = args.pid {
        query.push_str(&format!("&pid={pid}"));
    }
    let body = super::runtime()?.block_on(get(&args.socket, &query))?;
    output.write_with(|sink| sink.write_all(&body))?;
    io::stdout().flush().ok();
    Ok(ExitCode::SUCCESS)
}

/// One request to the daemon.
async fn get(socket: &Path, path: &str) -> anyhow::Result<Bytes> {
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
    let request = Request::get(path)
        .header(hyper::header::HOST, "localhost")
        .body(Empty::<Bytes>::new())
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
