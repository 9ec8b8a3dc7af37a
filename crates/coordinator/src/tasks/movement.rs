//! Moves replicas: away from storages that are drained, to storages that were added, and out of those that have more than
//! they should. At most `timing.moves_per_storage` replicas come to, or leave, one storage at a time.

use std::{collections::HashMap, sync::Arc};

use futures::StreamExt as _;
use tabularium_common::ids::{StorageName, VirtualStorageName};

use super::pause;
use crate::{
    app::Shared,
    db::{
        DbError, assignments,
        storages::{self, StorageCounts, StorageState},
    },
    movement,
    placement::Rearrangement,
};

/// Leaving replicas looked at in one run.
const LEAVING: u32 = 1024;
/// Of those at once.
const AT_ONCE: usize = 8;
/// Repositories looked at in one run of a pass over all of them.
const PAGE: u32 = 500;

pub(super) fn start(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    shared.tasks.clone().spawn("move-replicas", async move {
        while pause(&shared, shared.config.timing.movement_interval.0).await {
            if let Err(error) = run(&shared).await {
                tracing::debug!(%error, "replicas are not moved");
            }
        }
    });
}

/// How many more moves each storage may have.
struct Slots {
    used: HashMap<(String, String), i64>,
    limit: i64,
}

impl Slots {
    fn free(&self, virtual_storage: &VirtualStorageName, storage: &StorageName) -> u32 {
        let used = self.used.get(&(virtual_storage.to_string(), storage.to_string())).copied().unwrap_or(0);
        u32::try_from(self.limit - used).unwrap_or(0)
    }

    fn take(&mut self, virtual_storage: &VirtualStorageName, change: &Rearrangement) {
        let (Rearrangement::Assign(storage) | Rearrangement::Release(storage)) = change else { return };
        *self.used.entry((virtual_storage.to_string(), storage.to_string())).or_default() += 1;
    }
}

async fn run(shared: &Arc<Shared>) -> Result<(), DbError> {
    let db = &shared.db;
    let leaving = db.retrying(|| assignments::leaving_list(db.pool(), LEAVING)).await?;
    futures::stream::iter(leaving)
        .for_each_concurrent(AT_ONCE, |(id, storage)| async move {
            if let Err(error) = movement::release(shared, id, &storage).await {
                tracing::debug!(repository_id = %id, %storage, %error, "a replica does not leave yet");
            }
        })
        .await;

    let topology = shared.topology.get();
    let draining: Vec<_> = topology
        .storages()
        .filter(|(_, known)| known.state == StorageState::Draining)
        .map(|(virtual_storage, known)| (virtual_storage.clone(), known.name.clone()))
        .collect();
    let passes = db.retrying(|| assignments::cursor_list(db.pool())).await?;
    if draining.is_empty() && passes.is_empty() {
        return Ok(());
    }
    let used = db.retrying(|| assignments::moves_count(db.pool())).await?;
    let mut slots = Slots {
        used: used
            .into_iter()
            .map(|(virtual_storage, storage, arriving, leaving)| {
                ((virtual_storage, storage), arriving + leaving)
            })
            .collect(),
        limit: i64::from(shared.config.timing.moves_per_storage),
    };
    let counts = db.retrying(|| storages::storage_count_replicas(db.pool())).await?;
    for (virtual_storage, storage) in draining {
        drain(shared, &virtual_storage, &storage, &mut slots, &counts).await?;
    }
    for (virtual_storage, cursor) in passes {
        let ids = db.retrying(|| assignments::cursor_page(db.pool(), &virtual_storage, cursor, PAGE)).await?;
        let mut last = cursor;
        let mut held_up = false;
        for id in &ids {
            held_up = topology.virtual_storage(&virtual_storage).is_some_and(|known| {
                known.storages.iter().any(|storage| slots.free(&virtual_storage, &storage.name) == 0)
            });
            if held_up {
                break;
            }
            let changes = movement::rearrange(shared, *id, &counts).await?;
            for change in &changes {
                slots.take(&virtual_storage, change);
            }
            last = *id;
        }
        let all = !held_up && ids.len() < PAGE as usize;
        let to = (!all).then_some(last);
        db.retrying(|| assignments::cursor_advance(db.pool(), &virtual_storage, cursor, to)).await?;
    }
    Ok(())
}

async fn drain(
    shared: &Arc<Shared>,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    slots: &mut Slots,
    counts: &[StorageCounts],
) -> Result<(), DbError> {
    let db = &shared.db;
    let limit = slots.free(virtual_storage, storage);
    if limit == 0 {
        return Ok(());
    }
    let ids = db.retrying(|| assignments::staying_list(db.pool(), virtual_storage, storage, limit)).await?;
    for id in ids {
        let changes = movement::rearrange(shared, id, counts).await?;
        for change in &changes {
            slots.take(virtual_storage, change);
        }
    }
    Ok(())
}
