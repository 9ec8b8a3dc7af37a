//! HTTP to other sites: hooks to subscribers, ref advertisements from home sites. Redirects are never followed: a token
//! goes to the host in the configuration and to no other.

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};

/// The client that hooks and probes share.
pub(crate) type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Why no client can be made.
#[derive(Debug, thiserror::Error)]
pub enum HttpClientError {
    /// An address is https, and the system has no certificates to check it against.
    #[error("https is configured, but no root certificates were found: {0}")]
    NoRoots(String),
    /// The TLS library refuses its own settings.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// A client that trusts the system's certificate authorities (`SSL_CERT_FILE` names others). `https` says whether any
/// address needs them.
pub(crate) fn http_client(https: bool) -> Result<HttpClient, HttpClientError> {
    let mut roots = rustls::RootCertStore::empty();
    if https {
        let found = rustls_native_certs::load_native_certs();
        let (added, _) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            let errors: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
            return Err(HttpClientError::NoRoots(errors.join("; ")));
        }
    }
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().build();
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}
