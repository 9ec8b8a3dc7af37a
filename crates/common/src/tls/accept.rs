//! The side that listens.

use std::{io, path::Path, sync::Arc, time::Duration};

use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    HANDSHAKE_TIMEOUT, LOOK_INTERVAL, TlsConfig, TlsError, authorities::Clients, explained,
    identity::Identity, provider, timed_out,
};

/// What is spoken inside; the handshake agrees on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Application {
    /// gRPC, over HTTP/2. Go's clients insist on hearing that.
    Grpc,
    /// HTTP/2 or HTTP/1.1, as the client likes.
    Http,
    /// HTTP/1.1.
    Http1,
}

impl Application {
    /// Its names in the handshake, the best first.
    pub(super) fn names(self) -> Vec<Vec<u8>> {
        let names: &[&[u8]] = match self {
            Self::Grpc => &[b"h2"],
            Self::Http => &[b"h2", b"http/1.1"],
            Self::Http1 => &[b"http/1.1"],
        };
        names.iter().map(|name| name.to_vec()).collect()
    }
}

/// Does the server's part of handshakes.
#[derive(Clone)]
pub struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// With the certificate of `[tls]`, and for clients that its `client_ca_path` asks for.
    pub fn new(config: &TlsConfig, application: Application) -> Result<Self, TlsError> {
        Self::looking_every(LOOK_INTERVAL, config, application)
    }

    pub(super) fn looking_every(
        look_interval: Duration,
        config: &TlsConfig,
        application: Application,
    ) -> Result<Self, TlsError> {
        let (certificate, key) = config.pair().ok_or(TlsError::NoCertificate)?;
        let identity = Identity::new(certificate, key, look_interval)?;
        let clients = config.client_ca_path.as_deref();
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier(clients, look_interval)?)
            .with_cert_resolver(Arc::new(identity));
        server.alpn_protocols = application.names();
        if clients.is_some() {
            // Who comes back is looked at again: the authorities may have changed.
            server.session_storage = Arc::new(NoServerSessionStorage {});
            server.send_tls13_tickets = 0;
        }
        Ok(Self(TlsAcceptor::from(Arc::new(server))))
    }

    /// Does it once, within [`HANDSHAKE_TIMEOUT`].
    pub(crate) async fn accept<IO>(&self, io: IO) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, self.0.accept(io)).await {
            Ok(accepted) => accepted.map_err(|error| explained(&error, "the client")),
            Err(_) => Err(timed_out()),
        }
    }
}

fn verifier(
    authorities: Option<&Path>,
    look_interval: Duration,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    match authorities {
        Some(authorities) => Ok(Arc::new(Clients::new(authorities, look_interval)?)),
        None => Ok(WebPkiClientVerifier::no_client_auth()),
    }
}
