//! Replicas that come and go: a replication factor that changed, a storage that is drained or was added. Decisions are
//! [`crate::placement`]'s; here they are carried out, one repository at a time, each in a transaction of its own under the
//! repository's lock.
//!
//! Nothing is given up before what replaces it is up to date: a replica first *leaves* in the records, serving and taking
//! part as ever, and goes when all that stay have the newest generation, nobody is writing, and it is not the primary.

use std::sync::Arc;

use tabularium_common::ids::{RepositoryId, StorageName};

use crate::{
    app::Shared,
    db::{DbError, assignments, outbox, repositories, storages::StorageCounts},
    placement::{self, Farewell, Holder, Rearrangement, Seat},
    repository::{Repository, RevokedRoute},
};

fn route(repository: &Repository) -> RevokedRoute {
    RevokedRoute { key: repository.key.clone(), id: repository.id, generation: repository.generation.next() }
}

fn seats(shared: &Shared, repository: &Repository, counts: &[StorageCounts]) -> Vec<Seat> {
    let topology = shared.topology.get();
    let virtual_storage = &repository.key.virtual_storage;
    let Some(known) = topology.virtual_storage(virtual_storage) else { return Vec::new() };
    known
        .storages
        .iter()
        .map(|storage| Seat {
            open: storage.configured,
            usable: shared.health.is_healthy(virtual_storage, &storage.name),
            load: counts
                .iter()
                .find(|held| {
                    held.virtual_storage == virtual_storage.as_str() && held.storage == storage.name.as_str()
                })
                .map_or(0, |held| held.replicas),
            storage: storage.name.clone(),
        })
        .collect()
}

/// Puts a repository's replicas where they should be, or begins to. Answers what it set in motion.
pub(crate) async fn rearrange(
    shared: &Shared,
    id: RepositoryId,
    counts: &[StorageCounts],
) -> Result<Vec<Rearrangement>, DbError> {
    let changes = shared.db.retrying(|| rearrange_once(shared, id, counts)).await?;
    if changes.iter().any(|change| matches!(change, Rearrangement::Assign(_))) {
        shared.bell.notify_one();
    }
    Ok(changes)
}

async fn rearrange_once(
    shared: &Shared,
    id: RepositoryId,
    counts: &[StorageCounts],
) -> Result<Vec<Rearrangement>, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let Some(repository) = repositories::repository_lock_id(&mut transaction, id).await? else {
        return Ok(Vec::new());
    };
    let Some(assignment) = assignments::assignment_read_in_txn(&mut transaction, id).await? else {
        return Ok(Vec::new());
    };
    let holders: Vec<Holder> = repository
        .replicas
        .iter()
        .map(|replica| Holder {
            leaving: assignment.leaving.contains(&replica.storage),
            primary: replica.storage == repository.primary,
            up_to_date: replica.generation == repository.generation,
            storage: replica.storage.clone(),
        })
        .collect();
    let mut changes = placement::rearrange(&holders, &seats(shared, &repository, counts), assignment.factor);
    let mut put_off = false;
    for change in &changes {
        match change {
            Rearrangement::Assign(storage) => {
                if assignments::replica_assign_in_txn(&mut transaction, &repository, storage).await? {
                    outbox::duty_owe_copy(&mut *transaction, &repository, storage, "").await?;
                } else {
                    put_off = true;
                }
            }
            Rearrangement::Keep(storage) => {
                assignments::replica_set_leaving_in_txn(&mut transaction, id, storage, false).await?;
            }
            Rearrangement::Release(storage) => {
                assignments::replica_set_leaving_in_txn(&mut transaction, id, storage, true).await?;
            }
        }
    }
    if put_off {
        // Without its replacement nothing may leave.
        transaction.rollback().await?;
        changes.clear();
    } else {
        transaction.commit().await?;
    }
    Ok(changes)
}

/// Whether a replica that was to leave has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    Yes,
    NotYet,
}

/// Gives a leaving replica up if that is safe now; moves the primary away first when it is that.
pub(crate) async fn release(
    shared: &Arc<Shared>,
    id: RepositoryId,
    storage: &StorageName,
) -> Result<Left, tonic::Status> {
    let done = shared.db.retrying(|| release_once(shared, id, storage)).await?;
    let Some((left, revoked)) = done else { return Ok(Left::NotYet) };
    if let Some((route, row)) = revoked {
        shared.revoke_now(route, row).await?;
    }
    Ok(left)
}

type Released = Option<(Left, Option<(RevokedRoute, i64)>)>;

async fn release_once(
    shared: &Shared,
    id: RepositoryId,
    storage: &StorageName,
) -> Result<Released, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let Some(repository) = repositories::repository_lock_id(&mut transaction, id).await? else {
        return Ok(None);
    };
    let Some(assignment) = assignments::assignment_read_in_txn(&mut transaction, id).await? else {
        return Ok(None);
    };
    if assignment.being_written || !assignment.leaving.contains(storage) {
        return Ok(None);
    }
    let virtual_storage = &repository.key.virtual_storage;
    let healthy = |storage: &StorageName| shared.health.is_healthy(virtual_storage, storage);
    let (left, row) = match placement::farewell(&repository, &assignment.leaving, storage, healthy) {
        Farewell::Wait => return Ok(None),
        Farewell::HandOver(to) => {
            repositories::repository_move_primary_in_txn(&mut transaction, id, &to).await?;
            tracing::info!(repository_id = %id, from = %storage, %to, "primary moved away");
            (Left::NotYet, Some(assignments::revocation_owe_in_txn(&mut transaction, id).await?))
        }
        Farewell::Now => {
            let grace = shared.config.timing.replica_removal_grace.0;
            (Left::Yes, assignments::replica_unassign_in_txn(&mut transaction, id, storage, grace).await?)
        }
    };
    transaction.commit().await?;
    Ok(Some((left, row.map(|row| (route(&repository), row)))))
}
