//! HTTP/2 connections of one worker to one node.
//!
//! Unary calls share one connection, where they also share system calls; streams spread over others, so that a clone
//! does not stand in the way of a lookup.

use std::{
    future::Future,
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http_body::Body;
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tabularium_common::{
    grpc::{
        Address, CONNECT_TIMEOUT, CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT,
        MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_BYTES, MAX_PENDING_RESETS,
    },
    lifecycle::Tasks,
};
use tokio::io::{AsyncRead, AsyncWrite, BufReader};

use super::Outgoing;
use crate::{
    body::Spliced,
    limits::{
        MAX_CONCURRENT_RESETS, MAX_FRAME_BYTES, SEND_BUFFER_BYTES, SOCKET_BUFFER_BYTES, STREAM_CONNECTIONS,
        STREAM_WINDOW_BYTES,
    },
    replay::Tail,
};

/// Which connection a request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// One message each way.
    Unary,
    /// Anything else.
    Stream,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError<R = Outgoing> {
    /// Not a byte of the request reached the wire. It is handed back.
    #[error("{problem}")]
    Unsent {
        /// As it was given.
        request: Box<R>,
        /// For the log.
        problem: String,
    },
    /// The node refused the stream without looking at it. The request is gone.
    #[error("the node refused the stream")]
    Refused,
    /// The node may have acted on it.
    #[error("{0}")]
    Lost(hyper::Error),
}

/// The place of one connection.
pub(super) struct Slot<B> {
    open: Mutex<Option<SendRequest<B>>>,
    /// One dials, the others wait for it.
    dialling: tokio::sync::Mutex<()>,
}

impl<B> Default for Slot<B> {
    fn default() -> Self {
        Self { open: Mutex::default(), dialling: tokio::sync::Mutex::default() }
    }
}

impl<B> Slot<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn open(&self) -> Option<SendRequest<B>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_some_and(SendRequest::is_closed) {
            *open = None;
        }
        open.clone()
    }

    /// Sends over the open connection, or over a new one when there is none or it closes before it takes the request.
    pub(super) async fn send<IO>(
        &self,
        tasks: &Tasks,
        dial: impl Future<Output = io::Result<IO>>,
        mut request: http::Request<B>,
    ) -> Result<http::Response<Incoming>, SendError<http::Request<B>>>
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if let Some(sender) = self.open() {
            match try_send(sender, request).await {
                Err(SendError::Unsent { request: unsent, .. }) => request = *unsent,
                sent => return sent,
            }
        }
        match self.dial(tasks, dial).await {
            Ok(sender) => try_send(sender, request).await,
            Err(error) => Err(SendError::Unsent { request: Box::new(request), problem: error.to_string() }),
        }
    }

    async fn dial<IO>(
        &self,
        tasks: &Tasks,
        dial: impl Future<Output = io::Result<IO>>,
    ) -> io::Result<SendRequest<B>>
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let _turn = self.dialling.lock().await;
        if let Some(sender) = self.open() {
            return Ok(sender);
        }
        let handshake = builder().handshake(TokioIo::new(dial.await?));
        let (sender, driver) = tokio::time::timeout(CONNECT_TIMEOUT, handshake)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
            .map_err(io::Error::other)?;
        tasks.spawn("node connection", async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "node connection ended");
            }
        });
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
        Ok(sender)
    }
}

pub(super) struct Pool {
    unary: Slot<Spliced<Tail<Incoming>>>,
    streams: [Slot<Spliced<Tail<Incoming>>>; STREAM_CONNECTIONS],
    next: AtomicUsize,
    tasks: Tasks,
}

impl Pool {
    pub(super) fn new(tasks: Tasks) -> Self {
        Self { unary: Slot::default(), streams: Default::default(), next: AtomicUsize::new(0), tasks }
    }

    fn slot(&self, traffic: Traffic) -> &Slot<Spliced<Tail<Incoming>>> {
        match traffic {
            Traffic::Unary => &self.unary,
            Traffic::Stream => &self.streams[self.next.fetch_add(1, Ordering::Relaxed) % STREAM_CONNECTIONS],
        }
    }

    /// See [`Slot::send`].
    pub(super) async fn send(
        &self,
        address: &Address,
        traffic: Traffic,
        request: Outgoing,
    ) -> Result<http::Response<Incoming>, SendError> {
        let dial = async { Ok(BufReader::with_capacity(SOCKET_BUFFER_BYTES, address.connect().await?)) };
        self.slot(traffic).send(&self.tasks, dial, request).await
    }
}

async fn try_send<B>(
    mut sender: SendRequest<B>,
    request: http::Request<B>,
) -> Result<http::Response<Incoming>, SendError<http::Request<B>>>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    sender.try_send_request(request).await.map_err(|mut error| match error.take_message() {
        Some(request) => SendError::Unsent { request: Box::new(request), problem: error.error().to_string() },
        None if is_refused(error.error()) => SendError::Refused,
        None => SendError::Lost(error.into_error()),
    })
}

fn http2_error(error: &hyper::Error) -> Option<&h2::Error> {
    std::error::Error::source(error).and_then(|source| source.downcast_ref())
}

/// `REFUSED_STREAM`: HTTP/2 promises that the request was not acted on.
fn is_refused(error: &hyper::Error) -> bool {
    let error = http2_error(error);
    error.is_some_and(|error| error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM))
}

/// The connection broke, and not only the one stream.
pub(super) fn is_connection_lost(error: &hyper::Error) -> bool {
    // hyper takes errors of the socket out of what HTTP/2 wrapped around them; a ping that nobody answered is a timeout.
    let of_the_socket =
        std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>()).is_some();
    of_the_socket
        || error.is_closed()
        || error.is_timeout()
        || http2_error(error).is_some_and(|error| error.is_io() || error.is_go_away())
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_header_list_size(MAX_HEADER_LIST_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .initial_max_send_streams(MAX_CONCURRENT_STREAMS as usize)
        .max_concurrent_reset_streams(MAX_CONCURRENT_RESETS)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(None)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    builder
}
