//! The router: what clients of Gitaly connect to instead of Gitaly.
//!
//! It relays every RPC to the storage nodes that hold the repository, and keeps nothing: which replicas are up to date,
//! where writes go and what was written is the coordinator's knowledge. It must not know SQL, git or the message bus.
//!
//! An RPC enters at [`serve`] (one HTTP/2 connection), where `relay` takes over: the token is checked, the path is looked
//! up in `table` (made from the method registry; no code is written per method), the first message is read
//! (`first_message`) and the repository found in it (`wire`) without decoding it. Then
//! * a *read* gets the route from `routes` (cached under a lease, else asked), `routing` picks an up-to-date replica, and
//!   `nodes` carries the rewritten request to it. `relay::read` holds the answer until it is known how it begins
//!   (`relay::attempt`; what that says of the replica is judged in `routing::judgement`): until then another replica can take
//!   over, because the front of the client's stream is kept (`replay`), and one is asked beside a node that is silent for too
//!   long (`patience`). `suspicions` tells a coordinator of replicas that failed what others could do. The rest of the stream
//!   and the whole answer pass through as they are, but for the generation that is said with them (`relay::freshness`).
//!   When no coordinator answers, the replicas' own records say which is the newest (`routes::confirmation`);
//! * a *write* becomes a task of its own (`relay::write`). Every up-to-date replica that is healthy takes part: the client's
//!   stream is given to all of them (`relay::fan_out`), each votes before and after it changes its refs, and what the
//!   votes mean is decided in `votes::transaction`, without I/O. `turns` queues for the repository's ticket, `writes`
//!   holds it between `BeginWrite` and `CommitWrite`, and `relay::drive` carries all of it out, to the end even when the
//!   client has gone. Where votes do not tell what nodes have, `relay::drive::comparison` asks what they hold. What has not
//!   begun begins again when a node or a route turns out to be no good;
//! * *maintenance* goes to every replica;
//! * what Praefect answers itself, `answers` does.
//!
//! A client that begins with Gitaly's preamble has a multiplexed connection. What it fetches goes beside the RPC, from a
//! stream of the node's connection to one of its own (`relay::beside`).
//!
//! `body` holds the wrappers that make a lost node a status, and bound the whole exchange by the client's deadline.
//! Writes go over `nodes::multiplexed`, on which nodes ask back how the vote went; all else over plain pools.
//! `routes::session` keeps the lease and takes revocations.
//!
//! Pure parts are tested beside the code (`routing`, `wire`, `routes::cache`, `votes::transaction`); `tests/it` runs a router
//! between fake nodes and a fake coordinator: `cargo test -p tabularium-router`.

mod account;
mod answers;
mod body;
mod config;
mod coordinator;
mod feature_flags;
mod first_message;
mod limits;
mod metrics;
mod nodes;
mod patience;
mod refusal;
mod relay;
mod replay;
mod routes;
mod routing;
mod serve;
mod suspicions;
mod table;
mod turns;
mod votes;
mod wire;
mod writes;

use std::{
    future::Future,
    path::PathBuf,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use prometheus_client::registry::Registry;
use secrecy::SecretString;
use tabularium_common::{
    admin,
    announce::Announcement,
    auth::{NodeTokens, RequireToken, SendToken},
    config::{ConfigError, SecretFile},
    grpc::Listener,
    lifecycle::{Readiness, Tasks},
    tls::Application,
};
use tabularium_proto::gitaly::{
    internal_gitaly_server::InternalGitalyServer, object_pool_service_server::ObjectPoolServiceServer,
    praefect_info_service_server::PraefectInfoServiceServer, ref_transaction_server::RefTransactionServer,
    server_service_server::ServerServiceServer,
};
use tokio::net::TcpListener;
use tonic::service::Routes as TypedServices;
use tonic_health::{ServingStatus, server::HealthReporter};

pub use config::Config;
pub use feature_flags::{FeatureFlags, FlagNameError};
pub use routes::WithoutRecords;

use crate::{
    answers::{
        object_pool::ObjectPools, praefect::PraefectInfo, repositories::Repositories, server::Server,
        transaction::NoTransactions,
    },
    coordinator::Coordinators,
    metrics::Metrics,
    nodes::Nodes,
    relay::{Hedging, Relay, Shared},
    routes::{Routes, confirmation::Confirmations, session::Sessions},
    serve::Workers,
    suspicions::Suspicions,
    table::Table,
    turns::Turns,
    votes::Transactions,
    writes::Writes,
};

/// How long background tasks may take to stop once the last RPC is done.
const BACKGROUND_DRAIN: Duration = Duration::from_secs(2);

/// Why a router did not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A secret cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener cannot be bound, the announcement not written, or a thread not started.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The method table of this build cannot be read.
    #[error(transparent)]
    Table(#[from] tabularium_common::methods::TableError),
    /// The reflection service cannot be built.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> RunError {
    let what = what.into();
    move |source| RunError::Io { what, source }
}

/// The secrets of a configuration, as its files hold them.
#[derive(Clone, Default)]
pub struct Secrets {
    /// Clients' tokens are signed with it.
    pub clients: Option<SecretString>,
    /// Of the storage nodes.
    pub nodes: NodeTokens,
    /// Of the coordinators.
    pub coordinators: Option<SecretString>,
}

impl Secrets {
    /// Reads every file that a configuration names.
    pub fn read(config: &Config) -> Result<Self, ConfigError> {
        let read = |file: &Option<SecretFile>| file.as_ref().map(SecretFile::read).transpose();
        Ok(Self {
            clients: read(&config.token_file)?,
            nodes: read(&config.node_token_file)?.into(),
            coordinators: read(&config.coordinator_token_file)?,
        })
    }
}

/// What a router finds around it. In a process of its own it is made by [`run`].
pub struct Surroundings<'a> {
    /// In place of the files that the configuration names.
    pub secrets: Secrets,
    /// In place of `listen`.
    pub listener: Listener,
    /// Where the router's metrics are registered, in place of `admin_listen`.
    pub registry: &'a mut Registry,
    /// What operators and other coordinators ask of a coordinator is passed on to it: they know this router's address only.
    pub passes_to_coordinator: bool,
}

