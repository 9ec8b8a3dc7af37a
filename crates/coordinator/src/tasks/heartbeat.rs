//! Keeps this coordinator's own lease. While it stands we serve routers' caches; when it lapses, or a peer puts an end to
//! it, every session ends, and we come back under another id once nothing can be cached under the old one.

use std::{sync::Arc, time::Duration};

use tabularium_common::{grpc::Address, lifecycle::Readiness};
use tokio::time::{Instant, timeout};

use super::pause;
use crate::{
    app::Shared,
    db::{coordinators, routers},
};

/// Heartbeats in the time of one lease.
const BEATS_PER_LEASE: u32 = 5;

/// Registers once, so that the first router finds us ready, and goes on in a task.
pub(crate) async fn start(shared: &Arc<Shared>, advertised: &Address, readiness: Readiness) {
    register(shared, advertised, &readiness).await;
    let (shared, advertised) = (Arc::clone(shared), advertised.clone());
    shared.tasks.clone().spawn("heartbeat", async move {
        loop {
            beat_until_lapse(&shared, &readiness).await;
            readiness.set(false);
            shared.sessions.stop_granting();
            shared.sessions.emptied().await;
            let (db, me) = (&shared.db, shared.identity.get());
            // If this fails, peers wait for the rest of our lease once.
            let retired = coordinators::coordinator_retire(db.pool(), &me);
            if let Ok(Err(error)) = timeout(Duration::from_secs(2), retired).await {
                tracing::debug!(%error, "not retired");
            }
            if shared.tasks.stopping().is_cancelled() {
                return;
            }
            tracing::warn!("lease lapsed; starting anew under another id");
            if !register(&shared, &advertised, &readiness).await {
                return;
            }
        }
    });
}

fn lease(shared: &Shared) -> Duration {
    shared.config.timing.coordinator_lease.0
}

/// By our clock, from before the database was asked, with an allowance for clocks that run at different speeds.
fn own_end(asked: Instant, lease: Duration) -> Instant {
    asked + lease - lease / 20
}

/// Takes a new id and lease, for as long as it takes. False: the service stops.
async fn register(shared: &Arc<Shared>, advertised: &Address, readiness: &Readiness) -> bool {
    loop {
        let id = uuid::Uuid::now_v7().to_string();
        // Before the row is there: a peer that sees it may call at once.
        shared.identity.set(id.clone());
        let asked = Instant::now();
        let registered =
            coordinators::coordinator_register(shared.db.pool(), &id, &advertised.to_string(), lease(shared))
                .await;
        match registered {
            Ok(()) => {
                shared.sessions.own_lease(own_end(asked, lease(shared)));
                readiness.set(true);
                tracing::info!(coordinator = id, %advertised, "registered");
                return true;
            }
            Err(error) => tracing::warn!(%error, "cannot register"),
        }
        if !pause(shared, lease(shared) / BEATS_PER_LEASE).await {
            return false;
        }
    }
}

/// Lets whoever answers an operator know which routers are here. `shown`: what was recorded last.
async fn show_routers(shared: &Shared, me: &str, shown: &mut Vec<String>) {
    let mut present = shared.sessions.routers();
    present.sort();
    if present == *shown {
        return;
    }
    let recording = routers::router_set(shared.db.pool(), me, &present);
    match timeout(lease(shared) / BEATS_PER_LEASE, recording).await {
        Ok(Ok(())) => *shown = present,
        Ok(Err(error)) => tracing::warn!(%error, "routers are not recorded"),
        Err(_) => tracing::warn!("routers are not recorded in time"),
    }
}

/// Those that are not seen now are waited for as long as their lease is when they have to be.
async fn watch_peers(shared: &Shared) {
    match timeout(lease(shared) / BEATS_PER_LEASE, shared.revoker.watch_peers()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "other coordinators are not looked at"),
        Err(_) => tracing::warn!("other coordinators are not looked at in time"),
    }
}

async fn beat_until_lapse(shared: &Arc<Shared>, readiness: &Readiness) {
    let me = shared.identity.get();
    let lease = lease(shared);
    let mut end = Instant::now() + lease;
    let mut shown = Vec::new();
    while pause(shared, lease / BEATS_PER_LEASE).await {
        let asked = Instant::now();
        let beat =
            timeout(lease / 2, coordinators::coordinator_heartbeat(shared.db.pool(), &me, lease)).await;
        match beat {
            Ok(Ok(true)) => {
                end = own_end(asked, lease);
                shared.sessions.own_lease(end);
                readiness.set(true);
                show_routers(shared, &me, &mut shown).await;
                watch_peers(shared).await;
            }
            Ok(Ok(false)) => return,
            Ok(Err(_)) | Err(_) => {
                readiness.set(false);
                tracing::warn!("heartbeat failed");
                // Not ours to judge by our own clock when it ended for the peers; but after this it surely has.
                if Instant::now() >= end + lease {
                    return;
                }
            }
        }
    }
}
