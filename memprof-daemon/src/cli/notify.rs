//! What a service manager is told (sd_notify(3)): a datagram to the socket that
//! `NOTIFY_SOCKET` names, or nothing where there is none.

use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use tracing::warn;

/// Who is told, and how often it wants to hear that all is well.
#[derive(Debug)]
pub(super) struct Manager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Manager {
    /// As the environment says. Nobody, if that makes no sense: then it says so.
    pub(super) fn from_env() -> Self {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            open(&name)
                .inspect_err(|error| warn!(%error, ?name, "cannot use NOTIFY_SOCKET"))
                .ok()
        });
        let number = |name| env::var(name).ok()?.parse::<u64>().ok();
        // For another process of the service, if there is a pid and it is not ours.
        let is_ours = env::var_os("WATCHDOG_PID").is_none()
            || number("WATCHDOG_PID") == Some(u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC")
            .filter(|&microseconds| is_ours && microseconds > 0)
            .map(Duration::from_micros);
        Self { socket, watchdog }
    }

    /// Whether anybody is told.
    pub(super) fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// The longest silence after which it takes memprof for stuck, if it does at all.
    pub(super) fn watchdog(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.is_there())
    }

    /// All that was asked for at the start is done.
    pub(super) fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={status}\n"));
    }

    /// Settings are being read again; [`Self::ready`] ends it. The manager compares the time
    /// with that of its own request.
    pub(super) fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}\n"));
    }

    /// It is going to end.
    pub(super) fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=Detaching\n");
    }

    /// It is well, and this is what it does.
    pub(super) fn alive(&self, status: &str) {
        let watchdog = self.watchdog.map_or("", |_| "WATCHDOG=1\n");
        self.send(&format!("{watchdog}STATUS={status}\n"));
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            warn!(%error, "cannot tell the service manager");
        }
    }
}

fn open(name: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        _ => return Err(io::Error::other("neither a path nor an abstract name")),
    };
    let socket = UnixDatagram::unbound()?;
    // A manager that is busy, or a socket that nobody reads, must not stop the daemon.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}
