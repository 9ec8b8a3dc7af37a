//! Asks the storage nodes for their health, and the database for storages that other coordinators added. What waits to be
//! tried again on a storage that has come back is due at once.

use std::sync::Arc;

use tabularium_proto::coordinator::session_response::Message;

use super::pause;
use crate::{
    app::Shared,
    db::{publications, storages},
    topology::Snapshot,
};

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
            if note_filesystems(&shared).await {
                refresh(&shared).await;
            }
            hurry(&shared).await;
        }
    });
}

/// What waits for a storage that has come back is due.
async fn hurry(shared: &Shared) {
    let db = &shared.db;
    for (virtual_storage, storage) in shared.health.take_recovered() {
        match db.retrying(|| publications::duty_hurry(db.pool(), &virtual_storage, &storage)).await {
            Ok(0) => {}
            Ok(duties) => {
                tracing::info!(%storage, duties, "a storage is back; what is owed to it is due now");
                shared.bell.notify_one();
            }
            Err(error) => tracing::debug!(%error, %storage, "what is owed is tried when its time has come"),
        }
    }
}

/// Asks all nodes; the first file system that a storage is seen with is its own from then on. True: there was one.
async fn note_filesystems(shared: &Shared) -> bool {
    let db = &shared.db;
    let mut noted = false;
    for (virtual_storage, known, dialled) in shared.health.dial_all(&shared.topology.get()).await {
        if known.filesystem_id.is_some() || !dialled.storage_served || dialled.filesystem_id.is_empty() {
            continue;
        }
        let id = &dialled.filesystem_id;
        let note = || storages::storage_note_filesystem(db.pool(), &virtual_storage, &known.name, id);
        match db.retrying(note).await {
            Ok(first) => noted |= first,
            Err(error) => tracing::debug!(%error, storage = %known.name, "the file system is not remembered"),
        }
    }
    noted
}

/// Reads the storages anew and tells the routers what changed.
pub(crate) async fn refresh(shared: &Shared) {
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
