//! Puts the parts together, starts them, and stops them in order.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tabularium_common::{
    admin,
    announce::Announcement,
    bus::{self, Bus, Link},
    config::ConfigError,
    duties::Class,
    lifecycle::{Readiness, Tasks},
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    config::{ReplicatorConfig, Secrets},
    coordinators::Coordinators,
    geo_notify::{Address, Notifier},
    geo_sync::Syncer,
    home::Home,
    http_client::{HttpClientError, http_client},
    messages::Source,
    metrics::Metrics,
    mirror::LocalRouter,
    nodes::Nodes,
    worker::Worker,
    workshop::Workshop,
};

/// How long the last words to the bus may take.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);
/// How long slots may take to let go of their messages after the drain has run out.
const ABANDON_DEADLINE: Duration = Duration::from_secs(5);

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
        address: SocketAddr,
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
    /// No HTTP client.
    #[error(transparent)]
    HttpClient(#[from] HttpClientError),
    /// A hook's URL.
    #[error("hook_url: {0}")]
    HookUrl(#[from] http::uri::InvalidUri),
}

/// A replicator that works.
pub struct Running {
    tasks: Tasks,
    readiness: Readiness,
    abandon: CancellationToken,
    bus: Bus,
    link: watch::Receiver<Link>,
    admin: Option<SocketAddr>,
    drain: Duration,
}

/// Runs until `stop` is ready, then drains.
pub async fn run(
    config: ReplicatorConfig,
    announce: Option<&Path>,
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), RunError> {
    let mut running = start(config).await?;
    if let Some(path) = announce {
        let mut announcement = Announcement::of_this_process();
        announcement.admin = running.admin.map(|address| address.to_string());
        announcement.write(path)?;
    }
    let ended = tokio::select! {
        stopped = stop => stopped.map_err(RunError::from),
        () = bus::closed(&mut running.link) => Err(RunError::BusClosed),
    };
    running.stop().await;
    ended
}

/// Starts every worker. Neither bus nor coordinator need be there yet.
pub async fn start(config: ReplicatorConfig) -> Result<Running, RunError> {
    let secrets = config.read_secrets()?;
    let address = config.admin_listen;
    let failed = |source| RunError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let admin = listener.local_addr().map_err(failed)?;
    let bus = Bus::connect(&config.nats_url, "tabularium-replicator").await?;
    let mut registry = Registry::default();
    let mut running = start_with(&config, &secrets, bus, &mut registry)?;
    let routes = admin::routes(Arc::new(registry), running.readiness.clone());
    admin::serve_on(listener, routes, &running.tasks);
    running.admin = Some(admin);
    tracing::info!(%admin, "metrics are served");
    Ok(running)
}

/// As [`start`], for a process that has more in it than a replicator: with secrets, a bus and a registry of metrics of its
/// own. `nats_url`, `admin_listen` and the files of secrets are not looked at.
pub fn start_with(
    config: &ReplicatorConfig,
    secrets: &Secrets,
    bus: Bus,
    registry: &mut Registry,
) -> Result<Running, RunError> {
    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let metrics = Metrics::new(registry);
    let link = bus.link();
    let workshop = Arc::new(workshop(config, secrets)?);
    let abandon = CancellationToken::new();

    for class in Class::ALL {
        for _ in 0..config.workers(class) {
            let worker = Worker {
                class,
                source: Source::new(&bus, class),
                link: link.clone(),
                workshop: Arc::clone(&workshop),
                metrics: metrics.clone(),
                stopping: tasks.stopping(),
                abandon: abandon.clone(),
            };
            tasks.spawn(class.consumer(), worker.run());
        }
    }
    tasks.spawn("readiness", follow(link.clone(), readiness.clone(), tasks.stopping()));
    tracing::info!(worker_id = workshop.worker_id, "replicator started");
    let drain = Duration::from_secs(config.drain_seconds);
    Ok(Running { tasks, readiness, abandon, bus, link, admin: None, drain })
}

/// Ready while the bus is there.
async fn follow(mut link: watch::Receiver<Link>, readiness: Readiness, stopping: CancellationToken) {
    loop {
        readiness.set(*link.borrow_and_update() == Link::Up && !stopping.is_cancelled());
        tokio::select! {
            () = stopping.cancelled() => break,
            changed = link.changed() => if changed.is_err() { break },
        }
    }
    readiness.set(false);
}

fn workshop(config: &ReplicatorConfig, secrets: &Secrets) -> Result<Workshop, RunError> {
    let addresses = config.subscriber.iter().map(|site| &site.hook_url);
    let https =
        addresses.chain(config.home_site.iter().map(|site| &site.url)).any(|url| url.starts_with("https"));
    let client = http_client(https)?;
    let coordinators = Arc::new(Coordinators::new(&config.coordinators, secrets.coordinator.as_ref()));
    let worker_id = format!("replicator-{}", Uuid::new_v4().simple());

    let mut sites = std::collections::HashMap::new();
    for (site, token) in config.subscriber.iter().zip(&secrets.subscribers) {
        sites.insert(site.name.clone(), Address { url: site.hook_url.parse()?, token: token.clone() });
    }
    let homes = config.home_site.iter().zip(&secrets.home_sites);
    let homes = homes
        .map(|(site, token)| (site.name.clone(), Home { base_url: site.url.clone(), token: token.clone() }));
    let syncer = config.router.as_ref().map(|router| Syncer {
        client: client.clone(),
        homes: homes.collect(),
        router: LocalRouter::new(router, secrets.router.clone()),
        coordinators: Arc::clone(&coordinators),
        worker_id: worker_id.clone(),
        job_deadline: config.job_deadline.0,
        secrets: secrets.all(),
    });
    Ok(Workshop {
        coordinators,
        nodes: Nodes::new(secrets.nodes.clone()),
        notifier: Notifier::new(client, sites, config.external_url.clone()),
        syncer,
        worker_id,
        job_deadline: config.job_deadline.0,
        secrets: secrets.all(),
    })
}

impl Running {
    /// Where metrics, liveness and readiness are, if they are served.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// Stops pulling, finishes what runs while the drain lasts, and gives back the rest.
    pub async fn stop(self) {
        self.readiness.set(false);
        if let Err(late) = self.tasks.drain(self.drain).await {
            tracing::warn!(%late, "giving work back");
            self.abandon.cancel();
            if let Err(late) = self.tasks.drain(ABANDON_DEADLINE).await {
                tracing::error!(%late, "stopping without them");
            }
        }
        if let Bus::Nats { client, .. } = &self.bus
            && !matches!(tokio::time::timeout(FLUSH_DEADLINE, client.flush()).await, Ok(Ok(())))
        {
            tracing::warn!("the bus did not take the last acknowledgements");
        }
    }
}
