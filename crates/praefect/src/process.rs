//! The process: coordinator, replicator and router beside each other, for as long as nobody stops them.
//!
//! They meet as they do elsewhere, over gRPC, here on a socket file in a directory of the process's own; only the replicator
//! is told by the coordinator directly what there is to do, so that no NATS server is needed. Clients find the router where
//! Praefect would be. Operators, and coordinators in processes like this one on other hosts, find the coordinator there as
//! well: the router passes on what they ask.
//!
//! The router has a thread of its own, as in its own program; the rest shares a runtime.

use std::{io, path::Path, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tabularium_common::{
    bus::{Bus, Exchange},
    grpc::{Address, ListenAddress, Sockets},
    lifecycle::{Readiness, Tasks, stop_signal},
    telemetry::{self, TelemetryError},
    tls::{self, Application},
};
use tabularium_coordinator::Coordinator;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tokio_util::sync::CancellationToken;

use crate::{
    file::read::Read,
    handover::{self, HandoverError, Predecessor},
    metrics,
    private_key::PrivateKey,
    translation::{self, Tokens, Translated, TranslationError},
};

/// How often it is looked whether the router serves already.
const LOOK: Duration = Duration::from_millis(5);
/// How long that may take before it is told in the log.
const SLOW_START: Duration = Duration::from_secs(30);
/// How long whoever reads metrics may go on when everything else has stopped.
const LAST_SCRAPE: Duration = Duration::from_millis(500);

/// Why the process does not serve, or not any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Translation(#[from] TranslationError),
    #[error("logging: {0}")]
    Telemetry(#[from] TelemetryError),
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error(transparent)]
    Listen(io::Error),
    #[error("tabularium.nats_url: {0}")]
    Bus(String),
    #[error(transparent)]
    Coordinator(#[from] tabularium_coordinator::RunError),
    #[error(transparent)]
    Replicator(#[from] tabularium_replicator::RunError),
    #[error(transparent)]
    Router(#[from] tabularium_router::RunError),
    #[error("the router's thread ended")]
    RouterGone,
    #[error(transparent)]
    Handover(#[from] HandoverError),
    #[error("grace period expired")]
    GraceExpired,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Io { what, source }
}

/// Serves what a file says until SIGTERM or SIGINT, or until another process has taken over.
pub(crate) async fn serve(mut read: Read) -> Result<(), ServeError> {
    let predecessor = handover::predecessor()?;
    let private = tempfile::Builder::new().prefix("tabularium-praefect-").tempdir();
    let private = private.map_err(failed("a directory for the coordinator's socket"))?;
    let key = read.file.tls.key.get().map(PrivateKey::new).transpose().map_err(failed("tls.key"))?;
    if let Some(key) = &key {
        read.file.tls.key_path = key.path();
    }
    let translated = translation::translate(&read.file, private.path())?;
    let _telemetry = telemetry::start("tabularium-praefect", &translated.telemetry)?;
    tls::install(&translated.router.tls);
    for key in &read.unknown {
        tracing::warn!(key, "this key of the configuration is not known");
    }
    for named in translation::without_effect(&read.file) {
        tracing::warn!(key = named.key, why = named.why, "this key of the configuration has no effect");
    }
    if translation::hides_praefects_tables(&read.file) {
        tracing::warn!(
            schema = read.file.tabularium.database_schema,
            "the database's user has the name of our schema: Praefect would find our tables in place of its own"
        );
    }
    let tokens = translation::tokens(&read.file);
    let graceful_stop = translated.graceful_stop;
    let mut running = tokio::select! {
        running = Running::start(translated, tokens, &read, predecessor) => running?,
        // Nothing is served yet that would have to be finished.
        stopped = stop_signal() => return stopped.map_err(failed("signals")),
    };
    let ended = running.wait().await;
    tracing::info!(seconds = graceful_stop.as_secs(), "stopping");
    let stopping = running.stop();
    let stopped = tokio::select! {
        stopped = tokio::time::timeout(graceful_stop, stopping) => {
            stopped.unwrap_or(Err(ServeError::GraceExpired))
        }
        _ = stop_signal() => {
            tracing::warn!("told to stop again; not waiting any longer");
            Ok(())
        }
    };
    ended.and(stopped)
}

/// Everything that runs.
struct Running {
    sockets: Arc<Sockets>,
    coordinator: Coordinator,
    replicator: tabularium_replicator::Running,
    router: Router,
    /// What serves metrics.
    tasks: Tasks,
}

/// The router's thread.
struct Router {
    stop: CancellationToken,
    /// How it ended; nothing once that has been heard.
    ended: Option<oneshot::Receiver<Result<(), ServeError>>>,
    readiness: Readiness,
}

impl Running {
    async fn start(
        translated: Translated,
        tokens: Tokens,
        read: &Read,
        predecessor: Option<Predecessor>,
    ) -> Result<Self, ServeError> {
        let Translated { router, mut coordinator, replicator, metrics, .. } = translated;
        let (inherited, predecessor) = match predecessor {
            Some(mut predecessor) => (std::mem::take(&mut predecessor.sockets), Some(predecessor)),
            None => (Vec::new(), None),
        };
        let metrics = metrics.map(ListenAddress::Tcp);
        let addresses = router.listen.iter().cloned().chain(metrics.clone());
        let sockets = Arc::new(Sockets::bind(addresses, inherited).await.map_err(ServeError::Listen)?);
        coordinator.advertise = Some(advertised(&sockets, &router, metrics.as_ref())?);

        let mut registry = Registry::default();
        let bus = match coordinator.nats_url.as_str() {
            "" => Bus::InProcess(Exchange::new()),
            url => Bus::connect(url, "tabularium-praefect")
                .await
                .map_err(|error| ServeError::Bus(error.to_string()))?,
        };
        let secrets =
            tabularium_coordinator::Secrets { token: tokens.clients.clone(), nodes: tokens.nodes.clone() };
        let coordinator = Coordinator::start_with(coordinator, secrets, &bus, &mut registry).await?;
        let secrets = tabularium_replicator::config::Secrets {
            coordinator: tokens.clients.clone(),
            nodes: tokens.nodes.clone(),
            router: None,
            subscribers: Vec::new(),
            home_sites: Vec::new(),
        };
        let replicator = tabularium_replicator::start_with(&replicator, &secrets, bus, &mut registry)?;
        let secrets = tabularium_router::Secrets {
            clients: tokens.clients.clone(),
            nodes: tokens.nodes,
            coordinators: tokens.clients,
        };
        let (router, registry) = Router::start(router, secrets, registry, &sockets, metrics.clone()).await?;
        let tasks = Tasks::new();
        if let Some(address) = metrics {
            let listener = sockets
                .listen(|known| *known == address, &tls::TlsConfig::NONE, Application::Http)
                .map_err(ServeError::Listen)?;
            let served_at = listener.address().map_err(ServeError::Listen)?;
            tracing::info!(address = %served_at, "metrics are served");
            let routes = metrics::routes(registry, router.readiness.clone(), &read.file.tabularium);
            metrics::serve(listener, routes.merge(coordinator.routes()), &tasks);
        }
        router.serves().await;
        handover::note_pid().map_err(failed("the file of the process's id"))?;
        if let Some(predecessor) = predecessor {
            predecessor.relieve().await?;
        }
        tracing::info!("serving");
        Ok(Self { sockets, coordinator, replicator, router, tasks })
    }

    /// Until it is told to stop, or another process has taken over, or something cannot go on.
    async fn wait(&mut self) -> Result<(), ServeError> {
        let mut hang_up = signal(SignalKind::hangup()).map_err(failed("signals"))?;
        let mut stopped = std::pin::pin!(stop_signal());
        loop {
            tokio::select! {
                stopped = &mut stopped => return stopped.map_err(failed("signals")),
                ended = self.router.ended() => return ended,
                _ = hang_up.recv() => {}
            }
            tracing::info!("another process is to take over");
            tokio::select! {
                stopped = &mut stopped => return stopped.map_err(failed("signals")),
                handed_over = handover::hand_over(&self.sockets) => match handed_over {
                    Ok(()) => {
                        tracing::info!("another process has taken over");
                        return Ok(());
                    }
                    Err(error) => tracing::error!(%error, "nobody has taken over"),
                },
            }
        }
    }

    /// First what clients see, then what that needs.
    async fn stop(mut self) -> Result<(), ServeError> {
        self.router.stop.cancel();
        let ended = if self.router.ended.is_some() { self.router.ended().await } else { Ok(()) };
        self.replicator.stop().await;
        let stopped = self.coordinator.stop().await;
        if let Err(late) = self.tasks.drain(LAST_SCRAPE).await {
            tracing::debug!(%late, "metrics");
        }
        ended?;
        Ok(stopped?)
    }
}

/// Where other coordinators reach ours: at the first address that is not for this host alone.
fn advertised(
    sockets: &Sockets,
    router: &tabularium_router::Config,
    metrics: Option<&ListenAddress>,
) -> Result<Address, ServeError> {
    let of_clients = |known: &ListenAddress| Some(known) != metrics;
    let listener = sockets.listen(of_clients, &router.tls, Application::Grpc).map_err(ServeError::Listen)?;
    let addresses = listener.addresses().map_err(ServeError::Listen)?;
    let remote = addresses.iter().find(|address| !matches!(address, Address::Unix(_)));
    let found = remote.or(addresses.first()).cloned();
    found.ok_or_else(|| ServeError::Listen(io::Error::other("no address to listen at")))
}

impl Router {
    /// Starts the thread, and gives the registry back with the router's metrics in it.
    async fn start(
        config: tabularium_router::Config,
        secrets: tabularium_router::Secrets,
        mut registry: Registry,
        sockets: &Arc<Sockets>,
        metrics: Option<ListenAddress>,
    ) -> Result<(Self, Registry), ServeError> {
        let stop = CancellationToken::new();
        let (report, ended) = oneshot::channel();
        let (tell, told) = oneshot::channel();
        let (sockets, stopped) = (Arc::clone(sockets), stop.clone());
        let life = async move {
            let listener = sockets
                .listen(|known| Some(known) != metrics.as_ref(), &config.tls, Application::Grpc)
                .map_err(ServeError::Listen)?;
            let surroundings = tabularium_router::Surroundings {
                secrets,
                listener,
                registry: &mut registry,
                passes_to_coordinator: true,
            };
            let router = tabularium_router::Router::start(&config, surroundings).await?;
            // Nobody waits for it any more only when the process is told to stop.
            let _ = tell.send((router.readiness(), registry));
            let stop = async {
                stopped.cancelled().await;
                Ok(())
            };
            router.serve(stop).await.map_err(ServeError::from)
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(failed("the router's runtime"))?;
        let thread = std::thread::Builder::new().name("router".to_owned());
        let spawned = thread.spawn(move || {
            let ended = runtime.block_on(life);
            // As above.
            let _ = report.send(ended);
        });
        spawned.map_err(failed("the router's thread"))?;
        let Ok((readiness, registry)) = told.await else {
            return Err(match ended.await {
                Ok(Err(error)) => error,
                Ok(Ok(())) | Err(_) => ServeError::RouterGone,
            });
        };
        Ok((Self { stop, ended: Some(ended), readiness }, registry))
    }

    /// How the thread ended, once it has. To be heard once; cancelling loses nothing.
    async fn ended(&mut self) -> Result<(), ServeError> {
        let Some(ended) = &mut self.ended else { return Err(ServeError::RouterGone) };
        let heard = ended.await;
        self.ended = None;
        heard.unwrap_or(Err(ServeError::RouterGone))
    }

    /// Waits until the router has heard from the coordinator where everything is.
    async fn serves(&self) {
        let began = tokio::time::Instant::now();
        let mut told = false;
        while !self.readiness.get() {
            if !told && began.elapsed() > SLOW_START {
                told = true;
                tracing::warn!("the router does not serve yet");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// For programs that only have the path of the file.
pub(crate) fn run(path: &Path) -> Result<(), String> {
    let read = crate::commands::read(path)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    runtime.block_on(serve(read)).map_err(|error| error.to_string())
}
