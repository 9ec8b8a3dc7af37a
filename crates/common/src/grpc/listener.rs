//! Where services listen, and what they accept there.

mod sockets;

use std::{
    fmt, future, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt as _, stream::BoxStream};
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

pub use sockets::Sockets;

use super::{Address, Connection, Renamed};
use crate::tls::{Acceptor, Application, TlsConfig};

/// Handshakes at once. More connections wait in the kernel's backlog.
const MAX_HANDSHAKES: usize = 1024;
/// Pause after a failed accept (usually: no file descriptors left).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// One address that a service listens at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// `127.0.0.1:2305`, also `tcp://127.0.0.1:2305`; port 0 lets the kernel choose.
    Tcp(SocketAddr),
    /// `tls://127.0.0.1:3305`.
    Tls(SocketAddr),
    /// `unix:/path`. A socket file that nobody listens on any more is replaced.
    Unix(PathBuf),
}

impl std::str::FromStr for ListenAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.strip_prefix("//").unwrap_or(path).into()));
        }
        let (address, make): (&str, fn(SocketAddr) -> Self) = match text.strip_prefix("tls://") {
            Some(address) => (address, Self::Tls),
            None => (text.strip_prefix("tcp://").unwrap_or(text), Self::Tcp),
        };
        address.parse().map(make).map_err(|_| {
            format!(
                "`{text}`; allowed: an address with a port such as 127.0.0.1:2305, tls://127.0.0.1:3305, or unix:/path"
            )
        })
    }
}

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Tls(address) => write!(f, "tls://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Every address that a service listens at, one or more: a text or a list of texts in the configuration. Others are told the
/// first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddresses(Vec<ListenAddress>);

impl ListenAddresses {
    /// In the order of the configuration.
    pub fn iter(&self) -> impl Iterator<Item = &ListenAddress> {
        self.0.iter()
    }
}

impl From<Vec<ListenAddress>> for ListenAddresses {
    fn from(addresses: Vec<ListenAddress>) -> Self {
        Self(addresses)
    }
}

impl From<ListenAddress> for ListenAddresses {
    fn from(address: ListenAddress) -> Self {
        Self(vec![address])
    }
}

impl From<SocketAddr> for ListenAddresses {
    fn from(address: SocketAddr) -> Self {
        ListenAddress::Tcp(address).into()
    }
}

impl<'de> Deserialize<'de> for ListenAddresses {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "an address, or a list of addresses")]
        enum Texts {
            One(String),
            Several(Vec<String>),
        }
        let texts = match Texts::deserialize(deserializer)? {
            Texts::One(text) => vec![text],
            Texts::Several(texts) => texts,
        };
        if texts.is_empty() {
            return Err(serde::de::Error::custom("`[]`; allowed: one address or more"));
        }
        let addresses: Result<Vec<_>, _> = texts.iter().map(|text| text.parse()).collect();
        addresses.map(Self).map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for ListenAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&texts.join(", "))
    }
}

/// Bound sockets. Gives what they accept, as it comes: see [`Accepted`].
pub struct Listener {
    bound: Vec<Bound>,
    /// Which is asked first, so that a busy one does not keep the others waiting.
    first: AtomicUsize,
}

struct Bound {
    socket: Socket,
    acceptor: Option<Acceptor>,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds one address, without TLS.
    pub async fn bind(address: &ListenAddress) -> io::Result<Self> {
        Self::bind_all(&address.clone().into(), &TlsConfig::NONE, Application::Grpc).await
    }

    /// Binds every address. Those of TLS have their certificate from `tls`.
    pub async fn bind_all(
        addresses: &ListenAddresses,
        tls: &TlsConfig,
        application: Application,
    ) -> io::Result<Self> {
        let mut acceptor = None;
        let mut bound = Vec::new();
        for address in addresses.iter() {
            bound.push(match address {
                ListenAddress::Tcp(address) => {
                    Bound { socket: Socket::Tcp(TcpListener::bind(address).await?), acceptor: None }
                }
                ListenAddress::Tls(address) => {
                    let acceptor = match &acceptor {
                        Some(acceptor) => acceptor,
                        None => acceptor.insert(Acceptor::new(tls, application).map_err(io::Error::other)?),
                    };
                    let socket = Socket::Tcp(TcpListener::bind(address).await?);
                    Bound { socket, acceptor: Some(acceptor.clone()) }
                }
                ListenAddress::Unix(path) => {
                    Bound { socket: Socket::Unix(bind_socket_file(path).await?), acceptor: None }
                }
            });
        }
        Ok(Self { bound, first: AtomicUsize::new(0) })
    }

    /// The address that others are told: the first. With port 0 the kernel's choice is in it.
    pub fn address(&self) -> io::Result<Address> {
        self.bound.first().ok_or_else(|| io::Error::other("no address"))?.address()
    }

    /// All addresses, in the order of the configuration.
    pub fn addresses(&self) -> io::Result<Vec<Address>> {
        self.bound.iter().map(Bound::address).collect()
    }

