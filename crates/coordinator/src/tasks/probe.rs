//! Asks the storage nodes for their health, and the database for storages that other coordinators added.

use std::sync::Arc;

use tabularium_proto::coordinator::session_response::Message;

use super::pause;
use crate::{app::Shared, db::storages, topology::Snapshot};

/// Rounds of probes between two looks at the database.
const ROUNDS_PER_REFRESH: u32 = 5;

pub(super) fn start(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    shared.tasks.clone().spawn("probe-nodes", async move {
        let mut round = 0;
        while pause(&shared, shared.config.timing.probe_interval.0).await {
            round += 1;
            if round % ROUNDS_PER_REFRESH == 0 {
                refresh(&shared).await;
            }
            shared.health.dial_all(&shared.topology.get()).await;
        }
    });
}

async fn refresh(shared: &Shared) {
    let db = &shared.db;
    match db.retrying(|| storages::storage_list(db.pool())).await {
        Ok(stored) => {
            if shared.topology.set(Snapshot::new(&shared.config, &stored)) {
                tracing::info!("storages changed");
                shared.sessions.broadcast(&Message::Topology((&*shared.topology.get()).into()));
            }
        }
        Err(error) => tracing::debug!(%error, "storages are not refreshed"),
    }
}
