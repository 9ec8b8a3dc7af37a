//! Addresses that are dialled.

use std::{fmt, io, path::PathBuf, str::FromStr};

use rand::seq::SliceRandom as _;
use serde::Deserialize;
use tokio::net::{TcpStream, UnixStream};

use super::{CONNECT_TIMEOUT, Connection, Renamed};
use crate::tls::{self, Application};

/// Where a service is reached, as Gitaly's clients write it (wire reference, section 0.2).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `tcp://host:port`.
    Tcp(String),
    /// `tls://host:port`: TLS, and the certificate has to be the host's.
    Tls(String),
    /// `dns:host:port`, also `dns:///host:port`: any of the addresses that the name has when it is dialled.
    Dns(String),
    /// `dns+tls:host:port`: the same over TLS.
    DnsTls(String),
    /// `unix:/path`: a socket file.
    Unix(PathBuf),
}

/// A text that is not an address we can dial.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("allowed: tcp://host:port, tls://host:port, dns:host:port, dns+tls:host:port, unix:/path")]
pub struct AddressError;

impl FromStr for Address {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (scheme, rest) = text.split_once(':').ok_or(AddressError)?;
        let slashes = rest.strip_prefix("//");
        // After two slashes gRPC has room for the address of a name server, which is nobody's but the system's here.
        let name = || slashes.map_or(Some(rest), |rest| rest.strip_prefix('/')).ok_or(AddressError);
        match scheme {
            "unix" => {
                let path = slashes.unwrap_or(rest);
                path.starts_with('/').then(|| Self::Unix(path.into())).ok_or(AddressError)
            }
            "tcp" => host_and_port(slashes.ok_or(AddressError)?).map(Self::Tcp),
            "tls" => host_and_port(slashes.ok_or(AddressError)?).map(Self::Tls),
            "dns" => host_and_port(name()?).map(Self::Dns),
            "dns+tls" => host_and_port(name()?).map(Self::DnsTls),
            _ => Err(AddressError),
        }
    }
}

fn host_and_port(text: &str) -> Result<String, AddressError> {
    let (host, port) = text.rsplit_once(':').ok_or(AddressError)?;
    if host.is_empty() || text.contains('/') || port.parse::<u16>().is_err() {
        return Err(AddressError);
    }
    Ok(text.to_owned())
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
            Self::Tls(host_port) => write!(f, "tls://{host_port}"),
            Self::Dns(host_port) => write!(f, "dns:///{host_port}"),
            Self::DnsTls(host_port) => write!(f, "dns+tls:///{host_port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Address {
    /// Opens a connection, its TLS handshake done, within [`CONNECT_TIMEOUT`]. With the process's [`tls::dialer`].
    pub async fn connect(&self) -> io::Result<Connection> {
        self.connect_for(Application::Grpc).await
    }

    /// As [`Address::connect`], to speak HTTP/1.1.
    pub async fn connect_http(&self) -> io::Result<Connection> {
        self.connect_for(Application::Http1).await
    }

    async fn connect_for(&self, application: Application) -> io::Result<Connection> {
        let dialer = match self {
            Self::Tls(_) | Self::DnsTls(_) => Some(tls::dialer().map_err(io::Error::other)?),
            Self::Tcp(_) | Self::Dns(_) | Self::Unix(_) => None,
        };
        self.connect_as(dialer.as_deref(), application).await
    }

    /// As [`Address::connect`], with that dialer for what wants one.
    pub(crate) async fn connect_as(
        &self,
        dialer: Option<&tls::Dialer>,
        application: Application,
    ) -> io::Result<Connection> {
        let dial = async {
            match self {
                Self::Unix(path) => {
                    UnixStream::connect(path).await.map(|stream| Connection::Unix(Renamed::dialled(stream)))
                }
                Self::Tcp(host_port) => tcp(host_port).await.map(Connection::Tcp),
                Self::Dns(host_port) => any(host_port).await.map(Connection::Tcp),
                Self::Tls(host_port) => secured(dialer, application, host_port, tcp(host_port).await?).await,
                Self::DnsTls(host_port) => {
                    secured(dialer, application, host_port, any(host_port).await?).await
                }
            }
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, dial).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("dialling {self}"))),
        }
    }
}

/// The first of the host's addresses that takes the connection.
async fn tcp(host_port: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(host_port).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The first that takes the connection of the host's addresses in random order, so that connections spread over them.
async fn any(host_port: &str) -> io::Result<TcpStream> {
    let mut addresses: Vec<_> = tokio::net::lookup_host(host_port).await?.collect();
    addresses.shuffle(&mut rand::rng());
    let stream = TcpStream::connect(addresses.as_slice()).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn secured(
    dialer: Option<&tls::Dialer>,
    application: Application,
    host_port: &str,
    stream: TcpStream,
) -> io::Result<Connection> {
    let dialer = dialer.ok_or_else(|| io::Error::other("no settings for TLS"))?;
    let host = host_port.rsplit_once(':').map_or(host_port, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    dialer.connect(application, host, stream).await.map(|stream| Connection::Tls(Box::new(stream.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_gitaly() {
        for (text, address) in [
            ("tcp://10.0.0.1:8075", Address::Tcp("10.0.0.1:8075".into())),
            ("tls://a.example:9999", Address::Tls("a.example:9999".into())),
            ("dns:a.example:1", Address::Dns("a.example:1".into())),
            ("dns:///a.example:1", Address::Dns("a.example:1".into())),
            ("dns+tls:a.example:1", Address::DnsTls("a.example:1".into())),
            ("unix:/run/g.sock", Address::Unix("/run/g.sock".into())),
            ("unix:///run/g.sock", Address::Unix("/run/g.sock".into())),
        ] {
            assert_eq!(text.parse().as_ref(), Ok(&address), "{text}");
            assert_eq!(address.to_string().parse(), Ok(address), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "a:1",
            "tcp://a",
            "tcp:a:1",
            "tcp://:1",
            "tcp://a:1/x",
            "tcp://a:99999",
            "tls://a",
            "tls://a:1/x",
            "dns:a",
            "dns://8.8.8.8/a:1",
            "unix:rel",
            "http://a:1",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError), "{text}");
        }
    }

    #[tokio::test]
    async fn a_name_is_resolved_when_it_is_dialled() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let address: Address = format!("dns:localhost:{port}").parse().unwrap();
        assert!(matches!(address.connect().await.unwrap(), Connection::Tcp(_)));
    }
}
