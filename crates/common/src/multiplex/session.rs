//! A session: streams are opened on it, and what the peer opens comes out of it.

use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use super::{
    CLOSE_TIMEOUT, FINISH_TIMEOUT, FRAME_BYTES, GATHER_BYTES, GATHER_TIME, MAX_INBOUND_STREAMS,
    MAX_OUTBOUND_STREAMS, PROMPT_BYTES, SEND_QUEUE_BYTES, Stream, WINDOW_BYTES, WRITE_TIMEOUT,
    yamux::{
        driver::{Driver, Patience, Shared},
        state::{Limits, Side, State},
    },
};
use crate::lifecycle::Tasks;

/// A running session. Clones are the same session; it does not end with them but with [`Session::ended`].
#[derive(Debug, Clone)]
pub(super) struct Session {
    shared: Arc<Shared>,
    ended: CancellationToken,
}

/// What the peer opens.
pub(super) struct Arrivals {
    streams: mpsc::Receiver<u32>,
    session: Session,
}

impl Arrivals {
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Stream>> {
        let arrived = self.streams.poll_recv(cx);
        arrived.map(|stream| stream.map(|stream| self.session.stream(stream)))
    }

    /// The next stream; `None` when the session has ended.
    pub(super) async fn next(&mut self) -> Option<Stream> {
        poll_fn(|cx| self.poll_next(cx)).await
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.streams.close();
        while let Ok(stream) = self.streams.try_recv() {
            drop(self.session.stream(stream));
        }
    }
}

impl Session {
    /// Runs a session as a task that ends when the session does, or when `tasks` stop. Returns what the peer opens.
    ///
    /// `inbound` of the peer's streams may be open; one more is reset, as Gitaly's backlog has it. Once nobody takes them
    /// any more, that goes for all.
    pub(super) fn start<IO>(io: IO, side: Side, inbound: usize, tasks: &Tasks) -> (Self, Arrivals)
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let inbound = inbound.min(MAX_INBOUND_STREAMS);
        let limits = Limits {
            window: WINDOW_BYTES,
            inbound,
            outbound: MAX_OUTBOUND_STREAMS,
            queue: SEND_QUEUE_BYTES,
            frame: FRAME_BYTES,
            prompt: PROMPT_BYTES,
            gather: GATHER_BYTES,
        };
        let patience = Patience {
            write: WRITE_TIMEOUT,
            finish: FINISH_TIMEOUT,
            close: CLOSE_TIMEOUT,
            gather: GATHER_TIME,
        };
        let shared = Shared::new(State::new(side, limits));
        let (arrived, streams) = mpsc::channel(inbound);
        let session = Self { shared: Arc::clone(&shared), ended: CancellationToken::new() };
        let driver = Driver::new(io, shared, arrived, patience);
        tasks.spawn("multiplexed connection", driver.run(session.ended.clone(), tasks.stopping()));
        (session.clone(), Arrivals { streams, session })
    }

    fn stream(&self, stream: u32) -> Stream {
        Stream::new(stream, Arc::clone(&self.shared), self.ended.clone())
    }

    /// Opens a stream. The peer hears of it at once.
    pub(super) async fn open(&self) -> io::Result<Stream> {
        let stream = poll_fn(|cx| self.shared.state().poll_open(cx)).await?;
        Ok(self.stream(stream))
    }

    /// Asks the peer whether it is there, and waits for its answer; for one caller at a time. HTTP/2's pings are not for that:
    /// Go's gRPC, and so Praefect, ends a connection on which it is pinged more often than every five minutes.
    pub(super) async fn ping(&self) -> io::Result<()> {
        let ping = self.shared.state().ping();
        poll_fn(|cx| self.shared.state().poll_pong(ping, cx)).await
    }

    /// Cancelled when the session ends; cancelling it ends the session.
    pub(super) fn ended(&self) -> &CancellationToken {
        &self.ended
    }
}
