//! One stream of a session.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{FRAME_BYTES, yamux::driver::Shared};

/// One stream of a session: bytes both ways.
///
/// Fails at once when the session ends; what was received before can still be read. Dropped before it was finished, it is
/// reset. What is read and written by the piece is not copied; reading and writing may go on side by side.
pub struct Stream {
    number: u32,
    shared: Arc<Shared>,
    session: CancellationToken,
    /// Set for the streams whose end is the session's end.
    guard: Option<DropGuard>,
}

impl Stream {
    pub(super) fn new(number: u32, shared: Arc<Shared>, session: CancellationToken) -> Self {
        Self { number, shared, session, guard: None }
    }

    /// Dropping it ends the session from here on.
    pub(super) fn holding_session(mut self) -> Self {
        self.guard = Some(self.session.clone().drop_guard());
        self
    }

    /// Much is going to be said on it, and nobody waits for each piece of that: from the point on where it is more than an
    /// answer to what the peer said last, what is written may wait a moment for more.
    pub(super) fn expecting_much(self) -> Self {
        self.shared.state().expect_much(self.number);
        self
    }

    /// The next piece as it came; `None` at the end. For one reader at a time, which may give up waiting.
    pub async fn read_piece(&self) -> io::Result<Option<Bytes>> {
        poll_fn(|cx| self.shared.state().poll_read(self.number, usize::MAX, cx)).await
    }

    /// Writes a piece as it lies, in as many frames as it takes; for one writer at a time. It waits while the peer, or the
    /// connection, takes no more. A writer that gives up does not know how much was written.
    pub async fn write_piece(&self, mut piece: Bytes) -> io::Result<()> {
        while !piece.is_empty() {
            poll_fn(|cx| {
                let mut state = self.shared.state();
                let room = ready!(state.poll_room(self.number, cx))?;
                let part = piece.split_to(room.min(piece.len()));
                state.write(self.number, part);
                Poll::Ready(io::Result::Ok(()))
            })
            .await?;
        }
        Ok(())
    }

    /// Says that nothing more will be written. What was written before goes first.
    pub fn finish(&self) {
        self.shared.state().finish(self.number);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.state().abandon(self.number);
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("number", &self.number).finish_non_exhaustive()
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let piece = ready!(self.shared.state().poll_read(self.number, buf.remaining(), cx))?;
        if let Some(piece) = piece {
            buf.put_slice(&piece);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let mut state = self.shared.state();
        let room = ready!(state.poll_room(self.number, cx))?;
        let part = &buf[..room.min(buf.len())];
        state.write(self.number, Bytes::copy_from_slice(part));
        Poll::Ready(Ok(part.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.shared.state();
        let room = ready!(state.poll_room(self.number, cx))?;
        let total = bufs.iter().map(|buf| buf.len()).sum::<usize>().min(room);
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        // One frame of all of them.
        let mut frame = BytesMut::with_capacity(total.min(FRAME_BYTES));
        for buf in bufs {
            let part = &buf[..buf.len().min(total - frame.len())];
            frame.extend_from_slice(part);
        }
        state.write(self.number, frame.freeze());
        Poll::Ready(Ok(total))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was written is on its way.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}