    /// The next connection, of whichever socket. Cancelling loses none.
    pub async fn accept(&self) -> io::Result<Accepted> {
        future::poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        let first = self.first.fetch_add(1, Ordering::Relaxed);
        for index in 0..self.bound.len() {
            let bound = &self.bound[(first.wrapping_add(index)) % self.bound.len()];
            if let Poll::Ready(accepted) = bound.poll_accept(cx) {
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    }

    /// Connections whose handshakes are done, for servers that take a stream of them. Handshakes go on side by side; those
    /// that fail are told of in the log.
    pub fn connections(self) -> Connections {
        let secured = |accepted: io::Result<Accepted>| async {
            let secured = match accepted {
                Ok(accepted) => accepted.secure().await,
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                    return None;
                }
            };
            secured.inspect_err(|error| tracing::debug!(%error, "a connection came to nothing")).ok()
        };
        let connections = self.map(secured).buffer_unordered(MAX_HANDSHAKES);
        Connections(connections.filter_map(future::ready).boxed())
    }
}

async fn bind_socket_file(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).await.is_err() {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    UnixListener::bind(path)
}

impl Bound {
    fn address(&self) -> io::Result<Address> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let address = listener.local_addr()?.to_string();
                Ok(if self.acceptor.is_some() { Address::Tls(address) } else { Address::Tcp(address) })
            }
            Socket::Unix(listener) => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().ok_or_else(|| io::Error::other("unnamed socket"))?;
                Ok(Address::Unix(path.to_owned()))
            }
        }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        let stream = match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = futures::ready!(listener.poll_accept(cx))?;
                stream.set_nodelay(true)?;
                Plain::Tcp(stream)
            }
            Socket::Unix(listener) => Plain::Unix(futures::ready!(listener.poll_accept(cx))?.0),
        };
        Poll::Ready(Ok(Accepted { stream, acceptor: self.acceptor.clone() }))
    }
}

impl Stream for Listener {
    type Item = io::Result<Accepted>;
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(cx).map(Some)
    }
}

/// A connection that has been accepted. Nothing has been read from it; the handshake, if it is to have one, is still to come.
pub struct Accepted {
    stream: Plain,
    acceptor: Option<Acceptor>,
}

enum Plain {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Accepted {
    /// The connection, once its handshake is done, within [`crate::tls::HANDSHAKE_TIMEOUT`]. To be awaited where it holds up nobody
    /// else's.
    pub async fn secure(self) -> io::Result<Connection> {
        match (self.stream, self.acceptor) {
            (Plain::Tcp(stream), Some(acceptor)) => {
                acceptor.accept(stream).await.map(|stream| Connection::Tls(Box::new(stream.into())))
            }
            (Plain::Tcp(stream), None) => Ok(Connection::Tcp(stream)),
            (Plain::Unix(stream), _) => Ok(Connection::Unix(Renamed::accepted(stream))),
        }
    }

    /// Takes it off this runtime.
    pub fn detach(self) -> io::Result<Detached> {
        let stream = match self.stream {
            Plain::Tcp(stream) => DetachedStream::Tcp(stream.into_std()?),
            Plain::Unix(stream) => DetachedStream::Unix(stream.into_std()?),
        };
        Ok(Detached { stream, acceptor: self.acceptor })
    }
}

/// A connection between two runtimes.
pub struct Detached {
    stream: DetachedStream,
    acceptor: Option<Acceptor>,
}

enum DetachedStream {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Detached {
    /// Inside the runtime that is to own it.
    pub fn attach(self) -> io::Result<Accepted> {
        let stream = match self.stream {
            DetachedStream::Tcp(stream) => Plain::Tcp(TcpStream::from_std(stream)?),
            DetachedStream::Unix(stream) => Plain::Unix(UnixStream::from_std(stream)?),
        };
        Ok(Accepted { stream, acceptor: self.acceptor })
    }
}

/// See [`Listener::connections`]. Serves axum's routers too.
pub struct Connections(BoxStream<'static, Connection>);

impl Stream for Connections {
    type Item = io::Result<Connection>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx).map(|connection| connection.map(Ok))
    }
}

impl axum::serve::Listener for Connections {
    type Io = Connection;
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        match self.0.next().await {
            Some(connection) => (connection, ()),
            // A listener never ends.
            None => future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Config {
        listen: ListenAddresses,
    }

    fn listens(value: &str) -> Result<String, String> {
        toml::from_str::<Config>(&format!("listen = {value}"))
            .map(|config| config.listen.to_string())
            .map_err(|error| error.message().to_owned())
    }

    #[test]
    fn one_address_or_several() {
        assert_eq!(listens("'127.0.0.1:1'").unwrap(), "127.0.0.1:1");
        let several = "['tcp://127.0.0.1:1', 'tls://[::1]:2', 'unix:///run/s']";
        assert_eq!(listens(several).unwrap(), "127.0.0.1:1, tls://[::1]:2, unix:/run/s");
        assert!(listens("[]").unwrap_err().contains("one address or more"));
        assert!(listens("'localhost:1'").unwrap_err().contains("such as 127.0.0.1:2305"));
        assert!(listens("['tls://here']").unwrap_err().contains("`tls://here`"));
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

    #[tokio::test]
    async fn every_address_is_listened_at() {
        let directory = tempfile::tempdir().unwrap();
        let socket = ListenAddress::Unix(directory.path().join("s"));
        let addresses = ListenAddresses(vec![ListenAddress::Tcp(([127, 0, 0, 1], 0).into()), socket]);
        let listener = Listener::bind_all(&addresses, &TlsConfig::NONE, Application::Grpc).await.unwrap();
        for address in listener.addresses().unwrap() {
            let (dialled, accepted) = tokio::join!(address.connect(), listener.accept());
            let accepted = accepted.unwrap().detach().unwrap().attach().unwrap().secure().await.unwrap();
            assert_eq!(matches!(accepted, Connection::Unix(_)), matches!(address, Address::Unix(_)));
            dialled.unwrap();
        }
    }

    #[tokio::test]
    async fn tls_without_a_certificate_is_refused() {
        let address = ListenAddress::Tls(([127, 0, 0, 1], 0).into());
        let error = Listener::bind(&address).await.err().unwrap();
        assert!(error.to_string().contains("tls.certificate_path"), "{error}");
    }
}
