//! Handshakes between the two sides, with certificates made here.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;
use crate::grpc::{Address, Connection, ListenAddress, Listener};

/// An authority, with the directory that its files are in.
struct Authority {
    directory: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        let name = format!("authority {}", directory.path().display());
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a certificate for this host and its key; a second time in their place.
    fn issue(&self, name: &str, host: &str) -> TlsConfig {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let config = TlsConfig {
            certificate_path: Some(self.path(&format!("{name}.pem"))),
            key_path: Some(self.path(&format!("{name}.key"))),
            client_ca_path: None,
            ca_path: Some(self.path("ca.pem")),
        };
        replace(config.certificate_path.as_ref().unwrap(), &certificate.pem());
        replace(config.key_path.as_ref().unwrap(), &key.serialize_pem());
        config
    }
}

fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(new, path).unwrap();
}

fn acceptor(config: &TlsConfig) -> Acceptor {
    Acceptor::looking_every(Duration::ZERO, config, Application::Grpc).unwrap()
}

fn dialing(config: &TlsConfig) -> Dialer {
    Dialer::looking_every(Duration::ZERO, config).unwrap()
}

/// Whether both sides are content; what the dialler says when not, or else the acceptor.
async fn handshake(acceptor: &Acceptor, dialer: &Dialer, host: &str) -> Result<(), String> {
    let (theirs, ours): (DuplexStream, DuplexStream) = tokio::io::duplex(64 * 1024);
    let accept = async {
        let mut stream = acceptor.accept(theirs).await?;
        let mut word = [0; 4];
        stream.read_exact(&mut word).await?;
        stream.write_all(&word).await?;
        stream.shutdown().await
    };
    let dial = async {
        let mut stream = dialer.connect(Application::Grpc, host, ours).await?;
        stream.write_all(b"word").await?;
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.map(drop)
    };
    let (accepted, dialled) = tokio::join!(accept, dial);
    dialled.map_err(|error| error.to_string())?;
    accepted.map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_certificate_has_to_be_that_of_the_host_and_of_an_authority_that_is_believed() {
    let ours = Authority::new();
    let config = ours.issue("server", "node.example");
    let (acceptor, dialer) = (acceptor(&config), dialing(&config));
    handshake(&acceptor, &dialer, "node.example").await.unwrap();
    let other_host = handshake(&acceptor, &dialer, "other.example").await.unwrap_err();
    assert!(other_host.contains("other.example"), "{other_host}");

    let strangers = Authority::new();
    let stranger = self::acceptor(&strangers.issue("stranger", "node.example"));
    let unknown = handshake(&stranger, &dialer, "node.example").await.unwrap_err();
    assert!(unknown.contains("UnknownIssuer"), "{unknown}");
}

#[tokio::test]
async fn who_has_to_show_a_certificate_and_has_none_is_not_let_in() {
    let authority = Authority::new();
    let mut config = authority.issue("server", "node.example");
    config.client_ca_path = Some(authority.path("ca.pem"));
    let acceptor = acceptor(&config);
    handshake(&acceptor, &dialing(&config), "node.example").await.unwrap();

    let none = TlsConfig { certificate_path: None, key_path: None, ..config.clone() };
    let refused = handshake(&acceptor, &dialing(&none), "node.example").await.unwrap_err();
    assert!(refused.contains("CertificateRequired"), "{refused}");

    let stranger = Authority::new();
    let strange = TlsConfig { ca_path: config.ca_path.clone(), ..stranger.issue("client", "client.example") };
    let refused = handshake(&acceptor, &dialing(&strange), "node.example").await.unwrap_err();
    assert!(refused.contains("UnknownCA"), "{refused}");
}

#[tokio::test]
async fn certificates_and_authorities_are_read_again_when_they_have_changed() {
    let old = Authority::new();
    let config = old.issue("server", "node.example");
    let (acceptor, dialer) = (acceptor(&config), dialing(&config));
    handshake(&acceptor, &dialer, "node.example").await.unwrap();

    // Another name, by the same authority.
    old.issue("server", "moved.example");
    handshake(&acceptor, &dialer, "moved.example").await.unwrap();

    // Another authority: first who dials has to know of it.
    let new = Authority::new();
    let both =
        fs::read_to_string(old.path("ca.pem")).unwrap() + &fs::read_to_string(new.path("ca.pem")).unwrap();
    replace(&old.path("ca.pem"), &both);
    handshake(&acceptor, &dialer, "moved.example").await.unwrap();
    let by_new = new.issue("server", "moved.example");
    let by_new_texts =
        [by_new.certificate_path, by_new.key_path].map(|path| fs::read_to_string(path.unwrap()).unwrap());

    // Half of it has been replaced: what was there before is used.
    replace(config.certificate_path.as_ref().unwrap(), &by_new_texts[0]);
    handshake(&acceptor, &dialer, "moved.example").await.unwrap();
    replace(config.key_path.as_ref().unwrap(), &by_new_texts[1]);
    replace(&old.path("ca.pem"), &fs::read_to_string(new.path("ca.pem")).unwrap());
    handshake(&acceptor, &dialer, "moved.example").await.unwrap();
}

#[tokio::test]
async fn who_does_not_speak_tls_is_told_apart_in_the_log() {
    let config = Authority::new();
    let config = (config.issue("server", "node.example"), config);
    let acceptor = acceptor(&config.0);
    for said in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        b"backchannel\0\0\0\0\0\0\0\0\0\0",
        &[0x16, 3, 1, 0xff, 0xff],
    ] {
        let (theirs, mut ours) = tokio::io::duplex(1024);
        ours.write_all(said).await.unwrap();
        let error = acceptor.accept(theirs).await.unwrap_err().to_string();
        assert!(error.contains("the client does not speak TLS here"), "{error}");
    }
    let dialer = dialing(&config.0);
    let (mut theirs, ours) = tokio::io::duplex(1024);
    theirs.write_all(&[0, 0, 18, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let error = dialer.connect(Application::Grpc, "node.example", ours).await.unwrap_err().to_string();
    assert!(error.contains("the server does not speak TLS here"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_does_not_go_on_ends() {
    let authority = Authority::new();
    let config = authority.issue("server", "node.example");
    let begun = tokio::time::Instant::now();
    let (theirs, mut ours) = tokio::io::duplex(1024);
    // The head of a record, and nothing after it.
    ours.write_all(&[0x16, 3, 1, 2, 0]).await.unwrap();
    let error = acceptor(&config).accept(theirs).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(begun.elapsed().as_secs(), HANDSHAKE_TIMEOUT.as_secs());
    let (_theirs, ours) = tokio::io::duplex(1024);
    assert_eq!(
        dialing(&config).connect(Application::Grpc, "a", ours).await.unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
}

#[tokio::test]
async fn silent_connections_hold_up_nobody_and_fail_alone() {
    let authority = Authority::new();
    let config = authority.issue("server", "localhost");
    let dialer = dialing(&config);
    let address = ListenAddress::Tls(([127, 0, 0, 1], 0).into());
    let listener = Listener::bind_all(&address.into(), &config, Application::Grpc).await.unwrap();
    let Address::Tls(bound) = listener.address().unwrap() else { panic!("not TLS") };
    let port = bound.rsplit_once(':').unwrap().1;
    let mut connections = listener.connections();

    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(tokio::net::TcpStream::connect(&bound).await.unwrap());
    }
    let mut plain = tokio::net::TcpStream::connect(&bound).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();

    let begun = Instant::now();
    let address: Address = format!("dns+tls:localhost:{port}").parse().unwrap();
    let dial = address.connect_as(Some(&dialer), Application::Grpc);
    let (dialled, accepted) = tokio::join!(dial, futures::StreamExt::next(&mut connections));
    assert!(matches!(dialled.unwrap(), Connection::Tls(_)));
    assert!(accepted.unwrap().unwrap().is_tls());
    assert!(begun.elapsed() < HANDSHAKE_TIMEOUT);
    // An alert, and the end.
    let mut rest = Vec::new();
    plain.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest.first(), Some(&0x15));
}

#[tokio::test]
async fn who_speaks_tls_where_nobody_listens_for_it_is_told_so_at_once() {
    let authority = Authority::new();
    let dialer = dialing(&authority.issue("server", "127.0.0.1"));
    let listener = Listener::bind(&ListenAddress::Tcp(([127, 0, 0, 1], 0).into())).await.unwrap();
    let Address::Tcp(bound) = listener.address().unwrap() else { panic!("not TCP") };
    let address = Address::Tls(bound);
    let identified = async {
        let connection = listener.accept().await.unwrap().secure().await.unwrap();
        crate::multiplex::identify(connection, &crate::lifecycle::Tasks::new()).await.unwrap_err()
    };
    let begun = Instant::now();
    let (dialled, refused) = tokio::join!(address.connect_as(Some(&dialer), Application::Grpc), identified);
    assert_eq!(refused.to_string(), "the client speaks TLS, which this address does not");
    dialled.unwrap_err();
    assert!(begun.elapsed() < crate::grpc::CONNECT_TIMEOUT);
}

#[test]
fn what_cannot_be_used_is_named_with_its_key() {
    let authority = Authority::new();
    let good = authority.issue("server", "node.example");
    let tls = ListenAddress::Tls(([127, 0, 0, 1], 1).into());
    let faults = |config: &TlsConfig| {
        let faults = config.faults([&tls]);
        faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    assert_eq!(faults(&good), "");
    let missing = Some(authority.path("gone.pem"));
    for (key, config) in [
        ("tls.certificate_path", TlsConfig::NONE),
        ("tls.key_path", TlsConfig { key_path: None, ..good.clone() }),
        ("tls.certificate_path", TlsConfig { certificate_path: None, ..good.clone() }),
        ("tls.certificate_path", TlsConfig { certificate_path: missing.clone(), ..good.clone() }),
        ("tls.key_path", TlsConfig { key_path: missing.clone(), ..good.clone() }),
        ("tls.client_ca_path", TlsConfig { client_ca_path: missing.clone(), ..good.clone() }),
        ("tls.ca_path", TlsConfig { ca_path: missing.clone(), ..good.clone() }),
        // Not what they should be.
        ("tls.certificate_path", TlsConfig { certificate_path: good.key_path.clone(), ..good.clone() }),
        ("tls.key_path", TlsConfig { key_path: good.certificate_path.clone(), ..good.clone() }),
        ("tls.ca_path", TlsConfig { ca_path: good.key_path.clone(), ..good.clone() }),
    ] {
        let told = faults(&config);
        assert!(told.starts_with(&format!("`{key}` is `")), "{key}: {told}");
        assert!(!told.contains("; `"), "one fault and not more: {told}");
    }
    let others = authority.issue("other", "other.example");
    let mixed = TlsConfig { key_path: others.key_path, ..good.clone() };
    assert!(faults(&mixed).contains("not the key of the certificate"), "{}", faults(&mixed));
    let asked_by_nobody = TlsConfig { client_ca_path: good.ca_path.clone(), ..good.clone() };
    assert!(asked_by_nobody.faults([]).iter().any(|fault| fault.key == "tls.client_ca_path"));
}

#[test]
fn a_key_that_others_can_read_is_noticed() {
    let authority = Authority::new();
    let key = authority.issue("server", "node.example").key_path.unwrap();
    assert_eq!(identity::loose_mode(&key), None);
    for mode in [0o640, 0o604, 0o660] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(identity::loose_mode(&key), Some(mode));
    }
}

#[test]
fn nothing_that_is_told_has_a_key_in_it() {
    let authority = Authority::new();
    let good = authority.issue("server", "node.example");
    let key = fs::read_to_string(good.key_path.as_ref().unwrap()).unwrap();
    let secret = key.lines().nth(1).unwrap();
    // A key where something else should be, cut off, and torn.
    let torn = authority.path("torn.key");
    for text in [
        key.replace("-----END", "-----"),
        key.replace("PRIVATE KEY", "CERTIFICATE"),
        key.replacen('A', "*", 2),
    ] {
        fs::write(&torn, text).unwrap();
        for config in [
            TlsConfig { key_path: Some(torn.clone()), ..good.clone() },
            TlsConfig { certificate_path: Some(torn.clone()), ..good.clone() },
            TlsConfig { ca_path: Some(torn.clone()), ..good.clone() },
        ] {
            let told = format!("{:?}", config.faults([]));
            assert!(!told.contains(secret) && !told.contains(&secret[..16]), "{told}");
        }
    }
    let acceptor = Acceptor::new(&good, Application::Grpc);
    assert!(acceptor.is_ok());
    assert!(!format!("{good:?}").contains(secret));
}