/// A router that listens; [`Router::serve`] makes it answer.
pub struct Router {
    listener: Listener,
    workers: Workers,
    serving: Tasks,
    background: Tasks,
    readiness: Readiness,
    health: HealthReporter,
    drain: Duration,
}

/// Runs a router until `stop` is ready, then until what it serves is done, or `drain_seconds` have passed. Call it on a
/// current-thread runtime: that thread is the first worker.
pub async fn run(
    config: Config,
    announce: Option<PathBuf>,
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), RunError> {
    let secrets = Secrets::read(&config)?;
    let listener = Listener::bind_all(&config.listen, &config.tls, Application::Grpc)
        .await
        .map_err(io(format!("listening on {}", config.listen)))?;
    let address = listener.address().map_err(io("the address of the listener"))?;
    let on_admin = || io(format!("listening on {}", config.admin_listen));
    let admin_listener = TcpListener::bind(config.admin_listen).await.map_err(on_admin())?;
    let admin = admin_listener.local_addr().map_err(on_admin())?;
    let mut registry = Registry::default();
    let surroundings =
        Surroundings { secrets, listener, registry: &mut registry, passes_to_coordinator: false };
    let router = Router::start(&config, surroundings).await?;
    let routes = admin::routes(Arc::new(registry), router.readiness());
    admin::serve_on(admin_listener, routes, &router.background);
    if let Some(path) = announce {
        let mut announcement = Announcement::of_this_process();
        announcement.grpc = Some(address.to_string());
        announcement.admin = Some(admin.to_string());
        announcement.write(&path).map_err(io(format!("writing {}", path.display())))?;
    }
    tracing::info!(%address, %admin, "router is listening");
    router.serve(stop).await
}

