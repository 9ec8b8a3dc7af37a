//! HTTP to other sites: hooks to subscribers, ref advertisements from home sites. Redirects are never followed: a token
//! goes to the host in the configuration and to no other.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore};
use tabularium_common::tls::{self, TlsError};

/// The client that hooks and probes share.
pub(crate) type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Why no client can be made.
#[derive(Debug, thiserror::Error)]
pub enum HttpClientError {
    /// An address is https, and there is nothing to check its certificate against.
    #[error("https is configured: {0}")]
    Authorities(#[from] TlsError),
    /// The TLS library refuses its own settings.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// A client that believes whom this process believes. `https` says whether any address needs that.
pub(crate) fn http_client(https: bool) -> Result<HttpClient, HttpClientError> {
    let settings = if https { tls::dialer()?.settings() } else { trusting_nobody()? };
    let connector =
        HttpsConnectorBuilder::new().with_tls_config(settings).https_or_http().enable_http1().build();
    Ok(Client::builder(TokioExecutor::new()).build(connector))
}

fn trusting_nobody() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let settings = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(settings.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}
