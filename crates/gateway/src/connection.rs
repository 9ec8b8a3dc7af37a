//! One client connection: HTTP/1.1 or HTTP/2 with prior knowledge, and what ends it when the client stands still.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tabularium_common::grpc;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tokio_util::sync::CancellationToken;

use crate::{
    gateway::Gateway,
    limits::{MAX_HEADER_BYTES, MAX_HEADERS},
};

/// Requests at once on one HTTP/2 connection; the limit over all connections is configured.
const STREAMS_PER_CONNECTION: u32 = 128;

/// Serves a connection to its end. After `stopping` it takes no further request and ends when those running have.
pub(crate) async fn serve(
    gateway: Arc<Gateway>,
    connection: grpc::Connection,
    builder: Arc<Builder<TokioExecutor>>,
    stopping: CancellationToken,
) {
    let stall_timeout = gateway.config.stall_timeout.0;
    let spoke = Arc::new(AtomicBool::new(false));
    let service = hyper::service::service_fn(|request| {
        spoke.store(true, Ordering::Relaxed);
        let gateway = Arc::clone(&gateway);
        async move { Ok::<_, std::convert::Infallible>(gateway.serve(request).await) }
    });
    let io = TokioIo::new(StallGuard::new(connection, stall_timeout));
    let connection = builder.serve_connection(io, service);
    let silence = tokio::time::sleep(gateway.config.header_timeout.0);
    tokio::pin!(connection, silence);
    let (mut draining, mut waiting) = (false, true);
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            () = stopping.cancelled(), if !draining => {
                connection.as_mut().graceful_shutdown();
                draining = true;
            }
            // The version is sniffed before any of the protocols' own timers runs.
            () = silence.as_mut(), if waiting => {
                if !spoke.load(Ordering::Relaxed) {
                    return;
                }
                waiting = false;
            }
        }
    }
}

/// The protocols' settings.
pub(crate) fn builder(header_timeout: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(header_timeout).max_headers(MAX_HEADERS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(grpc::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(grpc::CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .max_header_list_size(u32::try_from(MAX_HEADER_BYTES).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(grpc::MAX_PENDING_RESETS)
        .keep_alive_interval(grpc::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(grpc::KEEPALIVE_TIMEOUT);
    builder
}

/// Fails a write that the peer has not let go on for too long. The clock that watches transfers cannot see this one: a
/// connection that cannot write does not ask for the body.
struct StallGuard {
    inner: grpc::Connection,
    period: Duration,
    blocked: Option<Pin<Box<Sleep>>>,
}

impl StallGuard {
    fn new(inner: grpc::Connection, period: Duration) -> Self {
        Self { inner, period, blocked: None }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.blocked = None;
            return written;
        }
        let period = self.period;
        let sleep = self.blocked.get_or_insert_with(|| Box::pin(tokio::time::sleep(period)));
        sleep
            .as_mut()
            .poll(cx)
            .map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading")))
    }
}

impl AsyncRead for StallGuard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for StallGuard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.inner).poll_write(cx, buf);
        this.watch(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.inner).poll_write_vectored(cx, bufs);
        this.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
