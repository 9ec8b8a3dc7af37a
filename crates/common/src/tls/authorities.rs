//! Whom we believe: certificate authorities, of servers that we dial and of clients that dial us.

use std::{
    env,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use super::{TlsError, files::FromFiles, identity::certificates, provider};

/// Names the file of the system's authorities.
const SYSTEM_FILE: &str = "SSL_CERT_FILE";

/// Believes servers whose certificates the system's authorities or our own have signed, for the name that was dialled.
#[derive(Debug)]
pub(super) struct Servers(FromFiles<WebPkiServerVerifier>);

impl Servers {
    pub(super) fn new(own: Option<&Path>, look_interval: Duration) -> Result<Self, TlsError> {
        let files = own.map(Path::to_owned).into_iter().chain(env::var_os(SYSTEM_FILE).map(PathBuf::from));
        let own = own.map(Path::to_owned);
        FromFiles::new(files.collect(), look_interval, move || {
            let found = rustls_native_certs::load_native_certs();
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(found.certs);
            if let Some(own) = &own {
                add(&mut roots, own)?;
            }
            if roots.is_empty() {
                let errors: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
                return Err(TlsError::NoAuthorities(errors.join("; ")));
            }
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .map_err(|error| TlsError::NoAuthorities(error.to_string()))
        })
        .map(Self)
    }
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
        self.0.current().verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.current().verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.current().verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Believes clients whose certificates one of these authorities has signed, and nobody without a certificate.
#[derive(Debug)]
pub(super) struct Clients(FromFiles<Arc<dyn ClientCertVerifier>>);

impl Clients {
    pub(super) fn new(authorities: &Path, look_interval: Duration) -> Result<Self, TlsError> {
        let path = authorities.to_owned();
        FromFiles::new(vec![path.clone()], look_interval, move || client_verifier(&path).map(Arc::new))
            .map(Self)
    }
}

fn client_verifier(path: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    add(&mut roots, path)?;
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| TlsError::Content { path: path.to_owned(), problem: error.to_string() })
}

impl ClientCertVerifier for Clients {
    /// None are named: what is named cannot change, and clients have one certificate.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.0.current().verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.current().verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.current().verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Adds what is in a PEM file, all of it or nothing.
pub(super) fn add(roots: &mut RootCertStore, path: &Path) -> Result<(), TlsError> {
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| TlsError::Content {
            path: path.to_owned(),
            problem: format!("not a certificate authority: {error}"),
        })?;
    }
    Ok(())
}
