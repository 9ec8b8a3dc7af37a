//! Taking cached routes back, from our own routers and from those of every other coordinator.
//!
//! Peers are read after the change is in the database: one that registers later fills its routers' caches from the
//! changed state. A peer that does not answer is kept from extending its lease and its lease is waited out by our own
//! clock ([`Peers`]); by then those of its routers have run out too.

use std::{
    collections::HashMap,
    str::FromStr as _,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use tabularium_common::{
    auth::SendToken,
    grpc::{Address, channel},
};
use tabularium_proto::coordinator::{self as wire, peer_service_client::PeerServiceClient};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tonic::{service::interceptor::InterceptedService, transport::Channel};

use crate::{
    config::Timing,
    db::{
        Db, DbError,
        coordinators::{self, Registered},
    },
    leases::{Moment, with_drift},
    metrics::Metrics,
    peers::Peers,
    repository::RevokedRoute,
    sessions::Sessions,
};

/// How much longer than a router's lease a peer may take to answer.
const PEER_GRACE: Duration = Duration::from_millis(500);
/// Revocations carried out whose rows wait to be removed; beyond it they stay and are carried out once more.
const DONE_QUEUE: usize = 4096;

/// The id under which this process is registered as a coordinator; another after its lease lapsed.
#[derive(Clone, Default)]
pub(crate) struct Identity(Arc<RwLock<String>>);

impl Identity {
    pub(crate) fn get(&self) -> String {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, id: String) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = id;
    }
}

/// A coordinator that was seen in the database.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) registered: Registered,
    /// How long its lease may still stand.
    remaining: Duration,
}

impl Peer {
    /// Its lease may stand.
    pub(crate) fn lives(&self) -> bool {
        !self.remaining.is_zero()
    }
}

/// Carries revocations out. Clones share everything.
#[derive(Clone)]
pub(crate) struct Revoker {
    db: Db,
    sessions: Sessions,
    identity: Identity,
    token: SendToken,
    router_lease: Duration,
    origin: Instant,
    peers: Arc<Mutex<Peers>>,
    channels: Arc<Mutex<HashMap<Address, Channel>>>,
    done: mpsc::Sender<Vec<i64>>,
    metrics: Metrics,
}

impl Revoker {
    /// The receiver yields rows that a task removes.
    pub(crate) fn new(
        db: Db,
        sessions: Sessions,
        identity: Identity,
        token: SendToken,
        timing: &Timing,
        metrics: Metrics,
    ) -> (Self, mpsc::Receiver<Vec<i64>>) {
        let (done, rows) = mpsc::channel(DONE_QUEUE);
        let (router_lease, origin) = (timing.router_lease.0, Instant::now());
        let peers = Arc::new(Mutex::new(Peers::new(timing.coordinator_lease.0)));
        let channels = Arc::default();
        let revoker =
            Self { db, sessions, identity, token, router_lease, origin, peers, channels, done, metrics };
        (revoker, rows)
    }

    fn now(&self) -> Moment {
        self.origin.elapsed()
    }

    /// All coordinators that are registered, ourselves included, with what we have seen of their leases.
    pub(crate) async fn peers(&self) -> Result<Vec<Peer>, DbError> {
        let registered = coordinators::coordinator_list(self.db.pool()).await?;
        let now = self.now();
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.listed(now, registered.iter().map(|peer| (peer.id.as_str(), peer.beat)));
        let seen = |registered: Registered| {
            let remaining = peers.remaining(now, &registered.id);
            Peer { registered, remaining }
        };
        Ok(registered.into_iter().map(seen).collect())
    }

    /// Looks whose leases stand and removes whoever's does not, so that a revocation waits no longer than it must.
    pub(crate) async fn watch_peers(&self) -> Result<(), DbError> {
        for peer in self.peers().await?.into_iter().filter(|peer| !peer.lives()) {
            self.dismiss(&peer).await?;
        }
        Ok(())
    }

    async fn dismiss(&self, peer: &Peer) -> Result<bool, DbError> {
        let Registered { id, beat, .. } = &peer.registered;
        let gone = coordinators::coordinator_dismiss(self.db.pool(), id, *beat).await?;
        if gone {
            tracing::info!(coordinator = id, "its lease is over");
        }
        Ok(gone)
    }

    /// Returns when no router anywhere can use the routes any more: at once when none has them, after an
    /// acknowledgement normally, after a lease at worst. `rows` are what the database remembers as owed.
    pub(crate) async fn revoke(&self, routes: &[RevokedRoute], rows: Vec<i64>) -> Result<(), DbError> {
        let begun = Instant::now();
        let ours = self.sessions.revoke(routes);
        let peers = async {
            let me = self.identity.get();
            let peers = self.peers().await?;
            self.channels
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|address, _| peers.iter().any(|peer| peer.registered.address == address.to_string()));
            let others = peers.iter().filter(|peer| peer.registered.id != me);
            let others = others.map(|peer| self.at_peer(peer, routes));
            for outcome in futures::future::join_all(others).await {
                outcome?;
            }
            Ok::<_, DbError>(())
        };
        let ((), peers) = tokio::join!(ours, peers);
        peers?;
        self.metrics.revoked(routes.len(), begun.elapsed());
        // When the queue is full the rows stay, and somebody revokes once more.
        if self.done.try_send(rows).is_err() {
            tracing::debug!("finished revocations are not recorded");
        }
        Ok(())
    }

    async fn at_peer(&self, peer: &Peer, routes: &[RevokedRoute]) -> Result<(), DbError> {
        let id = &peer.registered.id;
        let asked = async {
            if let Err(problem) = self.ask_peer(&peer.registered, routes).await {
                tracing::warn!(coordinator = id, problem, "peer is fenced, its lease is waited out");
                self.metrics.lease_waited();
                coordinators::coordinator_fence(self.db.pool(), id).await?;
                // The other branch ends with it.
                std::future::pending::<()>().await;
            }
            Ok(())
        };
        tokio::select! {
            asked = asked => asked,
            lapsed = self.lapsed(peer) => lapsed,
        }
    }

    async fn ask_peer(&self, peer: &Registered, routes: &[RevokedRoute]) -> Result<(), String> {
        let address = Address::from_str(&peer.address).map_err(|error| error.to_string())?;
        let channel = {
            let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
            channels.entry(address.clone()).or_insert_with(|| channel(&address)).clone()
        };
        let mut client = PeerServiceClient::new(InterceptedService::new(channel, self.token.clone()));
        let request = wire::RevokeRoutesRequest {
            coordinator_id: peer.id.clone(),
            routes: routes
                .iter()
                .map(|route| wire::RevokedRoute {
                    name: Some((&route.key).into()),
                    repository_id: route.id.0,
                    generation: route.generation.0,
                })
                .collect(),
        };
        let deadline = with_drift(self.router_lease) + PEER_GRACE;
        match timeout(deadline, client.revoke_routes(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(format!("{}: {}", status.code(), status.message())),
            Err(_) => Err(format!("no answer within {} ms", deadline.as_millis())),
        }
    }

    /// Returns when the peer's lease has run out without being extended: it died, or is not running.
    async fn lapsed(&self, peer: &Peer) -> Result<(), DbError> {
        let mut peer = peer.clone();
        loop {
            sleep(peer.remaining).await;
            let found =
                self.peers().await?.into_iter().find(|found| found.registered.id == peer.registered.id);
            let Some(found) = found else { return Ok(()) };
            if !found.lives() && self.dismiss(&found).await? {
                return Ok(());
            }
            peer = found;
        }
    }
}
