//! The side that dials.

use std::io;

use futures::StreamExt as _;
use hyper::server::conn::http2::Builder;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{io::AsyncWriteExt as _, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use yamux::Mode;

use super::{
    BACKCHANNEL, MAX_INBOUND_STREAMS, SIDECHANNEL, Stream,
    preamble::{self, Rewound},
    session::{self, Session},
};
use crate::{
    grpc::{
        Address, CONNECTION_WINDOW_BYTES, MAX_CONCURRENT_STREAMS, MAX_FRAME_BYTES, MAX_HEADER_LIST_BYTES,
        MAX_PENDING_RESETS, STREAM_WINDOW_BYTES,
    },
    lifecycle::Tasks,
};

/// Opens a multiplexed connection and gives the stream for RPCs, on which an HTTP/2 client is to start. `back` is served
/// to the peer, on what it opens. The connection ends when the stream is dropped, when the peer closes it or goes away, and
/// when `tasks`, which own it, stop.
pub async fn dial(address: &Address, back: Routes, tasks: &Tasks) -> io::Result<Stream> {
    let mut socket = session::socket(address.connect().await?);
    // Stays in the buffer until the session's first frame takes it along.
    socket.write_all(BACKCHANNEL).await?;
    let (session, streams) = Session::start(socket, Mode::Client, MAX_INBOUND_STREAMS, tasks);
    let guard = session.ended().clone().drop_guard();
    let rpcs = session.open().await?.holding_session();
    tasks.spawn("backchannel", serve_back(streams, back));
    guard.disarm();
    Ok(rpcs)
}

/// Serves what the peer opens; ends with the session.
async fn serve_back(streams: mpsc::Receiver<Stream>, back: Routes) {
    let streams = ReceiverStream::new(streams);
    streams.for_each_concurrent(MAX_INBOUND_STREAMS, |stream| serve_stream(stream, back.clone())).await;
}

async fn serve_stream(mut stream: Stream, back: Routes) {
    let head = match preamble::read(&mut stream).await {
        Ok(head) => head,
        Err(error) => return tracing::debug!(%error, "a stream of the peer said nothing"),
    };
    if &head == SIDECHANNEL {
        // No RPC that is relayed over this connection offers the peer a sidechannel. Dropping the stream resets it, and the
        // peer's RPC fails by itself, with a word of its own.
        return tracing::warn!("the peer opened a sidechannel, which it was not offered; it was refused");
    }
    let io = TokioIo::new(Rewound::new(head, stream));
    let served = builder().serve_connection(io, TowerToHyperService::new(back)).await;
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
