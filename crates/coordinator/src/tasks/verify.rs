//! Compares replicas that are recorded as equal, a few repositories at a time, those first that were not looked at for the
//! longest. One that differs from the others is taken out of reads and made again.

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use futures::StreamExt as _;
use tabularium_common::ids::{RepositoryId, StorageName};
use tokio::sync::OwnedSemaphorePermit;

use super::pause;
use crate::{
    app::Shared,
    db::{DbError, repositories, verifications},
    expulsion::{self, Grounds},
    verification,
};

/// Repositories looked at in one run.
const BATCH: u32 = 32;
/// Of those at once.
const AT_ONCE: usize = 2;
/// How often a suspected repository is looked at before what is found has to do.
const LOOKS: usize = 5;

pub(super) fn start(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    shared.tasks.clone().spawn("verify-replicas", async move {
        while pause(&shared, shared.config.timing.verification_interval.0).await {
            if let Err(error) = run(&shared).await {
                tracing::debug!(%error, "replicas are not verified");
            }
        }
    });
}

async fn run(shared: &Arc<Shared>) -> Result<(), DbError> {
    let (db, age) = (&shared.db, shared.config.timing.verify_after.0);
    let topology = shared.topology.get();
    let storages =
        topology.storages().map(|(virtual_storage, known)| (virtual_storage.clone(), known.name.clone()));
    // What is on others cannot be compared now, and would keep those away that can be.
    let healthy: Vec<_> = storages
        .filter(|(virtual_storage, storage)| shared.health.is_healthy(virtual_storage, storage))
        .collect();
    let mut ids = db.retrying(|| verifications::unverified_list(db.pool(), &healthy, age, BATCH)).await?;
    // Of several replicas that are due each names its repository.
    let mut named = BTreeSet::new();
    ids.retain(|id| named.insert(*id));
    futures::stream::iter(ids)
        .for_each_concurrent(AT_ONCE, |id| async move {
            match verify(shared, id, &BTreeSet::new()).await {
                // One that cannot be read is looked at twice, with a pause, before that counts.
                Ok(Look::Unclear(broken)) if !broken.is_empty() => {
                    if let Some(place) = shared.suspicions.admit(id, Instant::now()) {
                        look_into(shared, id, place);
                    }
                }
                Ok(_) => {}
                Err(status) => {
                    tracing::debug!(repository_id = %id, error = status.message(), "replicas are not verified");
                }
            }
        })
        .await;
    Ok(())
}

/// What one look at a repository's replicas came to.
enum Look {
    /// There is nothing more to find out.
    Done,
    /// Not all could be compared, or something was written meanwhile. These say that they cannot read their replica.
    Unclear(BTreeSet<StorageName>),
}

/// Looks at a repository of which a replica is suspected, until it is clear whether that is right. What stays unclear is
/// looked at again like all that is not verified.
pub(crate) fn look_into(shared: &Arc<Shared>, id: RepositoryId, place: OwnedSemaphorePermit) {
    let shared = Arc::clone(shared);
    shared.tasks.clone().spawn("suspicion", async move {
        let _place = place;
        let mut broken = BTreeSet::new();
        for _ in 0..LOOKS {
            match verify(&shared, id, &broken).await {
                Ok(Look::Done) => return,
                Ok(Look::Unclear(unreadable)) => broken = unreadable,
                Err(status) => {
                    tracing::debug!(repository_id = %id, error = status.message(), "replicas are not verified");
                }
            }
            if !pause(&shared, shared.config.timing.verification_interval.0).await {
                return;
            }
        }
    });
}

/// Compares the replicas of a repository. One that could not be read the last time (`broken`) and cannot be read now counts
/// as different.
async fn verify(
    shared: &Arc<Shared>,
    id: RepositoryId,
    broken: &BTreeSet<StorageName>,
) -> Result<Look, tonic::Status> {
    let db = &shared.db;
    let comparison = db.retrying(|| verifications::comparison_begin(db.pool(), id)).await?;
    let Some(repository) = db.retrying(|| repositories::repository_find(db.pool(), id)).await? else {
        return Ok(Look::Done);
    };
    let key = &repository.key;
    let storages: Vec<StorageName> = repository
        .up_to_date()
        .filter(|storage| shared.health.is_healthy(&key.virtual_storage, storage))
        .cloned()
        .collect();
    let patience = shared.config.timing.verification_patience.0;
    let topology = shared.topology.get();
    let inspection = shared.inspector.inspect(&topology, &repository, &storages, patience).await;
    let mut verdict = verification::compare(&inspection.answers, &repository.primary);
    let unclear = || Ok(Look::Unclear(inspection.broken.keys().cloned().collect()));
    let unreadable: Vec<StorageName> =
        inspection.broken.keys().filter(|storage| broken.contains(*storage)).cloned().collect();
    if verdict.sound.is_empty() {
        for storage in &unreadable {
            let why = &inspection.broken[storage];
            tracing::error!(repository = %key, %storage, why, "a replica cannot be read, and none is known that can");
            db.retrying(|| verifications::replica_unreadable(db.pool(), id, storage, why)).await?;
        }
        return unclear();
    }
    verdict.different.extend(unreadable.iter().cloned());
    if verdict.different.is_empty() {
        // What was compared with nothing is not verified, unless there is nothing to compare it with.
        if verdict.sound.len() == 1 && repository.up_to_date().count() > 1 {
            return unclear();
        }
        let (sound, generation) = (&verdict.sound, repository.generation);
        db.retrying(|| verifications::replica_verified(db.pool(), id, comparison, sound, generation)).await?;
        // One that was not asked, or did not answer, is as good as it was before: unknown.
        let all = repository.up_to_date().all(|storage| verdict.sound.contains(storage));
        return if all { Ok(Look::Done) } else { unclear() };
    }
    let gone = expulsion::expel(shared, &repository, &verdict, &Grounds::Comparison, &unreadable).await?;
    if gone.is_empty() { unclear() } else { Ok(Look::Done) }
}
