//! Which servers are GitLab: those whose certificate the system's authorities or those of the configuration have signed, for
//! the name in the URL.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};

use crate::config::HttpSettings;

/// Why nobody can be trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file of certificates cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has none that can be used.
    #[error("{}: no certificate in PEM", .0.display())]
    Content(PathBuf),
    /// There are no authorities at all.
    #[error("no certificate authorities are known: {0}")]
    Nobody(String),
    /// The TLS library refuses its own settings.
    #[error("TLS: {0}")]
    Library(#[from] Error),
}

/// The settings of TLS towards GitLab.
pub(super) fn settings(http: &HttpSettings) -> Result<ClientConfig, TrustError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let named = named(http)?;
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots.add_parsable_certificates(named.iter().cloned());
    if roots.is_empty() {
        let errors: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        return Err(TrustError::Nobody(errors.join("; ")));
    }
    let authorities = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| TrustError::Nobody(error.to_string()))?;
    let servers = Servers { authorities, named, provider: Arc::clone(&provider) };
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        // rustls' name for "not one of its own"; `Servers` asks rustls' own.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(servers))
        .with_no_client_auth())
}

/// The certificates that the configuration names. What else lies in `ca_path` is passed over.
fn named(http: &HttpSettings) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let mut named = Vec::new();
    if let Some(path) = &http.ca_file {
        let found = certificates(path)?;
        if found.is_empty() {
            return Err(TrustError::Content(path.clone()));
        }
        named.extend(found);
    }
    if let Some(directory) = &http.ca_path {
        let failed = |source| TrustError::Read { path: directory.clone(), source };
        for entry in fs::read_dir(directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_file() {
                named.extend(certificates(&path)?);
            }
        }
    }
    Ok(named)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let text = fs::read(path).map_err(|source| TrustError::Read { path: path.to_owned(), source })?;
    Ok(CertificateDer::pem_slice_iter(&text).filter_map(Result::ok).collect())
}

/// Asks the authorities, and knows GitLab's own certificate when it is named.
#[derive(Debug)]
struct Servers {
    authorities: Arc<WebPkiServerVerifier>,
    named: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let asked =
            self.authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match asked {
            // A certificate that was signed with its own key usually says that it is an authority, which rustls takes from
            // no server. One that was named is known byte for byte, and validity has been looked at before.
            Err(Error::InvalidCertificate(CertificateError::Other(_))) if self.named.contains(end_entity) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            asked => asked,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.authorities.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.authorities.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Settings for places that are not reached over TLS.
pub(super) fn nobody() -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth())
}
