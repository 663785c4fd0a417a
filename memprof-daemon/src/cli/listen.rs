//! Where the daemon answers, and to whom.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use axum::Router;
use clap::Args;
use tokio::net::{TcpListener, UnixListener};

use super::socket::{DEFAULT_SOCKET, Guard, Owner, Socket, parse_mode, parse_owner};
use crate::export::http::{Access, Token, serve_tcp, serve_unix};

/// Where to answer.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Where to answer")]
pub(super) struct ListenArgs {
    /// Unix socket to answer HTTP on
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,

    /// Its mode, in octal: who may open it may do all that the daemon can be asked for
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = parse_mode)]
    socket_mode: u32,

    /// Its owner, by name or number [default: the daemon's user and group]
    #[arg(long, value_name = "USER[:GROUP]", value_parser = parse_owner)]
    socket_owner: Option<Owner>,

    /// Answer HTTP on this address as well, on loopback if it is a port only; may be repeated
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    listen: Vec<SocketAddr>,

    /// Demand the token in this file of everyone who comes over TCP; what is not loopback
    /// needs one
    #[arg(long, value_name = "FILE", requires = "listen")]
    token_file: Option<PathBuf>,

    /// Name or address that clients use for this host, beside those of loopback and --listen;
    /// may be repeated
    #[arg(long, value_name = "HOST", requires = "listen")]
    allow_host: Vec<String>,

    /// Processes that have metrics of their own; the others are in the sums
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(super) metrics_targets: usize,
}

/// What is bound.
pub(super) struct Listeners {
    socket: Socket,
    unix: UnixListener,
    tcp: Vec<TcpListener>,
    access: Access,
}

impl ListenArgs {
    /// Binds all of it, or nothing.
    ///
    /// # Errors
    ///
    /// If an address or the socket is in use, or if others could ask without a token.
    pub(super) async fn bind(&self) -> anyhow::Result<Listeners> {
        let token = match &self.token_file {
            Some(path) => Some(Arc::new(Token::read(path)?)),
            None => None,
        };
        let open = self
            .listen
            .iter()
            .find(|address| !address.ip().is_loopback());
        if let (Some(address), None) = (open, &token) {
            bail!(
                "--listen {address} can be reached from other hosts, and profiles tell much of \
                 programs: it needs --token-file FILE"
            );
        }
        let mut tcp = Vec::new();
        for address in &self.listen {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address}"))?;
            tcp.push(listener);
        }
        let guard = Guard {
            mode: self.socket_mode,
            owner: self.socket_owner,
        };
        let (socket, unix) = Socket::bind(&self.socket, &guard)?;
        Ok(Listeners {
            socket,
            unix,
            tcp,
            access: Access {
                token,
                hosts: self.allow_host.clone().into(),
            },
        })
    }
}

impl Listeners {
    /// Answers on all of it, by tasks, and tells where. The socket's file goes with the value.
    pub(super) fn serve(self, router: &Router) -> anyhow::Result<Serving> {
        let mut tasks = Vec::new();
        let mut places = Vec::new();
        for listener in self.tcp {
            let address = listener.local_addr().context("a listener has no address")?;
            places.push(format!("http://{address}"));
            let served = serve_tcp(listener, router.clone(), self.access.clone());
            tasks.push(tokio::spawn(served));
        }
        tasks.push(tokio::spawn(serve_unix(self.unix, router.clone())));
        places.push(self.socket.path().display().to_string());
        eprintln!("memprof: listening on {}", places.join(", "));
        Ok(Serving {
            socket: self.socket,
            tasks,
        })
    }
}

/// What answers.
pub(super) struct Serving {
    socket: Socket,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Serving {
    /// Nobody is to connect to a daemon that is ending.
    pub(super) fn stop(self) {
        drop(self.socket);
        for task in self.tasks {
            task.abort();
        }
    }
}

/// An address and a port; a port alone is loopback's.
fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').unwrap_or(text);
    if let Ok(port) = port.parse::<u16>() {
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    if let Some(port) = text.strip_prefix("localhost:") {
        let port = port.parse().map_err(|_| format!("`{port}` is no port"))?;
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    text.parse().map_err(|_| {
        if text.parse::<IpAddr>().is_ok() {
            "a port is missing, such as in 127.0.0.1:9464".to_owned()
        } else {
            "an address and a port are needed, such as 127.0.0.1:9464 or [::1]:9464; no name"
                .to_owned()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Check that a port alone is loopback's, and that names are refused.
    #[test]
    fn addresses() {
        for text in ["9464", ":9464", "localhost:9464", "127.0.0.1:9464"] {
            assert_eq!(parse_address(text), Ok(([127, 0, 0, 1], 9464).into()));
        }
        for text in ["0.0.0.0:1", "[::]:1", "[::1]:0"] {
            assert_eq!(parse_address(text).unwrap().to_string(), text);
        }
        for text in [
            "",
            ":",
            "127.0.0.1",
            "::1",
            "example.com:80",
            "70000",
            "1:2",
        ] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }
}
