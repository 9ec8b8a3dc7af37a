//! The ways to GitLab: sockets, relative URLs, and TLS with certificates of one's own.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
};
use tabularium_node::config::GitlabConfig;
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;

use super::{Gitlab, config};
use crate::harness::{TestNode, eventually};

/// A certificate that has signed itself, in a file, and its key. Like those that openssl makes when it is not told otherwise it
/// says that it is an authority.
struct Itself {
    path: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Itself {
    fn new(directory: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let path = directory.join(format!("{name}.pem"));
        fs::write(&path, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { path, issuer: Issuer::new(params, key) }
    }

    /// Itself, as GitLab's.
    fn pair(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let certificate = CertificateDer::from_pem_file(&self.path).unwrap();
        (certificate, PrivatePkcs8KeyDer::from(self.issuer.key().serialize_der()).into())
    }

    /// Another one for `localhost`, which it signs.
    fn issue(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    }
}

/// Serves over TLS until the test ends; the port.
async fn serve_tls(
    gitlab: &Gitlab,
    (certificate, key): (CertificateDer<'static>, PrivateKeyDer<'static>),
) -> SocketAddr {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(server));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = gitlab.app();
    #[allow(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let Ok(tls) = acceptor.accept(tcp).await else { continue };
            let service = TowerToHyperService::new(app.clone());
            let server = auto::Builder::new(TokioExecutor::new());
            // A client that goes away early is no failure.
            let _ = server.serve_connection(TokioIo::new(tls), service).await;
        }
    });
    address
}

/// A node that is to find GitLab by asking it who it is.
async fn node(gitlab: GitlabConfig) -> TestNode {
    TestNode::start_with(move |config| config.gitlab = Some(gitlab)).await
}

async fn reaches(gitlab: &Gitlab, config: GitlabConfig) {
    let node = node(config).await;
    eventually("GitLab was asked", async || gitlab.checks() > 0).await;
    node.stop().await;
}

/// The configuration that leads over TLS to this port of `localhost`.
fn over_tls(port: u16, directory: &TempDir) -> GitlabConfig {
    config(&format!("https://localhost:{port}"), directory.path())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_leads_to_gitlab_also_below_a_path() {
    for (root, path) in [("", "/api/v4/internal/check"), ("/gitlab/", "/gitlab/api/v4/internal/check")] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("w h.socket");
        let seen = Arc::new(std::sync::Mutex::new(String::new()));
        let noting = Arc::clone(&seen);
        let gitlab = Gitlab::deciding(move |call| {
            noting.lock().unwrap().clone_from(&call.path);
            None
        });
        gitlab.serve_at(&socket);
        let encoded = socket.to_str().unwrap().replace('/', "%2F").replace(' ', "%20");
        let mut to_gitlab = config(&format!("http+unix://{encoded}"), directory.path());
        to_gitlab.relative_url_root = root.to_owned();
        reaches(&gitlab, to_gitlab).await;
        assert_eq!(*seen.lock().unwrap(), path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_signed_itself_is_trusted_when_it_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let itself = Itself::new(directory.path(), "gitlab");
    let gitlab = Gitlab::agreeing();
    let address = serve_tls(&gitlab, itself.pair()).await;
    let mut named = over_tls(address.port(), &directory);
    named.http_settings.ca_file = Some(itself.path.clone());
    reaches(&gitlab, named).await;

    let folder = directory.path().join("certificates");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("README"), "no certificate").unwrap();
    fs::copy(&itself.path, folder.join("one.pem")).unwrap();
    let mut in_a_folder = over_tls(address.port(), &directory);
    in_a_folder.http_settings.ca_path = Some(folder);
    let before = gitlab.checks();
    let node = node(in_a_folder).await;
    eventually("GitLab was asked again", async || gitlab.checks() > before).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_speaks_for_gitlab() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Itself::new(directory.path(), "authority");
    let gitlab = Gitlab::agreeing();
    let address = serve_tls(&gitlab, authority.issue()).await;
    let mut trusting = over_tls(address.port(), &directory);
    trusting.http_settings.ca_file = Some(authority.path);
    reaches(&gitlab, trusting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_is_gitlab() {
    let directory = tempfile::tempdir().unwrap();
    let (itself, other) = (Itself::new(directory.path(), "gitlab"), Itself::new(directory.path(), "other"));
    let gitlab = Gitlab::agreeing();
    let address = serve_tls(&gitlab, itself.pair()).await;
    let mut unnamed = over_tls(address.port(), &directory);
    unnamed.http_settings.ca_file = Some(other.path);
    let mut elsewhere = config(&format!("https://127.0.0.1:{}", address.port()), directory.path());
    elsewhere.http_settings.ca_file = Some(itself.path);
    for to_gitlab in [unnamed, elsewhere] {
        let url = to_gitlab.url.clone();
        let node = node(to_gitlab).await;
        let unreachable = r#"tabularium_node_gitlab_calls_total{endpoint="/check",outcome="unreachable"} 1"#;
        eventually("GitLab was looked for", async || node.metrics().await.contains(unreachable)).await;
        assert_eq!(gitlab.checks(), 0, "{url}");
        node.stop().await;
    }
}

#[tokio::test]
async fn what_cannot_be_used_is_told_of_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty");
    fs::write(&empty, "\n").unwrap();
    let mut no_certificate = config("https://localhost", directory.path());
    no_certificate.http_settings.ca_file = Some(empty.clone());
    let mut no_secret = config("http://localhost", directory.path());
    no_secret.secret_file = tabularium_common::config::SecretFile(empty.clone());
    for (to_gitlab, said) in [(no_certificate, "no certificate in PEM"), (no_secret, "holds no secret")] {
        let started = TestNode::try_start_with(move |config| config.gitlab = Some(to_gitlab)).await;
        let error = started.err().unwrap().to_string();
        assert!(error.contains(said) && error.contains(empty.to_str().unwrap()), "{error}");
    }
}
