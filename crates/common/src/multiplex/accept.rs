//! The side that accepts: what a connection is, found out before it is served.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{
    StreamExt as _,
    future::{Either, ready},
    stream::BoxStream,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use super::{
    BACKCHANNEL, Backchannel, HANDSHAKE_TIMEOUT, MAX_HANDSHAKES, Stream,
    preamble::{self, Rewound},
    session::Session,
    yamux::state::Side,
};
use crate::{
    grpc::{Accepted, Connection, Listener},
    lifecycle::Tasks,
    tls,
};

/// Pause after a failed accept (usually: no file descriptors left).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Accepted connections that are ready to be served; give it to `serve_with_incoming_shutdown` of a tonic server.
///
/// Connections find out what they are side by side, so that one that says nothing holds up nobody.
pub struct Incoming(BoxStream<'static, io::Result<Served>>);

impl Incoming {
    /// Takes over the listener; dropping this closes it. `tasks` own the sessions of multiplexed connections, and end those
    /// that are left when they stop: drain what is served before.
    pub fn new(listener: Listener, tasks: Tasks) -> Self {
        let accepted = listener.then(|accepted| match accepted {
            Ok(connection) => Either::Left(ready(Ok(connection))),
            Err(error) => Either::Right(async move {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                Err(error)
            }),
        });
        let introduced = move |accepted: io::Result<Accepted>| {
            let tasks = tasks.clone();
            async move {
                let received = receive(accepted?, &tasks).await;
                received.inspect_err(|error| tracing::debug!(%error, "a connection came to nothing"))
            }
        };
        Self(accepted.map(introduced).buffer_unordered(MAX_HANDSHAKES).boxed())
    }
}

impl futures::Stream for Incoming {
    type Item = io::Result<Served>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

async fn receive(accepted: Accepted, tasks: &Tasks) -> io::Result<Served> {
    identify(accepted.secure().await?, tasks).await
}

/// Finds out what a connection is, within [`HANDSHAKE_TIMEOUT`]. `tasks` own the session of one that is multiplexed, and end
/// it when they stop.
pub async fn identify(mut connection: Connection, tasks: &Tasks) -> io::Result<Served> {
    let head = preamble::read(&mut connection).await?;
    if tls::is_handshake(&head) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the client speaks TLS, which this address does not",
        ));
    }
    if &head != BACKCHANNEL {
        return Ok(Served::Plain(Rewound::new(head, connection)));
    }
    let (session, mut streams) = Session::start(connection, Side::Server, 1, tasks);
    // Until the stream for RPCs is there, this holds the session; afterwards that stream does.
    let guard = session.ended().clone().drop_guard();
    let rpcs = match tokio::time::timeout(HANDSHAKE_TIMEOUT, streams.next()).await {
        Ok(Some(rpcs)) => rpcs.holding_session(),
        Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "no stream for RPCs")),
    };
    guard.disarm();
    Ok(Served::Multiplexed(Box::new(rpcs), Backchannel::new(session, tasks.clone())))
}

/// A connection over which RPCs come.
#[derive(Debug)]
pub enum Served {
    /// HTTP/2 from the first byte.
    Plain(Rewound<Connection>),
    /// The first stream of a session, and the way back.
    Multiplexed(Box<Stream>, Backchannel),
}

impl Served {
    /// The way back, on a multiplexed connection.
    pub fn backchannel(&self) -> Option<&Backchannel> {
        match self {
            Self::Plain(_) => None,
            Self::Multiplexed(_, backchannel) => Some(backchannel),
        }
    }
}

/// What kind of connection a request came over; tonic makes it an extension of the request. See [`introduce`].
#[derive(Debug, Clone)]
pub struct Origin(Option<Backchannel>);

impl Connected for Served {
    type ConnectInfo = Origin;
    fn connect_info(&self) -> Origin {
        Origin(self.backchannel().cloned())
    }
}

/// Gives a request that came over a multiplexed connection its [`Backchannel`] as an extension. For a layer above the
/// services, such as `tower::util::MapRequestLayer`.
pub fn introduce<B>(mut request: http::Request<B>) -> http::Request<B> {
    if let Some(Origin(Some(backchannel))) = request.extensions_mut().remove::<Origin>() {
        request.extensions_mut().insert(backchannel);
    }
    request
}

macro_rules! either {
    ($served:expr, $io:ident => $call:expr) => {
        match $served.get_mut() {
            Served::Plain($io) => {
                let $io = Pin::new($io);
                $call
            }
            Served::Multiplexed($io, _) => {
                let $io = Pin::new(&mut **$io);
                $call
            }
        }
    };
}

impl AsyncRead for Served {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_read(cx, buf))
    }
}

impl AsyncWrite for Served {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, io => io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, io => io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(io) => io.is_write_vectored(),
            Self::Multiplexed(io, _) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_shutdown(cx))
    }
}
