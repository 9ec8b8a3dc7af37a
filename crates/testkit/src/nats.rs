//! NATS servers for tests.

use tabularium_cli::local::nats::NatsServer;
use tokio::sync::OnceCell;

/// Names a server to use instead of starting one.
const URL_VARIABLE: &str = "TABULARIUM_TEST_NATS_URL";

/// Never dropped: see the one of Postgres.
static SHARED: OnceCell<NatsServer> = OnceCell::const_new();

/// A NATS server with JetStream.
#[derive(Debug)]
pub struct Nats {
    url: String,
    own: Option<(NatsServer, tempfile::TempDir)>,
}

impl Nats {
    /// The server that the environment names, or the one that all tests of this process share. Streams have fixed
    /// names, so a test that counts messages wants [`Nats::start_own`].
    pub async fn start() -> Self {
        if let Ok(url) = std::env::var(URL_VARIABLE) {
            return Self { url, own: None };
        }
        let server = SHARED.get_or_init(start_shared).await;
        Self { url: server.url(), own: None }
    }

    /// A server that no other test uses and that may be stopped.
    pub async fn start_own() -> Self {
        let directory = tempfile::Builder::new().prefix("tabularium-test-nats-").tempdir_in("/tmp").unwrap();
        let server = start_server(directory.path()).await;
        Self { url: server.url(), own: Some((server, directory)) }
    }

    /// `nats://host:port`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Stops the server in an orderly way.
    pub async fn stop(&mut self) {
        self.server().stop().await.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Stops the server if it runs; starts it again on the same port with what it stored.
    pub async fn restart(&mut self) {
        self.server().restart().await.unwrap_or_else(|error| panic!("{error}"));
    }

    /// As [`Nats::restart`], having lost all it stored.
    pub async fn restart_empty(&mut self) {
        self.server().restart_empty().await.unwrap_or_else(|error| panic!("{error}"));
    }

    fn server(&mut self) -> &mut NatsServer {
        &mut self.own.as_mut().expect("only a server from `start_own` may be stopped").0
    }
}

async fn start_shared() -> NatsServer {
    let directory =
        tempfile::Builder::new().prefix("tabularium-test-nats-").tempdir_in("/tmp").unwrap().keep();
    start_server(&directory).await
}

async fn start_server(directory: &std::path::Path) -> NatsServer {
    NatsServer::start(directory, None, true).await.unwrap_or_else(|error| panic!("{error}"))
}
