//! Taking cached routes back, from our own routers and from those of every other coordinator.
//!
//! Peers are read after the change is in the database: one that registers later fills its routers' caches from the
//! changed state. A peer that does not answer is kept from extending its lease and its lease is waited out; by then
//! those of its routers have run out too.

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
    db::{Db, DbError, coordinators},
    leases::with_drift,
    metrics::Metrics,
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

/// Carries revocations out. Clones share everything.
#[derive(Clone)]
pub(crate) struct Revoker {
    db: Db,
    sessions: Sessions,
    identity: Identity,
    token: SendToken,
    router_lease: Duration,
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
        router_lease: Duration,
        metrics: Metrics,
    ) -> (Self, mpsc::Receiver<Vec<i64>>) {
        let (done, rows) = mpsc::channel(DONE_QUEUE);
        let channels = Arc::default();
        (Self { db, sessions, identity, token, router_lease, channels, done, metrics }, rows)
    }

    /// Returns when no router anywhere can use the routes any more: at once when none has them, after an
    /// acknowledgement normally, after a lease at worst. `rows` are what the database remembers as owed.
    pub(crate) async fn revoke(&self, routes: &[RevokedRoute], rows: Vec<i64>) -> Result<(), DbError> {
        let begun = Instant::now();
        let ours = self.sessions.revoke(routes);
        let peers = async {
            let me = self.identity.get();
            let live = coordinators::coordinator_list_live(self.db.pool()).await?;
            self.channels
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|address, _| live.iter().any(|peer| peer.address == address.to_string()));
            let others = live.iter().filter(|peer| peer.id != me).map(|peer| self.at_peer(peer, routes));
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

    async fn at_peer(
        &self,
        peer: &coordinators::LiveCoordinator,
        routes: &[RevokedRoute],
    ) -> Result<(), DbError> {
        tokio::select! {
            answer = self.ask_peer(peer, routes) => match answer {
                Ok(()) => Ok(()),
                Err(problem) => {
                    tracing::warn!(coordinator = peer.id, problem, "peer is fenced, its lease is waited out");
                    self.metrics.lease_waited();
                    if let Some(remaining) = coordinators::coordinator_fence(self.db.pool(), &peer.id).await? {
                        sleep(with_drift(remaining)).await;
                    }
                    Ok(())
                }
            },
            lapsed = self.lapsed(peer) => lapsed,
        }
    }

    async fn ask_peer(
        &self,
        peer: &coordinators::LiveCoordinator,
        routes: &[RevokedRoute],
    ) -> Result<(), String> {
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
    async fn lapsed(&self, peer: &coordinators::LiveCoordinator) -> Result<(), DbError> {
        let mut remaining = peer.remaining;
        loop {
            sleep(with_drift(remaining)).await;
            let live = coordinators::coordinator_list_live(self.db.pool()).await?;
            match live.into_iter().find(|live| live.id == peer.id) {
                None => return Ok(()),
                Some(live) => remaining = live.remaining,
            }
        }
    }
}
