//! How every service listens and dials, with the HTTP/2 settings that a relay of long streams and sudden cancellations
//! needs. Each constant says what goes wrong with the library's default.
//!
//! * [`Address`]: what is dialled, [`ListenAddresses`] what is listened at: TCP, TLS, socket files.
//! * [`Connection`]: a byte stream over any of them.
//! * [`Listener`] gives what it has [`Accepted`], whose handshake is done by whoever serves it.

mod address;
mod authority;
mod connection;
mod deadline;
mod listener;
mod oversize;

use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Server};

pub use address::{Address, AddressError};
pub use authority::Renamed;
pub use connection::Connection;
pub use deadline::{DEADLINE_EXCEEDED, Deadline, DeadlineLayer, MalformedTimeout, timeout_of};
pub use listener::{Accepted, Connections, Detached, ListenAddress, ListenAddresses, Listener, Sockets};
pub use oversize::say_as_gitaly_does;

/// Receive window of one stream. The HTTP/2 default of 64 KiB caps a stream at one window per round trip.
pub const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// Receive window of a connection: several streams at full speed.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
/// Largest frame we take. The default of 16 KiB costs a system call for each.
pub const MAX_FRAME_BYTES: u32 = 1024 * 1024;
/// Largest header list. Gitaly's metadata carries base64 JSON; the default of 16 KiB is too small for it.
pub const MAX_HEADER_LIST_BYTES: u32 = 64 * 1024;
/// Streams at once on one connection. GitLab multiplexes everything on one; the default is 200.
pub const MAX_CONCURRENT_STREAMS: u32 = 10_000;
/// Resets that may wait to be accepted. At the default of 20 a burst of cancellations kills the shared connection.
pub const MAX_PENDING_RESETS: usize = 4096;
/// Pings on idle and busy connections; not oftener, or Gitaly closes the connection.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long a ping may stay unanswered before the connection counts as dead.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pings on connections to coordinators, which are ours and do not mind.
pub const WATCHED_INTERVAL: Duration = Duration::from_secs(2);
/// How long such a ping may stay unanswered. Both together are more than a write's lease: what is then under way there has
/// been decided without it.
pub const WATCHED_TIMEOUT: Duration = Duration::from_secs(3);
/// How long dialling may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest message taken or sent as a whole; gRPC's own default, which Gitaly's clients rely on.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Metadata of a router's refusal of a write: for certain nobody has been told to change anything, so that the same write
/// may be sent to another router.
pub const NOT_BEGUN: &str = "tabularium-not-begun";

/// The name under which a node's `grpc.health.v1` tells whether one of its storages can be used. It names the file system
/// too: a node on whose disk another one was put does not know this service.
pub fn storage_health_service(storage: &str, filesystem_id: &str) -> String {
    format!("tabularium.storage/{storage}/{filesystem_id}")
}

/// The settings of a client. The authority is only text in the requests; a connector decides where to go.
pub(crate) fn endpoint() -> Endpoint {
    silent_endpoint()
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// The same without pings, for connections that are watched otherwise.
pub(crate) fn silent_endpoint() -> Endpoint {
    Endpoint::from_static("http://tabularium.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
}

/// A channel that dials when it is first used and again whenever its connection was lost.
pub fn channel(address: &Address) -> Channel {
    lazily(&endpoint(), address)
}

/// A channel to a peer of ours whose silence must be noticed soon: pinged every [`WATCHED_INTERVAL`], given up
/// [`WATCHED_TIMEOUT`] later.
pub fn watched_channel(address: &Address) -> Channel {
    let endpoint = endpoint().http2_keep_alive_interval(WATCHED_INTERVAL).keep_alive_timeout(WATCHED_TIMEOUT);
    lazily(&endpoint, address)
}

fn lazily(endpoint: &Endpoint, address: &Address) -> Channel {
    let address = address.clone();
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
        let address = address.clone();
        async move { address.connect().await.map(TokioIo::new) }
    }))
}

/// A tonic server with the settings above. Serve it with `serve_with_incoming_shutdown` over [`Listener::connections`].
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_max_local_error_reset_streams(None)
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .http2_keepalive_interval(Some(Duration::from_secs(300)))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}
