//! How the parts are put together, started and stopped.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use secrecy::SecretString;
use tabularium_common::{
    admin,
    announce::Announcement,
    auth::{NodeTokens, RequireToken},
    bus::{Bus, Link},
    config::{ConfigError, SecretFile},
    grpc::{self, Address, Listener},
    lifecycle::{DrainError, Readiness, Tasks},
    tls::Application,
};
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::Instant,
};
use tonic::Status;

use crate::{
    config::Config,
    db::{self, DatabaseSettings, Db, DbError, geo_log, migrations::Migration, storages},
    health::Health,
    http,
    inspection::Inspector,
    metrics::Metrics,
    queue::Queues,
    repository::RevokedRoute,
    revocation::{Identity, Revoker},
    service,
    sessions::Sessions,
    suspicions::Suspicions,
    tasks,
    topology::{Snapshot, Topology},
    writing::RepositoryIds,
};

/// How long a database may take to say that it is there.
const PING_DEADLINE: Duration = Duration::from_secs(5);
/// Longest pause between two attempts to reach Postgres at start.
const MAX_START_PAUSE: Duration = Duration::from_secs(2);

/// Why a coordinator does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A secret cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Postgres does not answer, or is not as we need it.
    #[error("{0}")]
    Database(String),
    /// Postgres cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// The URL of the message bus cannot be used.
    #[error("nats_url: {0}")]
    Bus(String),
    /// The announcement cannot be written.
    #[error("cannot write {path}: {source}")]
    Announce {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Reflection cannot be built from our descriptors.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Something did not stop in time.
    #[error(transparent)]
    Drain(#[from] DrainError),
}

/// What every request and task works with.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) db: Db,
    pub(crate) sessions: Sessions,
    pub(crate) identity: Identity,
    pub(crate) revoker: Revoker,
    pub(crate) health: Health,
    pub(crate) topology: Topology,
    pub(crate) metrics: Metrics,
    /// Rung when there may be something in the outbox.
    pub(crate) bell: Notify,
    pub(crate) inspector: Inspector,
    pub(crate) suspicions: Suspicions,
    /// Looks through replicas that somebody waits for.
    pub(crate) checks: Arc<Semaphore>,
    pub(crate) repository_ids: RepositoryIds,
    /// Who waits for which write ticket.
    pub(crate) queues: Queues,
    pub(crate) link: watch::Receiver<Link>,
    pub(crate) tasks: Tasks,
}

impl Shared {
    /// Revokes a route and waits, also when the caller hangs up meanwhile.
    pub(crate) async fn revoke_now(&self, route: RevokedRoute, row: i64) -> Result<(), Status> {
        let revoker = self.revoker.clone();
        let task = self.tasks.spawn("revoke-route", async move { revoker.revoke(&[route], vec![row]).await });
        Ok(task.await.map_err(|error| Status::internal(error.to_string()))??)
    }

    /// Revokes routes without making anybody wait. If it fails, `rows` stay in the database and a sweep does it.
    pub(crate) fn revoke_later(&self, routes: Vec<RevokedRoute>, rows: Vec<i64>) {
        let revoker = self.revoker.clone();
        self.tasks.spawn("revoke-routes", async move {
            if let Err(error) = revoker.revoke(&routes, rows).await {
                tracing::warn!(%error, "routes could not be revoked everywhere");
            }
        });
    }
}

/// A coordinator that serves.
pub struct Coordinator {
    shared: Arc<Shared>,
    readiness: Readiness,
    grpc: Address,
    http: Option<Address>,
}

/// The secrets of a configuration, as its files hold them.
#[derive(Clone, Default)]
pub struct Secrets {
    /// What callers must prove to know.
    pub token: Option<SecretString>,
    /// What storage nodes want from us.
    pub nodes: NodeTokens,
}

impl Secrets {
    /// Reads every file that a configuration names.
    pub fn read(config: &Config) -> Result<Self, ConfigError> {
        let read = |file: &Option<SecretFile>| file.as_ref().map(SecretFile::read).transpose();
        Ok(Self { token: read(&config.token_file)?, nodes: read(&config.node_token_file)?.into() })
    }
}

/// The database settings of a configuration.
pub(crate) fn database(config: &Config) -> Result<DatabaseSettings, ConfigError> {
    Ok(DatabaseSettings {
        url: config.database_url.secret(),
        password: config.database_password_file.as_ref().map(SecretFile::read).transpose()?,
        tls: config.database_tls.clone(),
        schema: config.database_schema.clone(),
        max_connections: config.max_database_connections,
    })
}

