//! One stream of a session.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
};
use tokio_util::{
    compat::{Compat, FuturesAsyncReadCompatExt as _},
    sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned},
};

/// One stream of a session: bytes both ways.
///
/// Fails at once when the session ends. yamux itself tells an end of the session from an end of the stream no more than it
/// wakes those who still read when a session is closed; this does both. Only a stream that was shut down before its end was
/// read may take the one for the other: where that matters, read to the end first.
pub struct Stream {
    inner: Compat<yamux::Stream>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    session: CancellationToken,
    shut_down: bool,
    _room: OwnedSemaphorePermit,
    /// Set for the streams whose end is the session's end.
    guard: Option<DropGuard>,
}

impl Stream {
    pub(super) fn new(inner: yamux::Stream, room: OwnedSemaphorePermit, session: &CancellationToken) -> Self {
        Self {
            inner: inner.compat(),
            ended: Box::pin(session.clone().cancelled_owned()),
            session: session.clone(),
            shut_down: false,
            _room: room,
            guard: None,
        }
    }

    /// Dropping it ends the session from here on.
    pub(super) fn holding_session(mut self) -> Self {
        self.guard = Some(self.session.clone().drop_guard());
        self
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.get_ref().fmt(f)
    }
}

fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the multiplexed connection ended")
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        match Pin::new(&mut this.inner).poll_read(cx, buf) {
            Poll::Pending => this.ended.as_mut().poll(cx).map(|()| Err(lost())),
            Poll::Ready(Ok(())) if buf.filled().len() == before && buf.remaining() > 0 => {
                // A stream that we have not shut down is closed both ways only when it was reset.
                let reset = this.inner.get_ref().is_closed() && !this.shut_down;
                Poll::Ready(if reset || this.session.is_cancelled() { Err(lost()) } else { Ok(()) })
            }
            read @ Poll::Ready(_) => read,
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_write(cx, buf) {
            Poll::Pending => this.ended.as_mut().poll(cx).map(|()| Err(lost())),
            written @ Poll::Ready(_) => written,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_flush(cx) {
            Poll::Pending => this.ended.as_mut().poll(cx).map(|()| Err(lost())),
            flushed @ Poll::Ready(_) => flushed,
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_shutdown(cx) {
            Poll::Pending => this.ended.as_mut().poll(cx).map(|()| Err(lost())),
            shut_down @ Poll::Ready(_) => {
                this.shut_down = true;
                shut_down
            }
        }
    }
}
