//! The composition root: from a configuration to a serving node, and back to nothing when it is told to stop.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tabularium_common::{
    announce::Announcement,
    auth::RequireToken,
    config::ConfigError,
    grpc::{self, Address, DeadlineLayer, Listener},
    lifecycle::{Readiness, Tasks},
    methods, multiplex,
    tls::Application,
};
use tabularium_proto::{
    DESCRIPTORS,
    gitaly::{
        analysis_service_server::AnalysisServiceServer, blob_service_server::BlobServiceServer,
        cleanup_service_server::CleanupServiceServer, commit_service_server::CommitServiceServer,
        conflicts_service_server::ConflictsServiceServer, diff_service_server::DiffServiceServer,
        internal_gitaly_server::InternalGitalyServer, object_pool_service_server::ObjectPoolServiceServer,
        operation_service_server::OperationServiceServer, ref_service_server::RefServiceServer,
        remote_service_server::RemoteServiceServer, repository_service_server::RepositoryServiceServer,
        server_service_server::ServerServiceServer, smart_http_service_server::SmartHttpServiceServer,
        ssh_service_server::SshServiceServer,
    },
    node::{
        replica_service_server::ReplicaServiceServer, upload_pack_service_server::UploadPackServiceServer,
    },
};
use tokio::{sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::service::{InterceptorLayer, RoutesBuilder};
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tower::util::{MapRequestLayer, MapResponseLayer};

use crate::{
    access::{Access, GitlabError},
    config::{Config, Surroundings},
    copy_attempts::CopyAttempts,
    expectation::ExpectationLayer,
    following::HeadListing,
    git::{Git, command::QUEUE_WAIT},
    hooks::{CustomHooks, Judges},
    kept,
    keyed_locks::KeyedLocks,
    metrics::Metrics,
    node::Node,
    rpc_log::RpcLogLayer,
    services::{
        analysis::AnalysisServer,
        blob_service::BlobServer,
        cleanup::CleanupServer,
        commit_service::{CommitServer, RememberedLanguages},
        diff_service::DiffServer,
        internal::InternalServer,
        object_pool::ObjectPoolServer,
        operation_service::{ConflictsServer, OperationServer},
        ref_service::RefServer,
        remote::RemoteServer,
        replica::ReplicaServer,
        repository::RepositoryServer,
        server_info::ServerInfoServer,
        smart_http::SmartHttpServer,
        ssh::SshServer,
        upload_pack::UploadPackServer,
    },
    signing::{Signing, UnusableKey},
    storage::Storages,
    storage_health::StorageHealth,
    votes::Sections,
    whole_requests,
};

mod preparation;

/// How long tasks may take to end after the drain deadline has been used up by calls: what was killed is reaped.
const LAST_TASKS: Duration = Duration::from_secs(5);

/// Why a node did not start, or did not stop as it should.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A secret cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// GitLab cannot be asked as configured.
    #[error(transparent)]
    Gitlab(#[from] GitlabError),
    /// Commits cannot be signed as configured.
    #[error(transparent)]
    Signing(#[from] UnusableKey),
    /// git is missing or too old.
    #[error("git {}: {problem}", path.display())]
    Git {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The program for git's hooks cannot be used.
    #[error("hook program {}: {source}", path.display())]
    Hooks {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A storage cannot be used.
    #[error("storage {name}: {source}")]
    Storage {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The place of backups cannot be used.
    #[error("backups: {0}")]
    Backups(io::Error),
    /// A listener cannot be bound.
    #[error("listening on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The method table of this build cannot be read.
    #[error(transparent)]
    Methods(#[from] methods::TableError),
    /// The descriptors of this build cannot be read.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Serving failed.
    #[error("serving gRPC: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// Calls or tasks ran beyond the drain deadline and were cut off.
    #[error("{0}")]
    Drain(String),
}

/// A node that serves.
pub struct Running {
    address: Address,
    admin: std::net::SocketAddr,
    readiness: Readiness,
    shutdown: CancellationToken,
    served: JoinHandle<Result<(), tonic::transport::Error>>,
    tasks: Tasks,
    drain: Duration,
    // Each keeps another node off the storage while it is held.
    _claims: Vec<preparation::Claim>,
}

impl Running {
    /// Where clients dial.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Where metrics are.
    pub fn admin(&self) -> std::net::SocketAddr {
        self.admin
    }

    /// The addresses, for the announce file.
    pub fn announcement(&self) -> Announcement {
        let mut announcement = Announcement::of_this_process();
        announcement.grpc = Some(self.address.to_string());
        announcement.admin = Some(self.admin.to_string());
        announcement
    }

    /// Takes work from now on, by the word of its readiness endpoint.
    pub fn ready(&self) {
        self.readiness.set(true);
    }

    /// Serves until serving fails; a stop is for [`Running::stop`].
    pub async fn failed(&mut self) -> ServerError {
        match (&mut self.served).await {
            Ok(Ok(())) => ServerError::Drain("serving ended unasked".to_owned()),
            Ok(Err(error)) => error.into(),
            Err(error) => ServerError::Drain(format!("serving: {error}")),
        }
    }

    /// Not ready, accepts nothing more, finishes what runs within the drain deadline, stops.
    pub async fn stop(mut self) -> Result<(), ServerError> {
        let deadline = tokio::time::Instant::now() + self.drain;
        self.readiness.set(false);
        self.shutdown.cancel();
        let served = match tokio::time::timeout_at(deadline, &mut self.served).await {
            Ok(Ok(result)) => result.map_err(ServerError::from),
            Ok(Err(error)) => Err(ServerError::Drain(format!("serving: {error}"))),
            Err(_) => {
                self.served.abort();
                Err(ServerError::Drain(
                    "calls still ran after the drain deadline and were cut off".to_owned(),
                ))
            }
        };
        let drained =
            self.tasks.drain(deadline.duration_since(tokio::time::Instant::now()).max(LAST_TASKS)).await;
        served.and(drained.map_err(|error| ServerError::Drain(error.to_string())))
    }
}

/// Checks git and the storages, binds the listeners and serves. Runs on when this returns.
pub async fn start(config: Config, surroundings: Surroundings) -> Result<Running, ServerError> {
    let token = config.token_file.as_ref().map(tabularium_common::config::SecretFile::read).transpose()?;
    let signing = config.signing.as_ref().map(Signing::read).transpose()?;
    let program = preparation::find_git(&config.git, &surroundings.search_path);
    let git_version = preparation::git_version(&program, &surroundings.search_path).await?;
    let tasks = Tasks::new();
    let mut claims = Vec::new();
    let mut storages = Vec::new();
    for storage in &config.storage {
        let prepared = preparation::storage(storage, &tasks)
            .map_err(|source| ServerError::Storage { name: storage.name.to_string(), source })?;
        storages.push(prepared.storage);
        claims.push(prepared.claim);
    }

    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let require =
        RequireToken::new(token).transitioning(config.token_transitioning).counted(&mut registry, "node");
    let git = Git::new(
        program,
        surroundings.search_path,
        config.max_git_processes,
        QUEUE_WAIT,
        tasks.clone(),
        metrics.clone(),
    );
    let (health_reporter, _) = tonic_health::server::health_reporter();
    let storage_health =
        StorageHealth::start(&storages, &config.storage_health, health_reporter.clone(), &tasks)
            .await
            .map_err(|source| ServerError::Storage { name: "threads".to_owned(), source })?;
    let sections = Arc::new(Sections::default());
    let hook_program = config.hook_program.as_ref().unwrap_or(&surroundings.hook_program);
    let custom_hooks = CustomHooks::new(config.hooks.custom_hooks_dir.clone());
    let judges = Arc::new(Judges { access: Access::new(config.gitlab.as_ref(), &metrics)?, custom_hooks });
    let hooks = preparation::hooks(hook_program, &storages, &judges, &sections, &tasks)?;
    let head_listing = match storages.first() {
        Some(storage) => HeadListing::find_out(&git, &storage.temporary()).await,
        None => HeadListing::Unknown,
    };
    let shutdown = CancellationToken::new();
    let node = Arc::new(Node {
        storages: Storages::new(storages),
        hooks,
        judges: Arc::clone(&judges),
        sections,
        languages: RememberedLanguages::default(),
        storage_health,
        git,
        tasks: tasks.clone(),
        fetch_proxy: surroundings.fetch_proxy,
        tls: config.tls.clone(),
        git_version,
        head_listing,
        instance: uuid::Uuid::new_v4().to_string(),
        copying: KeyedLocks::default(),
        copy_attempts: CopyAttempts::default(),
        upkeep: KeyedLocks::default(),
        checking: Semaphore::new(1),
        backups: preparation::backups(config.backup.as_ref())?,
        signing,
        kept: config.kept.clone(),
        metrics: metrics.clone(),
        following: config.following.clone(),
        shutdown: shutdown.clone(),
    });
    kept::start(&node);
    let stop_asking = shutdown.clone();
    tasks.spawn("introduction to GitLab", async move {
        stop_asking.run_until_cancelled(judges.access.introduce()).await;
    });

    let listener = bind(&config).await?;
    let listen_error = |source| ServerError::Listen { address: config.admin_listen.to_string(), source };
    // Bound here and not only when it is served, so that nothing has started when a port is taken.
    let address = listener.address().map_err(listen_error)?;
    let readiness = Readiness::new();
    let admin =
        tabularium_common::admin::serve(config.admin_listen, Arc::new(registry), readiness.clone(), &tasks)
            .await
            .map_err(listen_error)?;

    let router = grpc::server()
        .layer(DeadlineLayer)
        .layer(MapRequestLayer::new(multiplex::introduce))
        .layer(RpcLogLayer::new(Arc::new(methods::Registry::read()?), metrics))
        .layer(MapResponseLayer::new(grpc::say_as_gitaly_does))
        .layer(InterceptorLayer::new(require))
        .layer(ExpectationLayer::new(Arc::clone(&node)))
        .layer(MapRequestLayer::new(whole_requests::guard))
        .add_routes(routes(&node, health_reporter)?);
    let stopping = shutdown.clone().cancelled_owned();
    let incoming = multiplex::Incoming::new(listener, tasks.clone());
    let served = tasks.spawn("grpc", router.serve_with_incoming_shutdown(incoming, stopping));
    let drain = Duration::from_secs(config.drain_seconds);
    Ok(Running { address, admin, readiness, shutdown, served, tasks, drain, _claims: claims })
}

async fn bind(config: &Config) -> Result<Listener, ServerError> {
    let bound = Listener::bind_all(&config.listen, &config.tls, Application::Grpc).await;
    bound.map_err(|source| ServerError::Listen { address: config.listen.to_string(), source })
}

/// Every service of the node.
fn routes(node: &Arc<Node>, health: HealthReporter) -> Result<tonic::service::Routes, ServerError> {
    let mut routes = RoutesBuilder::default();
    routes.add_service(HealthServer::new(HealthService::from_health_reporter(health)));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    routes.add_service(reflection().build_v1()?);
    routes.add_service(reflection().build_v1alpha()?);
    routes.add_service(SmartHttpServiceServer::new(SmartHttpServer::new(Arc::clone(node))));
    routes.add_service(SshServiceServer::new(SshServer::new(Arc::clone(node))));
    routes.add_service(UploadPackServiceServer::new(UploadPackServer::new(Arc::clone(node))));
    routes.add_service(ReplicaServiceServer::new(ReplicaServer::new(Arc::clone(node))));
    routes.add_service(RepositoryServiceServer::new(RepositoryServer::new(Arc::clone(node))));
    routes.add_service(RemoteServiceServer::new(RemoteServer::new(Arc::clone(node))));
    routes.add_service(ServerServiceServer::new(ServerInfoServer::new(Arc::clone(node))));
    routes.add_service(InternalGitalyServer::new(InternalServer::new(Arc::clone(node))));
    routes.add_service(RefServiceServer::new(RefServer::new(Arc::clone(node))));
    routes.add_service(CleanupServiceServer::new(CleanupServer::new(Arc::clone(node))));
    routes.add_service(CommitServiceServer::new(CommitServer::new(Arc::clone(node))));
    routes.add_service(AnalysisServiceServer::new(AnalysisServer::new(Arc::clone(node))));
    routes.add_service(BlobServiceServer::new(BlobServer::new(Arc::clone(node))));
    routes.add_service(DiffServiceServer::new(DiffServer::new(Arc::clone(node))));
    routes.add_service(OperationServiceServer::new(OperationServer::new(Arc::clone(node))));
    routes.add_service(ConflictsServiceServer::new(ConflictsServer::new(Arc::clone(node))));
    routes.add_service(ObjectPoolServiceServer::new(ObjectPoolServer::new(Arc::clone(node))));
    Ok(routes.routes())
}