/// Checks that Postgres answers and has our schema.
pub async fn ping(config: &Config) -> Result<(), RunError> {
    match db::ping(&database(config)?, PING_DEADLINE).await {
        Ok(true) => Ok(()),
        Ok(false) => {
            let schema = &config.database_schema;
            Err(RunError::Database(format!("the database answers; its schema `{schema}` is not set up")))
        }
        Err(error @ DbError::Unavailable(_)) => Err(RunError::Unreachable(error.to_string())),
        Err(error) => Err(RunError::Database(error.to_string())),
    }
}

fn told(error: DbError) -> RunError {
    match error {
        error @ DbError::Unavailable(_) => RunError::Unreachable(error.to_string()),
        error => RunError::Database(error.to_string()),
    }
}

/// Which migrations the database has, and which it lacks.
pub async fn migrations(config: &Config) -> Result<Vec<Migration>, RunError> {
    db::migrations::migration_list(&database(config)?, PING_DEADLINE).await.map_err(told)
}

/// Checks that the database can be written to.
pub async fn read_write(config: &Config) -> Result<(), RunError> {
    db::migrations::write_and_undo(&database(config)?, PING_DEADLINE).await.map_err(told)
}

/// What others are to dial: the address that the configuration has, or else the bound one, or this machine by its host name when
/// that is all of its addresses.
fn reachable(bound: &Address, host: &str) -> Address {
    let (text, make): (_, fn(String) -> Address) = match bound {
        Address::Tcp(text) => (text, Address::Tcp),
        Address::Tls(text) => (text, Address::Tls),
        _ => return bound.clone(),
    };
    match text.parse::<SocketAddr>() {
        Ok(socket) if socket.ip().is_unspecified() && !host.is_empty() => {
            make(format!("{host}:{}", socket.port()))
        }
        _ => bound.clone(),
    }
}

/// Brings the schema up to date, waiting for Postgres at most `timing.database_start`.
pub async fn migrate(config: &Config) -> Result<(), RunError> {
    let settings = database(config)?;
    let deadline = Instant::now() + config.timing.database_start.0;
    let mut pause = Duration::from_millis(100);
    loop {
        match db::migrate(&settings).await {
            Ok(()) => return Ok(()),
            Err(error @ DbError::Unavailable(_)) if Instant::now() + pause < deadline => {
                tracing::warn!(%error, "waiting for the database");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_START_PAUSE);
            }
            Err(error @ DbError::Unavailable(_)) => {
                let waited = config.timing.database_start;
                return Err(RunError::Database(format!("no usable database after {waited}: {error}")));
            }
            Err(error) => return Err(RunError::Database(error.to_string())),
        }
    }
}

impl Coordinator {
    /// Binds, waits for Postgres, brings it up to date, asks the nodes how they are, and serves.
    pub async fn start(config: Config) -> Result<Self, RunError> {
        let secrets = Secrets::read(&config)?;
        let http_listen = config.http_listen.to_string();
        let failed = |source| RunError::Listen { address: http_listen.clone(), source };
        let listener =
            Listener::bind_all(&config.http_listen, &config.tls, Application::Http1).await.map_err(failed)?;
        let address = listener.address().map_err(failed)?;
        let bus = Bus::connect(&config.nats_url, "tabularium-coordinator")
            .await
            .map_err(|error| RunError::Bus(error.to_string()))?;
        let mut registry = Registry::default();
        let mut coordinator = Self::start_with(config, secrets, &bus, &mut registry).await?;
        let admin = admin::routes(Arc::new(registry), coordinator.readiness());
        http::serve(&coordinator.shared.tasks, listener, coordinator.routes().merge(admin));
        coordinator.http = Some(address);
        Ok(coordinator)
    }