impl Router {
    /// Starts everything but the answering. Call it on the runtime that [`Router::serve`] is called on.
    pub async fn start(config: &Config, surroundings: Surroundings<'_>) -> Result<Self, RunError> {
        let Surroundings { secrets, listener, registry, passes_to_coordinator } = surroundings;
        let require = RequireToken::new(secrets.clients)
            .transitioning(config.token_transitioning)
            .counted(registry, "router");
        let coordinator_token = SendToken(secrets.coordinators);
        let table = Table::read()?;

        // What serves RPCs is drained first; what keeps leases and writes alive stops after it.
        let serving = Tasks::new();
        let background = Tasks::new();
        let readiness = Readiness::new();
        let metrics = Arc::new(Metrics::new(registry));

        let router_id = uuid::Uuid::new_v4().to_string();
        let workers = config.worker_count();
        let coordinators = Coordinators::new(&config.coordinators, &coordinator_token);
        let transactions = Transactions::default();
        let votes = TypedServices::new(RefTransactionServer::new(transactions.clone())).prepare();
        let nodes =
            Arc::new(Nodes::new(workers, secrets.nodes, votes, background.clone(), Arc::clone(&metrics)));
        let routes = Arc::new(Routes::new(coordinators.clone(), Arc::clone(&metrics)));
        let writes =
            Writes::new(coordinators.clone(), router_id.clone(), serving.clone(), Arc::clone(&metrics));
        let confirmations =
            Confirmations::new(Arc::clone(&routes), Arc::clone(&nodes), config.without_database);
        let (health, mut typed) = typed_services(&nodes, &routes, &coordinators)?;
        if passes_to_coordinator {
            typed = answers::passage::add(typed, &coordinators);
        }
        let typed = typed.prepare();
        health.set_service_status("", ServingStatus::NotServing).await;
        let shared = Arc::new(Shared {
            table,
            feature_flags: config.feature_flags.clone(),
            require,
            metrics,
            nodes: Arc::clone(&nodes),
            routes: Arc::clone(&routes),
            confirmations,
            writes: writes.clone(),
            turns: Turns::default(),
            transactions,
            tasks: serving.clone(),
            coordinators: coordinators.clone(),
            suspicions: Suspicions::default(),
            hedging: Hedging { after: config.hedge_after.0, percent: config.hedge_percent },
            hold_answers: config.hold_answers.0,
            typed,
            passes_to_coordinator,
        });
        let relays = (0..workers).map(|worker| Relay::new(Arc::clone(&shared), worker)).collect();
        let workers = Workers::start(relays, &serving, &background).map_err(io("starting workers"))?;

        until_stopped(&background, "revoked routes", Arc::clone(&routes).learn_again());
        until_stopped(&background, "coordinator probes", coordinators.clone().watch());
        let sessions = Sessions {
            coordinators,
            routes,
            nodes: Arc::clone(&nodes),
            router_id,
            readiness: readiness.clone(),
            health: health.clone(),
        };
        until_stopped(&background, "session", sessions.run());
        until_stopped(&background, "node probes", nodes.probe());
        until_stopped(&background, "write renewal", writes.renew());

        let drain = Duration::from_secs(config.drain_seconds);
        Ok(Self { listener, workers, serving, background, readiness, health, drain })
    }

    /// Whether it takes work.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Answers until `stop` is ready, then until what it serves is done, or `drain_seconds` have passed.
    pub async fn serve(self, stop: impl Future<Output = std::io::Result<()>>) -> Result<(), RunError> {
        let Self { listener, workers, serving, background, readiness, health, drain } = self;
        let stopped = tokio::select! {
            stopped = stop => stopped,
            () = async {
                first_word(&readiness).await;
                workers.accept(listener).await;
            } => Ok(()),
        };
        readiness.set(false);
        health.set_service_status("", ServingStatus::NotServing).await;
        tracing::info!("router is stopping");
        if let Err(error) = serving.drain(drain).await {
            tracing::warn!(%error, "not everything was done in time");
        }
        if let Err(error) = background.drain(BACKGROUND_DRAIN).await {
            tracing::debug!(%error, "background tasks");
        }
        workers.join();
        stopped.map_err(io("waiting for the signal to stop"))
    }
}

/// Clients that are early wait for the coordinator's first word instead of being refused, for a moment: a process that takes
/// another one's sockets over has clients from its first instant on.
async fn first_word(readiness: &Readiness) {
    let waiting = async {
        while !readiness.get() {
            tokio::time::sleep(limits::FIRST_WORD_GLANCE).await;
        }
    };
    if tokio::time::timeout(limits::FIRST_WORD_WAIT, waiting).await.is_err() {
        tracing::debug!("clients are served before a coordinator has been reached");
    }
}

fn until_stopped(tasks: &Tasks, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
    let stopping = tasks.stopping();
    tasks.spawn(name, async move {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = work => {}
        }
    });
}

fn typed_services(
    nodes: &Arc<Nodes>,
    routes: &Arc<Routes>,
    coordinators: &Coordinators,
) -> Result<(HealthReporter, TypedServices), tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tabularium_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let server = Server { nodes: Arc::clone(nodes), routes: Arc::clone(routes) };
    let praefect = PraefectInfo {
        nodes: Arc::clone(nodes),
        routes: Arc::clone(routes),
        coordinators: coordinators.clone(),
    };
    let pools = ObjectPools {
        nodes: Arc::clone(nodes),
        routes: Arc::clone(routes),
        coordinators: coordinators.clone(),
        spread: AtomicUsize::default(),
    };
    let repositories = Repositories { coordinators: coordinators.clone() };
    let services = TypedServices::new(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(ServerServiceServer::new(server))
        .add_service(PraefectInfoServiceServer::new(praefect))
        .add_service(ObjectPoolServiceServer::new(pools))
        .add_service(InternalGitalyServer::new(repositories))
        .add_service(RefTransactionServer::new(NoTransactions));
    Ok((reporter, services))
}
