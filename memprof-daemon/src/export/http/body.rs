//! An answer that is sent while it is written: a large profile is never in
//! memory as a whole.

use std::{
    io, mem,
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::Frame;
use tokio::{
    runtime::Handle,
    sync::mpsc::{self, Receiver, Sender},
};

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
    let (sender, receiver) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || {
        let mut pieces = Pieces {
            runtime: Handle::current(),
            sender,
            piece: Vec::with_capacity(PIECE_BYTES),
        };
        let result = write(&mut pieces).and_then(|()| pieces.end());
        if let Err(error) = result
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            tracing::warn!(%error, "cannot write an answer");
        }
    });
    Body::new(Answer {
        receiver,
        is_whole: false,
    })
}

/// What the writer says. That it is done is said by the same way as the data, and said at all:
/// a writer that failed, or that is no more, is not to be taken for one that is done.
/// (`http_body_util::channel` has two ways, and an answer whose writer ended between its looks
/// at the one and the other was cut off, and whole for the client.)
enum Said {
    Piece(Bytes),
    Done,
}

/// The answer as it is sent.
struct Answer {
    receiver: Receiver<Said>,
    /// The writer is done, and all of it has been taken.
    is_whole: bool,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.is_whole {
            return Poll::Ready(None);
        }
        self.receiver.poll_recv(context).map(|said| match said {
            Some(Said::Piece(piece)) => Some(Ok(Frame::data(piece))),
            Some(Said::Done) => {
                self.is_whole = true;
                None
            }
            None => Some(Err(io::Error::other("the answer was cut off"))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.is_whole
    }
}

/// Gathers what is written into pieces, and sends them.
struct Pieces {
    runtime: Handle,
    sender: Sender<Said>,
    piece: Vec<u8>,
}

impl Pieces {
    fn send(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES));
        self.say(Said::Piece(piece.into()))
    }

    /// The last piece, and that it was the last.
    fn end(&mut self) -> io::Result<()> {
        self.send()?;
        self.say(Said::Done)
    }

    fn say(&self, said: Said) -> io::Result<()> {
        let sending = self.sender.send(said);
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

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    async fn read(body: Body) -> Result<Bytes, axum::Error> {
        body.collect().await.map(|body| body.to_bytes())
    }

    /// Check that what is written arrives, of one piece and of several.
    #[tokio::test(flavor = "multi_thread")]
    async fn arrives_whole() {
        for bytes in [0, 1, PIECE_BYTES, 3 * PIECE_BYTES + 1] {
            let body = written(move |out| {
                (0..bytes).try_for_each(|_| out.write_all(b"x"))?;
                out.flush()
            });
            assert_eq!(read(body).await.expect("an answer").len(), bytes);
        }
    }

    /// Check that an answer whose only piece comes just as it is looked for is not taken for
    /// one that has none.
    #[tokio::test(flavor = "multi_thread")]
    async fn ends_while_it_is_looked_at() {
        for _ in 0..20_000 {
            let body = written(|out| out.write_all(b"all"));
            assert_eq!(read(body).await.expect("an answer"), "all");
        }
    }

    /// Check that the client is told if its answer is not whole, whatever the writer died of.
    #[tokio::test(flavor = "multi_thread")]
    async fn cut_off() {
        let body = written(|out| {
            out.write_all(b"some")?;
            Err(io::Error::other("no more"))
        });
        read(body).await.expect_err("a failed writer");
        let body = written(|_| panic!("no more"));
        read(body).await.expect_err("a writer that is no more");
    }
}
