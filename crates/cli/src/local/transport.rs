//! What the services of a local cluster speak over.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tabularium_common::tls::TlsConfig;

/// Between the services, and with their clients. Metrics and readiness are always plain TCP, and Postgres is always a socket
/// file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// TLS over that, HTTP and NATS too.
    Tls(TlsFiles),
    /// Socket files for gRPC. HTTP stays TCP: git clients and other sites know nothing else.
    Sockets,
}

/// PEM files that all services share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// For 127.0.0.1; for servers and for clients.
    pub certificate_path: PathBuf,
    /// Its private key.
    pub key_path: PathBuf,
    /// The authority of the certificate.
    pub ca_path: PathBuf,
    /// Whether gRPC's clients have to show a certificate too.
    #[serde(default)]
    pub mutual: bool,
}

impl TlsFiles {
    /// As whoever dials the services needs it.
    pub fn config(&self) -> TlsConfig {
        TlsConfig {
            certificate_path: Some(self.certificate_path.clone()),
            key_path: Some(self.key_path.clone()),
            ca_path: Some(self.ca_path.clone()),
            client_ca_path: None,
        }
    }
}

impl Transport {
    /// The files, when it is TLS.
    pub fn tls(&self) -> Option<&TlsFiles> {
        match self {
            Self::Tls(files) => Some(files),
            Self::Tcp | Self::Sockets => None,
        }
    }

    /// Where a service listens for gRPC, whose files are in `directory`.
    pub(crate) fn grpc(&self, port: u16, directory: &Path) -> String {
        match self {
            Self::Sockets => format!("unix:{}", directory.join("socket").display()),
            Self::Tcp | Self::Tls(_) => self.http(port),
        }
    }

    /// Where a service listens for HTTP.
    pub(crate) fn http(&self, port: u16) -> String {
        let scheme = if self.tls().is_some() { "tls://" } else { "" };
        format!("{scheme}127.0.0.1:{port}")
    }
}

/// The URL of what was announced: `host:port`, or one already.
pub(crate) fn base_url(announced: &str) -> String {
    if announced.contains("://") { announced.to_owned() } else { format!("http://{announced}") }
}
