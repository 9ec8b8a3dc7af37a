//! How every service listens and dials, with the HTTP/2 settings that a relay of long streams and sudden cancellations
//! needs. Each constant says what goes wrong with the library's default.

use std::{
    fmt,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    str::FromStr,
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tonic::transport::{Channel, Endpoint, Server, server::Connected};

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

/// Where a service is reached: `tcp://host:port` or `unix:/path` (wire reference, section 0.2).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// Host and port.
    Tcp(String),
    /// Socket file.
    Unix(PathBuf),
}

/// A text that is not an address we can dial.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// TLS is not built in.
    #[error("tls:// is not supported yet; allowed: tcp://host:port, unix:/path")]
    Tls,
    /// Anything else.
    #[error("allowed: tcp://host:port, unix:/path")]
    Malformed,
}

impl FromStr for Address {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(AddressError::Malformed)
            };
        }
        if text.starts_with("tls://") {
            return Err(AddressError::Tls);
        }
        let rest = text.strip_prefix("tcp://").ok_or(AddressError::Malformed)?;
        let (host, port) = rest.rsplit_once(':').ok_or(AddressError::Malformed)?;
        if host.is_empty() || rest.contains('/') || port.parse::<u16>().is_err() {
            return Err(AddressError::Malformed);
        }
        Ok(Self::Tcp(rest.to_owned()))
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;
    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error| serde::de::Error::custom(format!("`{text}`: {error}")))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => write!(f, "tcp://{host_port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A byte stream to or from a peer, over TCP or a socket file.
#[derive(Debug)]
pub enum Connection {
    /// TCP, with Nagle's algorithm off.
    Tcp(TcpStream),
    /// Socket file.
    Unix(UnixStream),
}

impl Address {
    /// Opens a connection, within [`CONNECT_TIMEOUT`].
    pub async fn connect(&self) -> std::io::Result<Connection> {
        let dial = async {
            match self {
                Self::Tcp(host_port) => {
                    let stream = TcpStream::connect(host_port).await?;
                    stream.set_nodelay(true)?;
                    Ok(Connection::Tcp(stream))
                }
                Self::Unix(path) => UnixStream::connect(path).await.map(Connection::Unix),
            }
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, dial).await {
            Ok(result) => result,
            Err(_) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, format!("dialling {self}"))),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

/// The settings of a client. The authority is only text in the requests; a connector decides where to go.
pub(crate) fn endpoint() -> Endpoint {
    Endpoint::from_static("http://tabularium.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_max_header_list_size(MAX_HEADER_LIST_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
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

/// Where a service listens: `127.0.0.1:2305`, or `unix:/path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// Address and port; port 0 lets the kernel choose.
    Tcp(SocketAddr),
    /// Socket file. One that nobody listens on any more is replaced.
    Unix(PathBuf),
}

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            serde::de::Error::custom(format!(
                "`{text}`; allowed: an address with a port such as 127.0.0.1:2305, or unix:/path"
            ))
        })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A bound listener; the stream of what it accepts.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// Socket file.
    Unix(UnixListener),
}

impl Listener {
    /// Binds.
    pub async fn bind(address: &ListenAddress) -> std::io::Result<Self> {
        match address {
            ListenAddress::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            ListenAddress::Unix(path) => {
                if UnixStream::connect(path).await.is_err() {
                    match std::fs::remove_file(path) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                UnixListener::bind(path).map(Self::Unix)
            }
        }
    }

    /// The address clients dial. With port 0 the kernel's choice is in it.
    pub fn address(&self) -> std::io::Result<Address> {
        match self {
            Self::Tcp(listener) => Ok(Address::Tcp(listener.local_addr()?.to_string())),
            Self::Unix(listener) => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().ok_or_else(|| std::io::Error::other("unnamed socket"))?;
                Ok(Address::Unix(path.to_owned()))
            }
        }
    }

    /// The next connection.
    pub async fn accept(&self) -> std::io::Result<Connection> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Connection::Tcp(stream))
            }
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Connection::Unix(stream)),
        }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<Connection>> {
        match self {
            Self::Tcp(listener) => match futures::ready!(listener.poll_accept(cx)) {
                Ok((stream, _)) => Poll::Ready(stream.set_nodelay(true).map(|()| Connection::Tcp(stream))),
                Err(error) => Poll::Ready(Err(error)),
            },
            Self::Unix(listener) => {
                listener.poll_accept(cx).map(|accepted| accepted.map(|(stream, _)| Connection::Unix(stream)))
            }
        }
    }
}

impl Stream for Listener {
    type Item = std::io::Result<Connection>;
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(cx).map(Some)
    }
}

/// A tonic server with the settings above. Serve it with `serve_with_incoming_shutdown` over a [`Listener`].
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_gitaly() {
        assert_eq!("tcp://10.0.0.1:8075".parse(), Ok(Address::Tcp("10.0.0.1:8075".into())));
        assert_eq!("unix:/run/g.sock".parse(), Ok(Address::Unix("/run/g.sock".into())));
        assert_eq!("unix:///run/g.sock".parse(), Ok(Address::Unix("/run/g.sock".into())));
        assert_eq!("tls://a:1".parse::<Address>(), Err(AddressError::Tls));
        for text in
            ["", "a:1", "tcp://a", "tcp://:1", "tcp://a:1/x", "tcp://a:99999", "unix:rel", "http://a:1"]
        {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Malformed), "{text}");
        }
    }

    #[tokio::test]
    async fn a_socket_file_nobody_listens_on_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let address = ListenAddress::Unix(directory.path().join("s"));
        drop(Listener::bind(&address).await.unwrap());
        let listener = Listener::bind(&address).await.unwrap();
        assert!(Listener::bind(&address).await.is_err(), "one that is in use is left alone");
        listener.address().unwrap().connect().await.unwrap();
    }
}
