//! An answer that is sent while it is written: a large profile is never in
//! memory as a whole.

use std::{io, mem};

use axum::body::{Body, Bytes};
use http_body_util::channel::{Channel, Sender};
use tokio::runtime::Handle;

use super::limits::PIECE_TIME;

/// Bytes in a piece.
const PIECE_BYTES: usize = 256 << 10;

/// Pieces that may wait for the client.
const PIECES: usize = 4;

/// A body that `write` fills, on a thread where it may block. If it fails, the
/// answer is cut off, and the client told so by the protocol.
pub(super) fn written<W>(write: W) -> Body
where
    W: FnOnce(&mut dyn io::Write) -> io::Result<()> + Send + 'static,
{
    let (sender, channel) = Channel::<Bytes, io::Error>::new(PIECES);
    tokio::task::spawn_blocking(move || {
        let mut pieces = Pieces {
            runtime: Handle::current(),
            sender,
            piece: Vec::with_capacity(PIECE_BYTES),
        };
        let result = write(&mut pieces).and_then(|()| pieces.send());
        if let Err(error) = result {
            if error.kind() != io::ErrorKind::BrokenPipe {
                tracing::warn!(%error, "cannot write an answer");
            }
            pieces.sender.abort(error);
        }
    });
    Body::new(channel)
}

/// Gathers what is written into pieces, and sends them.
struct Pieces {
    runtime: Handle,
    sender: Sender<Bytes, io::Error>,
    piece: Vec<u8>,
}

impl Pieces {
    fn send(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES));
        let sending = self.sender.send_data(piece.into());
        let sending = async { tokio::time::timeout(PIECE_TIME, sending).await };
        match self.runtime.block_on(sending) {
            Ok(Ok(())) => Ok(()),
            // The client has gone, or is there and takes nothing.
            Ok(Err(_)) | Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl io::Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE_BYTES {
            self.send()?;
        }
        Ok(bytes.len())
    }

    /// Writers flush when they are done, and nobody reads half a profile.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
