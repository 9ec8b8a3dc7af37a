//! Certificates of an authority that nobody else knows.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tabularium_cli::local::transport::TlsFiles;
use tempfile::TempDir;

/// An authority with a directory for what it issues. The directory goes when this is dropped.
pub struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its private key, PEM both.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate_path: PathBuf,
    /// The key, for its owner's eyes.
    pub key_path: PathBuf,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    /// Makes one.
    pub fn new() -> Self {
        // Postgres passes through it as another user.
        let directory = tempfile::Builder::new()
            .prefix("tabularium-test-authority-")
            .permissions(fs::Permissions::from_mode(0o711))
            .tempdir_in("/tmp")
            .unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, directory.path().display().to_string());
        let key = KeyPair::generate().unwrap();
        fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    /// Its own certificate.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Where it keeps what it issues.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Issues a certificate for hosts and addresses, for servers and for clients.
    pub fn issue(&self, name: &str, hosts: &[&str]) -> Issued {
        let key = KeyPair::generate().unwrap();
        let params =
            CertificateParams::new(hosts.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let issued = Issued {
            certificate_path: self.directory.path().join(format!("{name}.pem")),
            key_path: self.directory.path().join(format!("{name}.key")),
        };
        fs::write(&issued.certificate_path, certificate.pem()).unwrap();
        let mut options = fs::OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&issued.key_path).unwrap();
        std::io::Write::write_all(&mut file, key.serialize_pem().as_bytes()).unwrap();
        issued
    }

    /// What a cluster on this machine needs; `mutual`: its gRPC's clients show certificates too.
    pub fn cluster_files(&self, mutual: bool) -> TlsFiles {
        let loopback = IpAddr::from([127, 0, 0, 1]).to_string();
        let Issued { certificate_path, key_path } = self.issue("cluster", &["localhost", &loopback]);
        TlsFiles { certificate_path, key_path, ca_path: self.path(), mutual }
    }
}
