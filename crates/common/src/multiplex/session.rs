//! A yamux session and the one task that owns it.

use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::BufStream,
    sync::{Semaphore, mpsc, oneshot},
};
use tokio_util::{
    compat::{Compat, TokioAsyncReadCompatExt as _},
    sync::CancellationToken,
};
use yamux::Mode;

use super::{
    CLOSE_TIMEOUT, FRAME_BYTES, MAX_INBOUND_STREAMS, MAX_OUTBOUND_STREAMS, SOCKET_BUFFER_BYTES, Stream,
    WINDOW_GROWTH_BYTES,
};
use crate::{grpc::Connection, lifecycle::Tasks};

/// The bytes below a session.
pub(super) type Socket = BufStream<Connection>;

pub(super) fn socket(connection: Connection) -> Socket {
    BufStream::with_capacity(SOCKET_BUFFER_BYTES, SOCKET_BUFFER_BYTES, connection)
}

type Yamux = yamux::Connection<Compat<Socket>>;
type Opening = oneshot::Sender<yamux::Stream>;

/// A running session. Clones are the same session; it does not end with them but with [`Session::ended`].
#[derive(Clone)]
pub(super) struct Session {
    open: mpsc::Sender<Opening>,
    /// yamux ends the session when one stream too many is asked for.
    room: Arc<Semaphore>,
    ended: CancellationToken,
}

impl Session {
    /// Runs a session as a task that ends when the session does, or when `tasks` stop. Returns what the peer opens.
    ///
    /// `inbound` of the peer's streams may be open; one more is reset, as Gitaly's backlog has it. Once nobody takes them
    /// any more, that goes for all.
    pub(super) fn start(
        socket: Socket,
        mode: Mode,
        inbound: usize,
        tasks: &Tasks,
    ) -> (Self, mpsc::Receiver<Stream>) {
        let (open, openings) = mpsc::channel(1);
        let inbound = inbound.min(MAX_INBOUND_STREAMS);
        let (arrived, streams) = mpsc::channel(inbound);
        let ended = CancellationToken::new();
        let driver = Driver {
            yamux: Yamux::new(socket.compat(), settings(), mode),
            openings,
            arrived,
            room: Arc::new(Semaphore::new(inbound)),
            ended: ended.clone(),
        };
        tasks.spawn("multiplexed connection", driver.run(tasks.stopping()));
        (Self { open, room: Arc::new(Semaphore::new(MAX_OUTBOUND_STREAMS)), ended }, streams)
    }

    /// Opens a stream. The peer hears of it with the first bytes that are written.
    pub(super) async fn open(&self) -> io::Result<Stream> {
        let (reply, opened) = oneshot::channel();
        let open = async {
            let room = Arc::clone(&self.room).acquire_owned().await.ok()?;
            self.open.send(reply).await.ok()?;
            Some(Stream::new(opened.await.ok()?, room, &self.ended))
        };
        let opened = tokio::select! {
            biased;
            () = self.ended.cancelled() => None,
            opened = open => opened,
        };
        let lost = || io::Error::new(io::ErrorKind::NotConnected, "the multiplexed connection ended");
        opened.ok_or_else(lost)
    }

    /// Cancelled when the session ends; cancelling it ends the session.
    pub(super) fn ended(&self) -> &CancellationToken {
        &self.ended
    }
}

struct Driver {
    yamux: Yamux,
    openings: mpsc::Receiver<Opening>,
    arrived: mpsc::Sender<Stream>,
    room: Arc<Semaphore>,
    ended: CancellationToken,
}

impl Driver {
    async fn run(mut self, stopping: CancellationToken) {
        // However this ends, a panic included, everybody who waits on a stream learns of it.
        let _ended = self.ended.clone().drop_guard();
        let ended = self.ended.clone();
        let outcome = tokio::select! {
            biased;
            () = ended.cancelled() => Ok(()),
            () = stopping.cancelled() => Ok(()),
            outcome = poll_fn(|cx| self.poll(cx)) => outcome,
        };
        ended.cancel();
        if let Err(error) = outcome {
            tracing::debug!(%error, "multiplexed connection ended");
        }
        // The last frames of a connection that was closed in order. A peer that takes nothing is not waited for.
        let closing = tokio::time::timeout(CLOSE_TIMEOUT, poll_fn(|cx| self.yamux.poll_close(cx)));
        if let Ok(Err(error)) = closing.await {
            tracing::debug!(%error, "multiplexed connection was not closed in order");
        }
    }

    /// Moves frames until the session has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), yamux::ConnectionError>> {
        loop {
            match self.yamux.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(stream))) => {
                    self.take(stream);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => {}
            }
            // When nobody can ask any more the session still carries what was opened before.
            let Poll::Ready(Some(opening)) = self.openings.poll_recv(cx) else { return Poll::Pending };
            match self.yamux.poll_new_outbound(cx) {
                // Whoever asked may have gone away; dropping the stream closes it.
                Poll::Ready(Ok(stream)) => drop(opening.send(stream)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                // Only with more streams unacknowledged than may be open; the one who asked hears that it failed.
                Poll::Pending => drop(opening),
            }
        }
    }

    /// A stream that is not handed on is dropped, and thereby reset.
    fn take(&self, stream: yamux::Stream) {
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            tracing::debug!("the peer has too many streams open; one more was reset");
            return;
        };
        if self.arrived.try_send(Stream::new(stream, room, &self.ended)).is_err() {
            tracing::debug!("the peer opened a stream that nobody takes; it was reset");
        }
    }
}

fn settings() -> yamux::Config {
    // A stream that was closed counts until its last frame was sent, hence twice.
    let streams = 2 * (MAX_INBOUND_STREAMS + MAX_OUTBOUND_STREAMS);
    let mut settings = yamux::Config::default();
    settings
        .set_max_num_streams(streams)
        .set_max_connection_receive_window(Some(
            streams * yamux::DEFAULT_CREDIT as usize + WINDOW_GROWTH_BYTES,
        ))
        .set_split_send_size(FRAME_BYTES);
    settings
}
