//! Who we are: a certificate and its private key.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    SignatureScheme,
    client::ResolvesClientCert,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use super::{TlsError, files::FromFiles, provider};
use crate::config::read_bounded;

/// Bits of a key file's mode that let others than its owner at it.
const OTHERS: u32 = 0o077;

/// Shown to clients by what listens, and by what dials to servers that ask for it.
#[derive(Debug)]
pub(super) struct Identity(FromFiles<CertifiedKey>);

impl Identity {
    pub(super) fn new(certificate: &Path, key: &Path, look_interval: Duration) -> Result<Self, TlsError> {
        let files = vec![certificate.to_owned(), key.to_owned()];
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        FromFiles::new(files, look_interval, move || {
            warn_of_loose_permissions(&key);
            read(&certificate, &key).map(Arc::new)
        })
        .map(Self)
    }
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _authorities: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The certificate, what leads to its authority, and the key that belongs to it.
pub(super) fn read(certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(certificate)?;
    CertifiedKey::from_der(chain, private_key(key)?, &provider()).map_err(|error| {
        let (path, problem) = match error {
            rustls::Error::InconsistentKeys(_) => {
                (key, format!("not the key of the certificate in {}", certificate.display()))
            }
            rustls::Error::InvalidCertificate(error) => {
                (certificate, format!("a certificate that cannot be used: {error}"))
            }
            // Of a kind or size that cannot sign here.
            _ => (key, "a private key that cannot be used".to_owned()),
        };
        TlsError::Content { path: path.to_owned(), problem }
    })
}

/// Every certificate of a PEM file, at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read_text(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::Content { path: path.to_owned(), problem: "no certificate in PEM".to_owned() }),
    }
}

/// What the parser says is not repeated: it may quote.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = read_text(path)?;
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|_| TlsError::Content {
        path: path.to_owned(),
        problem: "no private key in PEM (PKCS#8, PKCS#1 or SEC1, not encrypted)".to_owned(),
    })
}

fn read_text(path: &Path) -> Result<String, TlsError> {
    read_bounded(path).map_err(|source| TlsError::Read { path: PathBuf::from(path), source })
}

fn warn_of_loose_permissions(key: &Path) {
    if let Some(mode) = loose_mode(key) {
        let (key, mode) = (key.display(), format!("{mode:03o}"));
        tracing::warn!(%key, mode, "others than its owner can get at the private key; 600 is enough");
    }
}

/// The mode of a key that others than its owner can get at.
pub(super) fn loose_mode(key: &Path) -> Option<u32> {
    let mode = fs::metadata(key).ok()?.permissions().mode() & 0o777;
    (mode & OTHERS != 0).then_some(mode)
}