    /// As [`Self::start`], for a process that has more in it than a coordinator: with secrets, a bus and a registry of
    /// metrics of its own, and without HTTP. `nats_url`, `http_listen` and the files of secrets are not looked at.
    pub async fn start_with(
        config: Config,
        secrets: Secrets,
        bus: &Bus,
        registry: &mut Registry,
    ) -> Result<Self, RunError> {
        let require = RequireToken::new(secrets.token).counted(registry, "coordinator");
        let send = require.to_send();
        let listener = Listener::bind_all(&config.listen, &config.tls, Application::Grpc)
            .await
            .map_err(|source| RunError::Listen { address: config.listen.to_string(), source })?;
        let grpc = listener
            .address()
            .map_err(|source| RunError::Listen { address: config.listen.to_string(), source })?;

        migrate(&config).await?;
        let db =
            Db::open(&database(&config)?).await.map_err(|error| RunError::Database(error.to_string()))?;
        let stored =
            store_topology(&config, &db).await.map_err(|error| RunError::Database(error.to_string()))?;
        let metrics = Metrics::new(registry);
        let sessions = Sessions::new(config.timing.router_lease.0);
        let identity = Identity::default();
        let (revoker, done_rows) = Revoker::new(
            db.clone(),
            sessions.clone(),
            identity.clone(),
            send,
            &config.timing,
            metrics.clone(),
        );
        let topology = Topology::new(Snapshot::new(&config, &stored));
        let host = rustix::system::uname();
        let host = host.nodename().to_string_lossy();
        let advertised = reachable(config.advertise.as_ref().unwrap_or(&grpc), &host);
        let shared = Arc::new(Shared {
            config,
            db,
            sessions,
            identity,
            revoker,
            health: Health::new(secrets.nodes.clone()),
            topology,
            metrics,
            bell: Notify::new(),
            inspector: Inspector::new(secrets.nodes),
            suspicions: Suspicions::default(),
            checks: Arc::new(Semaphore::new(service::CHECKS_AT_ONCE)),
            repository_ids: RepositoryIds::default(),
            queues: Queues::default(),
            link: bus.link(),
            tasks: Tasks::new(),
        });
        shared.health.dial_all(&shared.topology.get()).await;

        let readiness = Readiness::new();
        shared.sessions.start(&shared.tasks);
        tasks::heartbeat::start(&shared, &advertised, readiness.clone()).await;
        tasks::start(&shared, bus, done_rows);
        serve_grpc(&shared, listener, &require)?;
        Ok(Self { shared, readiness, grpc, http: None })
    }

    /// Where gRPC is served.
    pub fn grpc_address(&self) -> &Address {
        &self.grpc
    }

    /// Where HTTP is served, if it is.
    pub fn http_address(&self) -> Option<&Address> {
        self.http.as_ref()
    }

    /// Status over HTTP.
    pub fn routes(&self) -> axum::Router {
        http::routes(&self.shared)
    }

    /// Whether it takes work.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Writes the addresses to a file.
    pub fn announce(&self, path: &Path) -> Result<(), RunError> {
        let mut announcement = Announcement::of_this_process();
        announcement.grpc = Some(self.grpc.to_string());
        announcement.http = self.http.as_ref().map(Announcement::http_at);
        announcement
            .write(path)
            .map_err(|source| RunError::Announce { path: path.display().to_string(), source })
    }

    /// Stops: not ready, no new requests, what runs is finished, routers' leases run out, tasks end.
    pub async fn stop(self) -> Result<(), RunError> {
        self.readiness.set(false);
        let drain = Duration::from_secs(self.shared.config.drain_seconds);
        self.shared.sessions.stop_granting();
        let drained = self.shared.tasks.drain(drain).await;
        self.shared.db.close().await;
        Ok(drained?)
    }
}

/// Writes the configured storages to the database and reads back all there are.
async fn store_topology(config: &Config, db: &Db) -> Result<Vec<storages::StoredStorage>, DbError> {
    for virtual_storage in &config.virtual_storages {
        let (factor, quorum) = (virtual_storage.default_replication_factor, virtual_storage.write_quorum);
        db.retrying(|| storages::virtual_storage_upsert(db.pool(), &virtual_storage.name, factor, quorum))
            .await?;
        for storage in &virtual_storage.storages {
            let storage = storages::Storage {
                virtual_storage: virtual_storage.name.clone(),
                name: storage.name.clone(),
                address: storage.address.clone(),
            };
            db.retrying(|| storages::storage_upsert(db.pool(), &storage)).await?;
        }
    }
    for site in &config.subscribers {
        db.retrying(|| geo_log::subscriber_add(db.pool(), &site.name)).await?;
    }
    db.retrying(|| storages::storage_list(db.pool())).await
}

fn serve_grpc(shared: &Arc<Shared>, listener: Listener, require: &RequireToken) -> Result<(), RunError> {
    let router = service::add(grpc::server(), shared, require)?;
    let stopping = shared.tasks.stopping();
    shared.tasks.spawn("grpc", async move {
        if let Err(error) =
            router.serve_with_incoming_shutdown(listener.connections(), stopping.cancelled_owned()).await
        {
            tracing::error!(%error, "gRPC listener failed");
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_interfaces_are_advertised_by_the_host_name() {
        let advertised = |bound: &str| reachable(&bound.parse().unwrap(), "pod-7").to_string();
        assert_eq!(advertised("tcp://0.0.0.0:2306"), "tcp://pod-7:2306");
        assert_eq!(advertised("tcp://[::]:2306"), "tcp://pod-7:2306");
        assert_eq!(advertised("tcp://127.0.0.1:2306"), "tcp://127.0.0.1:2306");
        assert_eq!(advertised("tls://0.0.0.0:2306"), "tls://pod-7:2306");
        assert_eq!(advertised("unix:/run/c.sock"), "unix:/run/c.sock");
    }
}
