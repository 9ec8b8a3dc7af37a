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
//!   client has gone. What has not begun begins again when a node or a route turns out to be no good;
//! * *maintenance* goes to every replica;
//! * what Praefect answers itself, `answers` does.
//!
//! `body` holds the wrappers that make a lost node a status, and bound the whole exchange by the client's deadline.
//! Writes go over `nodes::multiplexed`, on which nodes ask back how the vote went; all else over plain pools. `routes::session` keeps the lease and takes revocations.
//!
//! Pure parts are tested beside the code (`routing`, `wire`, `routes::cache`, `votes::transaction`); `tests/it` runs a router between fake nodes
//! and a fake coordinator: `cargo test -p tabularium-router`.

mod account;
mod answers;
mod body;
mod config;
mod coordinator;
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
mod timeout;
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
use tabularium_common::{
    admin,
    announce::Announcement,
    auth::{RequireToken, SendToken},
    config::{ConfigError, SecretFile},
    grpc::Listener,
    lifecycle::{Readiness, Tasks},
};
use tabularium_proto::gitaly::{
    internal_gitaly_server::InternalGitalyServer, object_pool_service_server::ObjectPoolServiceServer,
    praefect_info_service_server::PraefectInfoServiceServer, ref_transaction_server::RefTransactionServer,
    server_service_server::ServerServiceServer,
};
use tonic::service::Routes as TypedServices;
use tonic_health::{ServingStatus, server::HealthReporter};

pub use config::Config;
pub use routes::WithoutRecords;

use crate::{
    answers::{
        object_pool::ObjectPools, praefect::PraefectInfo, repositories::Repositories, server::Server,
        transaction::NoTransactions,
    },
    coordinator::Coordinators,
    metrics::Metrics,
    nodes::Nodes,
    relay::{Hedging, NodeToken, Relay, Shared},
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

fn secret(file: Option<&SecretFile>) -> Result<Option<secrecy::SecretString>, ConfigError> {
    file.map(SecretFile::read).transpose()
}

/// Runs a router until `stop` is ready, then until what it serves is done, or `drain_seconds` have passed. Call it on a
/// current-thread runtime: that thread is the first worker.
pub async fn run(
    config: Config,
    announce: Option<PathBuf>,
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), RunError> {
    let require = RequireToken(secret(config.token_file.as_ref())?);
    let node_token = SendToken(secret(config.node_token_file.as_ref())?);
    let coordinator_token = SendToken(secret(config.coordinator_token_file.as_ref())?);
    let table = Table::read()?;

    let listener =
        Listener::bind(&config.listen).await.map_err(io(format!("listening on {}", config.listen)))?;
    let address = listener.address().map_err(io("the address of the listener"))?;

    // What serves RPCs is drained first; what keeps leases and writes alive stops after it.
    let serving = Tasks::new();
    let background = Tasks::new();
    let readiness = Readiness::new();
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry));
    let admin = admin::serve(config.admin_listen, Arc::new(registry), readiness.clone(), &background)
        .await
        .map_err(io(format!("listening on {}", config.admin_listen)))?;

    let router_id = uuid::Uuid::new_v4().to_string();
    let workers = config.worker_count();
    let coordinators = Coordinators::new(&config.coordinators, &coordinator_token);
    let transactions = Transactions::default();
    let votes = TypedServices::new(RefTransactionServer::new(transactions.clone())).prepare();
    let nodes = Arc::new(Nodes::new(workers, votes, background.clone(), Arc::clone(&metrics)));
    let routes = Arc::new(Routes::new(coordinators.clone(), Arc::clone(&metrics)));
    let writes = Writes::new(coordinators.clone(), router_id.clone(), serving.clone(), Arc::clone(&metrics));
    let confirmations = Confirmations::new(
        Arc::clone(&routes),
        Arc::clone(&nodes),
        node_token.clone(),
        config.without_database,
    );
    let (health, typed) = typed_services(&nodes, &routes, &coordinators, &node_token)?;
    health.set_service_status("", ServingStatus::NotServing).await;
    let shared = Arc::new(Shared {
        table,
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
        typed,
    });
    let relays = (0..workers)
        .map(|worker| Relay::new(Arc::clone(&shared), worker, NodeToken::new(node_token.clone())))
        .collect();
    let workers = Workers::start(relays, &serving).map_err(io("starting workers"))?;

    if let Some(path) = announce {
        let mut announcement = Announcement::of_this_process();
        announcement.grpc = Some(address.to_string());
        announcement.admin = Some(admin.to_string());
        announcement.write(&path).map_err(io(format!("writing {}", path.display())))?;
    }
    tracing::info!(%address, %admin, %router_id, "router is listening");

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
    until_stopped(&background, "node probes", nodes.probe(node_token));
    until_stopped(&background, "write renewal", writes.renew());

    let stopped = tokio::select! {
        stopped = stop => stopped,
        () = workers.accept(listener) => Ok(()),
    };
    readiness.set(false);
    health.set_service_status("", ServingStatus::NotServing).await;
    tracing::info!("router is stopping");
    if let Err(error) = serving.drain(Duration::from_secs(config.drain_seconds)).await {
        tracing::warn!(%error, "not everything was done in time");
    }
    if let Err(error) = background.drain(BACKGROUND_DRAIN).await {
        tracing::debug!(%error, "background tasks");
    }
    workers.join();
    stopped.map_err(io("waiting for the signal to stop"))
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
    token: &SendToken,
) -> Result<(HealthReporter, TypedServices), tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tabularium_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let server = Server { nodes: Arc::clone(nodes), routes: Arc::clone(routes), token: token.clone() };
    let praefect = PraefectInfo {
        nodes: Arc::clone(nodes),
        routes: Arc::clone(routes),
        coordinators: coordinators.clone(),
        token: token.clone(),
    };
    let pools = ObjectPools {
        nodes: Arc::clone(nodes),
        routes: Arc::clone(routes),
        coordinators: coordinators.clone(),
        token: token.clone(),
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
        .add_service(RefTransactionServer::new(NoTransactions))
        .prepare();
    Ok((reporter, services))
}
