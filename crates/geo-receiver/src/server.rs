//! Puts the parts together, starts them, and stops them in order.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tabularium_common::{
    admin,
    announce::Announcement,
    bus::{self, Link},
    config::ConfigError,
    duties::Class,
    grpc::{Address, Listener},
    lifecycle::{Readiness, Tasks},
    tls::Application,
};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::GeoReceiverConfig,
    http::{Shared, routes},
    listener,
    metrics::Metrics,
    publish::Publisher,
    tokens::Tokens,
};

/// Why the service did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A port cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// As configured.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// A signal handler or the announcement.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The bus's URL.
    #[error("message bus: {0}")]
    Bus(#[from] async_nats::ConnectError),
    /// The bus will not have us.
    #[error("message bus: the connection was closed for good; are the credentials in nats_url right?")]
    BusClosed,
}

/// A receiver that works.
pub struct Running {
    tasks: Tasks,
    readiness: Readiness,
    link: watch::Receiver<Link>,
    http: Address,
    admin: SocketAddr,
    drain: Duration,
}

/// Runs until `stop` is ready, then drains.
pub async fn run(
    config: GeoReceiverConfig,
    announce: Option<&Path>,
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), RunError> {
    let mut running = start(config).await?;
    if let Some(path) = announce {
        let mut announcement = Announcement::of_this_process();
        announcement.http = Some(Announcement::http_at(&running.http));
        announcement.admin = Some(running.admin.to_string());
        announcement.write(path)?;
    }
    let ended = tokio::select! {
        stopped = stop => stopped.map_err(RunError::from),
        () = bus::closed(&mut running.link) => Err(RunError::BusClosed),
    };
    running.stop().await;
    ended
}

/// Binds and serves. The bus need not be there yet; events are answered 503 until it is.
pub async fn start(config: GeoReceiverConfig) -> Result<Running, RunError> {
    let tokens = config.read_tokens()?;
    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let refused = |address: String| move |source| RunError::Listen { address, source };
    let listener = Listener::bind_all(&config.listen, &config.tls, Application::Http1)
        .await
        .map_err(refused(config.listen.to_string()))?;
    let http = listener.address()?;
    let admin = admin::serve(config.admin_listen, Arc::new(registry), readiness.clone(), &tasks)
        .await
        .map_err(refused(config.admin_listen.to_string()))?;
    let (client, link) = bus::connect(&config.nats_url, "tabularium-geo-receiver").await?;
    let jetstream = async_nats::jetstream::new(client);

    let shared = Arc::new(Shared {
        tokens: Tokens::new(&tokens),
        publisher: Publisher { bus: jetstream.clone(), link: link.clone() },
        virtual_storage: config.virtual_storage,
        max_body_bytes: config.max_body_bytes,
        slots: Semaphore::new(config.max_concurrent_requests),
        metrics,
    });
    tasks.spawn("http", listener::accept(listener, routes(shared), tasks.clone()));
    tasks.spawn("bus", follow(jetstream, link.clone(), readiness.clone(), tasks.stopping()));
    tracing::info!(%http, %admin, sites = tokens.len(), "geo-receiver started");
    let drain = Duration::from_secs(config.drain_seconds);
    Ok(Running { tasks, readiness, link, http, admin, drain })
}

/// Ready while the bus is there. The stream is made as soon as it is, so that the first event need not wait for it.
async fn follow(
    bus: async_nats::jetstream::Context,
    mut link: watch::Receiver<Link>,
    readiness: Readiness,
    stopping: CancellationToken,
) {
    loop {
        let up = *link.borrow_and_update() == Link::Up;
        readiness.set(up && !stopping.is_cancelled());
        if up && let Err(error) = bus.get_or_create_stream(Class::GeoSync.stream_config()).await {
            tracing::warn!(%error, "the stream cannot be made yet");
        }
        tokio::select! {
            () = stopping.cancelled() => break,
            changed = link.changed() => if changed.is_err() { break },
        }
    }
    readiness.set(false);
}

impl Running {
    /// Where events are posted to.
    pub fn http_address(&self) -> &Address {
        &self.http
    }

    /// Where metrics, liveness and readiness are.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// Takes no more connections and finishes the requests that run, while the drain lasts.
    pub async fn stop(self) {
        self.readiness.set(false);
        if let Err(late) = self.tasks.drain(self.drain).await {
            tracing::warn!(%late, "stopping without them");
        }
    }
}
