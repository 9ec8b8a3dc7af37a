//! The `[tls]` table.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use rustls::RootCertStore;
use serde::Deserialize;

use super::{TlsError, authorities, identity};
use crate::{config::Fault, grpc::ListenAddress};

/// Names the certificate of a program without a configuration file.
const CERTIFICATE: &str = "TABULARIUM_TLS_CERTIFICATE_PATH";
/// Names its private key.
const KEY: &str = "TABULARIUM_TLS_KEY_PATH";
/// Names the authorities that it believes beside the system's.
const AUTHORITIES: &str = "TABULARIUM_TLS_CA_PATH";
/// Where the system's authorities are, if not where they usually are.
const SYSTEM: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Certificates, keys and authorities: files in PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Our certificate, and after it those that lead to its authority. Shown by what listens at `tls://`, and by what dials
    /// to servers that ask for one.
    pub certificate_path: Option<PathBuf>,
    /// The certificate's private key.
    pub key_path: Option<PathBuf>,
    /// Authorities of clients. When it is there, what listens at `tls://` lets nobody in without a certificate of theirs.
    pub client_ca_path: Option<PathBuf>,
    /// Authorities of the servers that we dial, beside the system's.
    pub ca_path: Option<PathBuf>,
}

impl TlsConfig {
    /// Nothing but the system's authorities.
    pub const NONE: Self =
        Self { certificate_path: None, key_path: None, client_ca_path: None, ca_path: None };

    pub(super) fn pair(&self) -> Option<(&Path, &Path)> {
        self.certificate_path.as_deref().zip(self.key_path.as_deref())
    }

    /// As the environment says, for programs without a configuration file.
    pub fn of_environment() -> Self {
        let file = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            certificate_path: file(CERTIFICATE),
            key_path: file(KEY),
            client_ca_path: None,
            ca_path: file(AUTHORITIES),
        }
    }

    /// What tells a program with a cleared environment and another working directory to dial as this process does.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let own =
            [(CERTIFICATE, &self.certificate_path), (KEY, &self.key_path), (AUTHORITIES, &self.ca_path)];
        let absolute = |file: &PathBuf| std::path::absolute(file).unwrap_or_else(|_| file.clone());
        let own = own.into_iter().filter_map(|(name, file)| Some((name, absolute(file.as_ref()?).into())));
        let system = SYSTEM.into_iter().filter_map(|name| Some((name, env::var_os(name)?)));
        own.chain(system).collect()
    }

    /// What cannot be used of it, by a service that listens at these addresses. Reads every file.
    pub fn faults<'a>(&self, listens: impl IntoIterator<Item = &'a ListenAddress>) -> Vec<Fault> {
        let mut faults = Vec::new();
        let listens = listens.into_iter().any(|address| matches!(address, ListenAddress::Tls(_)));
        let (certificate, key) = (self.certificate_path.as_deref(), self.key_path.as_deref());
        faults.extend(check_pair(("tls.certificate_path", certificate), ("tls.key_path", key)));
        if listens && certificate.is_none() && key.is_none() {
            let why = "a PEM file, to listen at a tls:// address";
            faults.push(Fault::new("tls.certificate_path", ABSENT, why));
        }
        if let Some(path) = &self.client_ca_path {
            let key = "tls.client_ca_path";
            if listens {
                faults.extend(check_authorities(key, path));
            } else {
                let why = "absent where nothing listens at a tls:// address: nobody would be asked for a certificate";
                faults.push(Fault::new(key, path.display(), why));
            }
        }
        faults.extend(self.ca_path.as_deref().and_then(|path| check_authorities("tls.ca_path", path)));
        faults
    }
}

/// What a key says that is not in the file.
const ABSENT: &str = "absent";

/// What is wrong with the two keys of a configuration that name a certificate and its private key.
pub fn check_pair(certificate: (&str, Option<&Path>), key: (&str, Option<&Path>)) -> Vec<Fault> {
    let fault = match (certificate.1, key.1) {
        (None, None) => None,
        (Some(_), None) => Some(Fault::new(key.0, ABSENT, format!("the private key of {}", certificate.0))),
        (None, Some(_)) => Some(Fault::new(certificate.0, ABSENT, format!("the certificate of {}", key.0))),
        (Some(certificate_path), Some(key_path)) => match identity::certificates(certificate_path) {
            Err(error) => Some(fault(certificate.0, certificate_path, &error)),
            Ok(_) => identity::read(certificate_path, key_path).err().map(|error| match &error {
                TlsError::Content { path, .. } if path == certificate_path && path != key_path => {
                    fault(certificate.0, certificate_path, &error)
                }
                _ => fault(key.0, key_path, &error),
            }),
        },
    };
    fault.into_iter().collect()
}

/// What is wrong with the file of authorities that a key of a configuration names.
pub fn check_authorities(key: &str, path: &Path) -> Option<Fault> {
    let added = authorities::add(&mut RootCertStore::empty(), path);
    added.err().map(|error| fault(key, path, &error))
}

fn fault(key: &str, path: &Path, error: &TlsError) -> Fault {
    let problem = match error {
        TlsError::Read { source, .. } => source.to_string(),
        TlsError::Content { problem, .. } => problem.clone(),
        other => other.to_string(),
    };
    Fault::new(key, path.display(), format!("a PEM file that can be used ({problem})"))
}
