//! Connections to Postgres over TLS, in every mode of libpq's that there is.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::Path,
};

use tabularium_coordinator::{Config, ping};
use tabularium_testkit::{
    certificates::{Authority, Issued},
    postgres::{Durability, PostgresServer},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

/// Everybody who comes over TCP has to speak TLS, and to the database `strict` with a certificate; but to `plain` nobody may.
const ACCESS: &str = "local all all trust\n\
                      hostnossl plain all 127.0.0.0/8 trust\n\
                      hostssl plain all 127.0.0.0/8 reject\n\
                      hostssl strict all 127.0.0.0/8 trust clientcert=verify-ca\n\
                      hostssl all all 127.0.0.0/8 trust\n";

/// A server on loopback addresses that no other test of this machine uses.
struct Server {
    _postgres: PostgresServer,
    /// The certificate is for this one.
    named: String,
    /// And not for this one.
    unnamed: String,
}

/// As the server's own user, who alone may read it.
fn give(server: &PostgresServer, from: &Path, name: &str) -> String {
    let path = server.directory().join(name);
    let owner = fs::metadata(server.directory()).unwrap();
    fs::copy(from, &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    path.display().to_string()
}

impl Server {
    async fn start(authority: &Authority, directory: &Path) -> Self {
        let id = std::process::id();
        let network = format!("127.{}.{}", 16 + (id >> 8) % 200, id % 256);
        let (named, unnamed) = (format!("{network}.1"), format!("{network}.2"));
        let mut postgres = PostgresServer::start(directory, Durability::ThrowAway).await.unwrap();
        for database in ["open", "strict", "plain"] {
            postgres.create_database(database).await.unwrap();
        }
        let Issued { certificate_path, key_path } = authority.issue("postgres", &[&named]);
        let access = authority.directory().join("access");
        fs::write(&access, ACCESS).unwrap();
        let settings = [
            ("ssl", "on".to_owned()),
            ("ssl_cert_file", give(&postgres, &certificate_path, "server.pem")),
            ("ssl_key_file", give(&postgres, &key_path, "server.key")),
            ("ssl_ca_file", give(&postgres, &authority.path(), "clients.pem")),
            ("hba_file", give(&postgres, &access, "access")),
            ("listen_addresses", format!("{named},{unnamed}")),
        ];
        postgres.configure(settings.map(|(name, value)| (name.to_owned(), value)).to_vec()).await.unwrap();
        Self { _postgres: postgres, named, unnamed }
    }
}

fn config(host: &str, database: &str, tls: &str) -> Config {
    let text = format!(
        "site = 'here'\nnats_url = 'nats://127.0.0.1:1'\n\
         database_url = 'postgres://tabularium@{host}/{database}'\n\
         [[virtual_storage]]\nname = 'default'\n\
         [[virtual_storage.storage]]\nname = 'node-1'\naddress = 'tls://node-1:9999'\n\
         [database_tls]\n{tls}\n"
    );
    tabularium_common::config::parse(Path::new("coordinator.toml"), &text).unwrap()
}

/// Whether the database answers; its tables are not there.
async fn reach(host: &str, database: &str, tls: &str) -> Result<(), String> {
    match ping(&config(host, database, tls)).await.map_err(|error| error.to_string()) {
        Err(error) if !error.contains("is not set up") => Err(error),
        _ => Ok(()),
    }
}

#[tokio::test]
async fn the_connection_is_as_safe_as_it_was_asked_to_be() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let directory = tempfile::Builder::new().prefix("tabularium-test-pg-tls-").tempdir_in("/tmp").unwrap();
    let server = Server::start(&authority, &directory.path().join("postgres")).await;
    let root = |authority: &Authority| format!("sslrootcert = '{}'\n", authority.path().display());
    let (ours, strange) = (root(&authority), root(&stranger));
    let mode = |mode: &str| format!("sslmode = '{mode}'\n");
    for (host, tls, expected) in [
        (&server.named, String::new(), None),
        (&server.named, mode("disable"), Some("no encryption")),
        (&server.named, mode("allow"), None),
        (&server.named, mode("prefer"), None),
        (&server.unnamed, mode("require"), None),
        // As libpq has it: who names authorities means it.
        (&server.unnamed, mode("require") + &ours, None),
        (&server.unnamed, mode("require") + &strange, Some("UnknownIssuer")),
        (&server.unnamed, mode("verify-ca") + &ours, None),
        (&server.named, mode("verify-ca") + &strange, Some("UnknownIssuer")),
        (&server.named, mode("verify-full") + &ours, None),
        (&server.unnamed, mode("verify-full") + &ours, Some("not valid for name")),
        (&server.named, mode("verify-full") + &strange, Some("UnknownIssuer")),
    ] {
        let reached = reach(host, "open", &tls).await;
        match expected {
            None => assert_eq!(reached, Ok(()), "{tls}"),
            Some(text) => {
                let error = reached.expect_err(&tls);
                assert!(error.contains(text), "{tls}: {error}");
            }
        }
    }

    assert_eq!(reach(&server.named, "plain", &mode("allow")).await, Ok(()));
    let error = reach(&server.named, "plain", &mode("require")).await.unwrap_err();
    assert!(error.contains("plain"), "{error}");

    let full = mode("verify-full") + &ours;
    let error = reach(&server.named, "strict", &full).await.unwrap_err();
    assert!(error.contains("certificate"), "{error}");
    let shown = |issued: Issued| {
        format!(
            "sslcert = '{}'\nsslkey = '{}'\n",
            issued.certificate_path.display(),
            issued.key_path.display()
        )
    };
    let known = shown(authority.issue("client", &["coordinator"]));
    reach(&server.named, "strict", &(full.clone() + &known)).await.unwrap();
    let unknown = shown(stranger.issue("client", &["coordinator"]));
    reach(&server.named, "strict", &(full + &unknown)).await.unwrap_err();
}

#[tokio::test]
async fn a_server_without_tls_gets_nothing_from_who_requires_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut question = [0; 8];
        stream.read_exact(&mut question).await.unwrap();
        stream.write_all(b"N").await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        rest
    };
    let (rest, reached) = tokio::join!(server, reach(&host, "open", "sslmode = 'require'"));
    assert_eq!(rest, b"", "neither user nor database are told");
    assert!(reached.unwrap_err().contains("server does not support TLS"));
}

#[tokio::test]
async fn who_allows_tls_does_not_begin_with_it() {
    /// Of PostgreSQL's protocol, where a client that wants TLS asks for that first.
    const VERSION_3: [u8; 4] = [0, 3, 0, 0];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 8];
        stream.read_exact(&mut head).await.unwrap();
        head
    };
    let (head, reached) = tokio::join!(server, reach(&host, "open", "sslmode = 'allow'"));
    assert_eq!(head[4..], VERSION_3);
    reached.unwrap_err();
}
