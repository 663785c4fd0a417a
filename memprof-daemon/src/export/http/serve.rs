//! Connections: accepted, counted, and given up when nothing comes of them.

use std::{future::Future, io, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
};
use tower::ServiceExt as _;

use super::{
    access::{Access, LocalAddress, check},
    limits::{CONNECTION_TIME, CONNECTIONS, HEADER_BYTES, HEADER_TIME, HEADERS, PIECE_TIME},
};

/// From one failure to accept to the next try.
const REST: Duration = Duration::from_secs(1);

/// Serves whoever may open the socket, for ever.
pub async fn serve_unix(listener: UnixListener, router: Router) {
    serve(listener, router).await;
}

/// Serves whoever passes `access`, for ever.
pub async fn serve_tcp(listener: TcpListener, router: Router, access: Access) {
    let router = router.layer(axum::middleware::from_fn_with_state(access, check));
    serve(listener, router).await;
}

/// Where connections come from.
trait Listener {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection; none if it is gone already.
    fn next(&self) -> impl Future<Output = io::Result<Option<Self::Stream>>> + Send;

    /// The address of ours that it came to.
    fn local_address(stream: &Self::Stream) -> Option<LocalAddress>;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<Option<UnixStream>> {
        let (stream, _) = self.accept().await?;
        Ok(Some(stream))
    }

    fn local_address(_: &UnixStream) -> Option<LocalAddress> {
        None
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<Option<TcpStream>> {
        let (stream, _) = self.accept().await?;
        // Who takes nothing of an answer does not keep a place for ever.
        let limit = u32::try_from(2 * PIECE_TIME.as_millis()).unwrap_or(u32::MAX);
        let limited = setsockopt(&stream, TcpUserTimeout, &limit);
        Ok((limited.is_ok() && stream.local_addr().is_ok()).then_some(stream))
    }

    fn local_address(stream: &TcpStream) -> Option<LocalAddress> {
        let address = stream.local_addr().ok()?;
        Some(LocalAddress(address.ip()))
    }
}

async fn serve<L: Listener>(listener: L, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore belongs to us, and nobody closes it.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.next().await {
            Ok(Some(stream)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    let local = L::local_address(&stream);
                    connection(stream, router, local).await;
                    drop(place);
                });
            }
            Ok(None) => {}
            Err(error) => rest(error).await,
        }
    }
}

/// Out of descriptors, most likely: some are given back in a moment.
async fn rest(error: io::Error) {
    let is_the_clients = matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    );
    if !is_the_clients {
        tracing::warn!(%error, "cannot accept a connection");
        tokio::time::sleep(REST).await;
    }
}

async fn connection<S>(stream: S, router: Router, local: Option<LocalAddress>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = router.map_request(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        if let Some(local) = local {
            request.extensions_mut().insert(local);
        }
        request
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_headers(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    match tokio::time::timeout(CONNECTION_TIME, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection has ended"),
        Err(_) => tracing::debug!("a connection was open for too long"),
    }
}
