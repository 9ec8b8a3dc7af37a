//! The side that dials.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustls::{
    ClientConfig,
    client::{ResolvesClientCert, Resumption},
    pki_types::ServerName,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    Application, HANDSHAKE_TIMEOUT, LOOK_INTERVAL, TlsConfig, TlsError, authorities::Servers, explained,
    identity::Identity, provider, timed_out,
};

/// Does the client's part of handshakes: looks at the server's certificate, and shows ours when the server asks for one.
pub struct Dialer {
    settings: ClientConfig,
    grpc: TlsConnector,
    http1: TlsConnector,
}

impl Dialer {
    /// Believes the system's authorities (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others) and those of `[tls]`.
    pub fn new(config: &TlsConfig) -> Result<Self, TlsError> {
        Self::looking_every(LOOK_INTERVAL, config)
    }

    pub(super) fn looking_every(look_interval: Duration, config: &TlsConfig) -> Result<Self, TlsError> {
        let servers = Servers::new(config.ca_path.as_deref(), look_interval)?;
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            // rustls' name for "not one of its own"; `Servers` asks rustls' own.
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers));
        let mut settings = match config.pair() {
            Some((certificate, key)) => {
                let identity: Arc<dyn ResolvesClientCert> =
                    Arc::new(Identity::new(certificate, key, look_interval)?);
                builder.with_client_cert_resolver(identity)
            }
            None => builder.with_no_client_auth(),
        };
        // Connections live long, and who is dialled again is looked at again.
        settings.resumption = Resumption::disabled();
        let connector = |application: Application| {
            let mut settings = settings.clone();
            settings.alpn_protocols = application.names();
            TlsConnector::from(Arc::new(settings))
        };
        let (grpc, http1) = (connector(Application::Grpc), connector(Application::Http1));
        Ok(Self { settings, grpc, http1 })
    }

    /// For clients of other libraries. They set themselves what is spoken inside.
    pub fn settings(&self) -> ClientConfig {
        self.settings.clone()
    }

    /// Speaks with the server called `host` (a name or an IP address), within [`HANDSHAKE_TIMEOUT`].
    pub(crate) async fn connect<IO>(
        &self,
        application: Application,
        host: &str,
        io: IO,
    ) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("`{host}` is not a host")))?;
        let connector = match application {
            Application::Grpc => &self.grpc,
            Application::Http | Application::Http1 => &self.http1,
        };
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, connector.connect(name, io)).await {
            Ok(connected) => connected.map_err(|error| explained(&error, "the server")),
            Err(_) => Err(timed_out()),
        }
    }
}

struct Installed {
    config: TlsConfig,
    /// Made when it is first wanted: the system's authorities are many, and most processes dial nobody over TLS.
    dialer: Option<Arc<Dialer>>,
}

static INSTALLED: Mutex<Installed> = Mutex::new(Installed { config: TlsConfig::NONE, dialer: None });

fn installed() -> MutexGuard<'static, Installed> {
    INSTALLED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has this process dial with these settings from now on. Without it, the system's authorities alone are believed.
pub fn install(config: &TlsConfig) {
    // For libraries that do not name theirs. Refused when somebody else has done it before, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    *installed() = Installed { config: config.clone(), dialer: None };
}

/// This process's.
pub fn dialer() -> Result<Arc<Dialer>, TlsError> {
    let mut installed = installed();
    if let Some(dialer) = &installed.dialer {
        return Ok(Arc::clone(dialer));
    }
    let dialer = Arc::new(Dialer::new(&installed.config)?);
    Ok(Arc::clone(installed.dialer.insert(dialer)))
}

/// The authorities that this process believes beside the system's, for programs that it starts and that dial by themselves.
pub fn ca_path() -> Option<PathBuf> {
    installed().config.ca_path.as_ref().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()))
}
