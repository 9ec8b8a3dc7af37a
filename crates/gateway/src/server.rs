//! Start, accept, drain.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tabularium_common::{
    admin,
    announce::Announcement,
    config::ConfigError,
    grpc::{Address, Listener},
    lifecycle::{DrainError, Readiness, Tasks, stop_signal},
    tls::Application,
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{config::Config, connection, gateway::Gateway, limits::ACCEPT_PAUSE, metrics::Metrics};

/// How long connections to routers may take to end once no request needs them.
const SESSIONS_DRAIN: Duration = Duration::from_secs(2);

/// Why the gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A secret cannot be read.
    #[error(transparent)]
    Secret(#[from] ConfigError),
    /// A port cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// As configured.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The addresses cannot be announced, or signals not be awaited.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// A started gateway.
pub struct Running {
    /// Where clients connect: `tcp://host:port`, `tls://host:port` or `unix:/path`.
    pub http: Address,
    /// Metrics, liveness, readiness.
    pub admin: SocketAddr,
    readiness: Readiness,
    tasks: Tasks,
    sessions: Tasks,
    drain: Duration,
}

impl Running {
    /// Takes no more connections, lets running requests end, bounded by `drain_seconds`.
    pub async fn stop(self) -> Result<(), DrainError> {
        self.readiness.set(false);
        let drained = self.tasks.drain(self.drain).await;
        // What lies below the connections to routers; no request needs it any more.
        drained.and(self.sessions.drain(SESSIONS_DRAIN).await)
    }
}

/// Binds every listener and serves.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry));
    let drain = Duration::from_secs(config.drain_seconds);
    let connections = Arc::new(Semaphore::new(config.max_connections));
    let (listen, tls, admin_listen) = (config.listen.clone(), config.tls.clone(), config.admin_listen);
    let gateway = Arc::new(Gateway::new(config, metrics)?);

    let refused = |address: String| |source| StartError::Listen { address, source };
    let listener =
        Listener::bind_all(&listen, &tls, Application::Http).await.map_err(refused(listen.to_string()))?;
    let http = listener.address()?;
    let (tasks, sessions) = (Tasks::new(), gateway.sessions.clone());
    let readiness = Readiness::new();
    let admin = admin::serve(admin_listen, Arc::new(registry), readiness.clone(), &tasks)
        .await
        .map_err(refused(admin_listen.to_string()))?;
    for upstreams in [&gateway.routers, &gateway.coordinators] {
        let (watch, stopping) = (Arc::clone(upstreams).watch(), tasks.stopping());
        tasks.spawn("watch upstreams", async move {
            tokio::select! {
                () = stopping.cancelled() => {}
                () = watch => {}
            }
        });
    }
    tasks.spawn("accept", accept(gateway, listener, connections, tasks.clone(), tasks.stopping()));
    readiness.set(true);
    Ok(Running { http, admin, readiness, tasks, sessions, drain })
}

/// Serves until a stop signal, then drains.
pub async fn run(config: Config, announce: Option<&Path>) -> Result<(), StartError> {
    let running = start(config).await?;
    if let Some(path) = announce {
        let mut announcement = Announcement::of_this_process();
        announcement.http = Some(Announcement::http_at(&running.http));
        announcement.admin = Some(running.admin.to_string());
        announcement.write(path)?;
    }
    tracing::info!(http = %running.http, admin = %running.admin, "serving");
    stop_signal().await?;
    tracing::info!("stopping");
    if let Err(late) = running.stop().await {
        tracing::warn!(error = %late, "requests were cut off");
    }
    Ok(())
}

async fn accept(
    gateway: Arc<Gateway>,
    listener: Listener,
    connections: Arc<Semaphore>,
    tasks: Tasks,
    stopping: CancellationToken,
) {
    let builder = Arc::new(connection::builder(gateway.config.header_timeout.0));
    loop {
        let accepted = async {
            // Closed never: the semaphore lives as long as this task.
            let permit = Arc::clone(&connections).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = stopping.cancelled() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok(accepted) => {
                let (gateway, builder, stopping) =
                    (Arc::clone(&gateway), Arc::clone(&builder), stopping.clone());
                tasks.spawn("connection", async move {
                    let gauge = gateway.metrics.connections.clone();
                    gauge.inc();
                    let secured = tokio::select! {
                        secured = accepted.secure() => Some(secured),
                        () = stopping.cancelled() => None,
                    };
                    match secured {
                        Some(Ok(stream)) => connection::serve(gateway, stream, builder, stopping).await,
                        Some(Err(error)) => tracing::debug!(%error, "connection came to nothing"),
                        None => {}
                    }
                    gauge.dec();
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
