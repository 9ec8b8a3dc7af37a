//! The side that dials.

use std::io;

use futures::StreamExt as _;
use hyper::server::conn::http2::Builder;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::io::AsyncWriteExt as _;
use tonic::{service::Routes, transport::Channel};

use super::{
    BACKCHANNEL, MAX_INBOUND_STREAMS, Stream,
    preamble::{self, Rewound},
    session::{Arrivals, Session},
    sidechannel::{self, Sidechannels},
    yamux::state::Side,
};
use crate::{
    grpc::{
        self, Address, CONNECTION_WINDOW_BYTES, MAX_CONCURRENT_STREAMS, MAX_FRAME_BYTES,
        MAX_HEADER_LIST_BYTES, MAX_PENDING_RESETS, Renamed, STREAM_WINDOW_BYTES,
    },
    lifecycle::Tasks,
};

/// What the peer finds at the end of the streams that it opens.
#[derive(Debug, Clone, Default)]
pub struct Way {
    /// Served to it as gRPC; nothing, for those whose peers have nothing to ask.
    pub services: Option<Routes>,
    /// What it was offered with RPCs. An offer holds on all connections that share it.
    pub sidechannels: Sidechannels,
}

impl From<Routes> for Way {
    fn from(services: Routes) -> Self {
        Self { services: Some(services), sidechannels: Sidechannels::default() }
    }
}

impl From<Sidechannels> for Way {
    fn from(sidechannels: Sidechannels) -> Self {
        Self { services: None, sidechannels }
    }
}

/// Opens a multiplexed connection and gives the stream for RPCs, on which an HTTP/2 client is to start. `back` is what the
/// peer finds at the end of what it opens. The connection ends when the stream is dropped, when the peer closes it or goes
/// away, and when `tasks`, which own it, stop.
pub async fn dial(address: &Address, back: impl Into<Way>, tasks: &Tasks) -> io::Result<Stream> {
    let mut socket = address.connect().await?;
    socket.write_all(BACKCHANNEL).await?;
    let (session, streams) = Session::start(socket, Side::Client, MAX_INBOUND_STREAMS, tasks);
    let guard = session.ended().clone().drop_guard();
    let rpcs = session.open().await?.holding_session();
    tasks.spawn("backchannel", serve_back(streams, back.into()));
    guard.disarm();
    Ok(rpcs)
}

/// A channel over a multiplexed connection, which is dialled when it is first used and again when it was lost.
pub fn channel(address: &Address, back: impl Into<Way>, tasks: &Tasks) -> Channel {
    let (address, back, tasks) = (address.clone(), back.into(), tasks.clone());
    grpc::endpoint().connect_with_connector_lazy(tower::service_fn(move |_| {
        let (address, back, tasks) = (address.clone(), back.clone(), tasks.clone());
        async move { dial(&address, back, &tasks).await.map(TokioIo::new) }
    }))
}

/// Serves what the peer opens; ends with the session.
async fn serve_back(mut streams: Arrivals, back: Way) {
    let streams = futures::stream::poll_fn(move |cx| streams.poll_next(cx));
    streams.for_each_concurrent(MAX_INBOUND_STREAMS, |stream| serve_stream(stream, back.clone())).await;
}

async fn serve_stream(mut stream: Stream, back: Way) {
    let head = match preamble::read(&mut stream).await {
        Ok(head) => head,
        Err(error) => return tracing::debug!(%error, "a stream of the peer said nothing"),
    };
    if &head == sidechannel::MAGIC {
        if let Err(error) = back.sidechannels.receive(stream).await {
            tracing::warn!(%error, "a sidechannel of the peer came to nothing");
        }
        return;
    }
    let Some(services) = back.services else {
        return tracing::warn!("the peer asks, where there is nothing to be asked; it was refused");
    };
    // Gitaly calls this side by an address with a slash in it.
    let io = TokioIo::new(Renamed::accepted(Rewound::new(head, stream)));
    let served = builder().serve_connection(io, TowerToHyperService::new(services)).await;
    if let Err(error) = served {
        tracing::debug!(%error, "backchannel ended");
    }
}

/// As [`crate::grpc::server`] has it; pings are the peer's affair here.
fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        // Gitaly sends none, and it would reach the peer as metadata.
        .auto_date_header(false)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_header_list_size(MAX_HEADER_LIST_BYTES)
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(None);
    builder
}
