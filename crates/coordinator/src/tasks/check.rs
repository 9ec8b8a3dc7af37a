//! Has git look through the objects of replicas, on each storage one after the other, those first that were not looked
//! through for the longest. When one is damaged all replicas of its repository are looked through, and what is damaged is
//! made again from what is whole.
//!
//! A storage spends a share of its time on it and no more ([`FsckConfig`]). Several coordinators do not get in each other's
//! way: each takes a replica that nobody has, and a node looks through one at a time, whoever asks.
//!
//! [`FsckConfig`]: crate::FsckConfig

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tabularium_common::ids::{RepositoryId, StorageName, VirtualStorageName};
use tabularium_proto::{
    gitaly,
    node::{CheckObjectsRequest, replica_service_client::ReplicaServiceClient},
};
use tokio::time::timeout;
use tonic::Status;

use super::pause;
use crate::{
    app::Shared,
    db::{DbError, checks, repositories},
    expulsion::{self, Grounds},
    repository::Repository,
    soundness::{Looked, judge},
};

/// How long a node may be busy with other replicas when nobody waits for the answer.
const TURN: Duration = Duration::from_secs(60);
/// Beyond what a node was given to answer.
const MARGIN: Duration = Duration::from_secs(30);

type Place = (VirtualStorageName, StorageName);

/// Storages of which a replica is being looked through at this coordinator's word.
type Busy = Arc<Mutex<HashSet<Place>>>;

/// Busy until this is dropped.
struct AtWork {
    busy: Busy,
    place: Place,
}

impl AtWork {
    fn begin(busy: &Busy, place: &Place) -> Option<Self> {
        let begun = busy.lock().unwrap_or_else(PoisonError::into_inner).insert(place.clone());
        begun.then(|| Self { busy: Arc::clone(busy), place: place.clone() })
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.place);
    }
}

pub(super) fn start(shared: &Arc<Shared>) {
    if shared.config.fsck.share_percent == 0 {
        return;
    }
    let shared = Arc::clone(shared);
    let busy = Busy::default();
    shared.tasks.clone().spawn("check-objects", async move {
        while pause(&shared, shared.config.fsck.interval.0).await {
            for (virtual_storage, known) in shared.topology.get().storages() {
                let place = (virtual_storage.clone(), known.name.clone());
                let Some(at_work) = AtWork::begin(&busy, &place) else { continue };
                let (task, stopping) = (Arc::clone(&shared), shared.tasks.stopping());
                shared.tasks.spawn("check-storage", async move {
                    let at_work = at_work;
                    // A look that is cut off is cut off on its node, and the replica is due again later.
                    stopping.run_until_cancelled(storage(&task, &at_work.place)).await;
                });
            }
        }
    });
}

/// Looks through what is due on one storage.
async fn storage(shared: &Arc<Shared>, (virtual_storage, storage): &Place) {
    let (config, db) = (&shared.config.fsck, &shared.db);
    let lease = config.limit.0 + TURN + MARGIN;
    loop {
        let known = shared.topology.get().storage(virtual_storage, storage).is_some();
        if !known || !shared.health.is_healthy(virtual_storage, storage) {
            return;
        }
        let claimed = db.retrying(|| checks::check_claim(db.pool(), virtual_storage, storage, lease)).await;
        let id = match claimed {
            Ok(Some(id)) => id,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "no replica is looked through");
                return;
            }
        };
        let began = Instant::now();
        if let Err(status) = sample(shared, id, storage).await {
            tracing::warn!(repository_id = %id, %storage, error = status.message(), "a replica is not looked through");
        }
        match config.rest(began.elapsed()) {
            Some(rest) => tokio::time::sleep(rest).await,
            None => return,
        }
    }
}

/// Looks through one replica, and through the others when it is damaged.
async fn sample(shared: &Arc<Shared>, id: RepositoryId, storage: &StorageName) -> Result<(), Status> {
    let db = &shared.db;
    let Some(repository) = db.retrying(|| repositories::repository_find(db.pool(), id)).await? else {
        return Ok(());
    };
    let mut found = look(shared, &repository, std::slice::from_ref(storage), TURN, |_, _| {}).await?;
    if !matches!(found.get(storage), Some(Looked::Damaged(_))) {
        return Ok(());
    }
    let others: Vec<StorageName> =
        serving(shared, &repository).into_iter().filter(|other| other != storage).collect();
    found.extend(look(shared, &repository, &others, shared.config.fsck.limit.0, |_, _| {}).await?);
    let gone = act(shared, &repository, &found).await?;
    let known =
        |storage: &StorageName| matches!(found.get(storage), Some(Looked::Whole | Looked::Damaged(_)));
    // Somebody wrote all the time, or the others could not be looked through. When all are damaged it waits like any other.
    let open =
        !judge(&found, &repository.primary).different.is_empty() || !repository.up_to_date().all(known);
    if gone.is_empty() && open {
        let soon = shared.config.fsck.retry_after.0;
        db.retrying(|| checks::check_postpone(db.pool(), id, storage, soon)).await?;
    }
    Ok(())
}

/// The replicas that are read from.
pub(crate) fn serving(shared: &Shared, repository: &Repository) -> Vec<StorageName> {
    let healthy = |storage: &&StorageName| shared.health.is_healthy(&repository.key.virtual_storage, storage);
    repository.up_to_date().filter(healthy).cloned().collect()
}

/// Looks through replicas, all at once, and records what is found. Each is told to `tell` when it is known.
pub(crate) async fn look(
    shared: &Arc<Shared>,
    repository: &Repository,
    storages: &[StorageName],
    turn: Duration,
    mut tell: impl FnMut(&StorageName, &Looked),
) -> Result<BTreeMap<StorageName, Looked>, DbError> {
    let mut looking: FuturesUnordered<_> = storages
        .iter()
        .map(|storage| async move { (storage, ask(shared, repository, storage, turn).await) })
        .collect();
    let mut found = BTreeMap::new();
    while let Some((storage, looked)) = looking.next().await {
        record(shared, repository, storage, &looked).await?;
        tell(storage, &looked);
        found.insert(storage.clone(), looked);
    }
    Ok(found)
}

async fn record(
    shared: &Shared,
    repository: &Repository,
    storage: &StorageName,
    looked: &Looked,
) -> Result<(), DbError> {
    let (db, config, id) = (&shared.db, &shared.config.fsck, repository.id);
    // Replicas that were made together are not due together for ever.
    let next = config.every.0.mul_f64(rand::random_range(0.9..=1.1));
    match looked {
        Looked::Whole => db.retrying(|| checks::check_whole(db.pool(), id, storage, next)).await,
        Looked::Damaged(damage) => {
            tracing::error!(repository = %repository.key, %storage, damage, "a replica is damaged");
            db.retrying(|| checks::check_damaged(db.pool(), id, storage, next, damage)).await
        }
        Looked::Unknown(reason) => {
            tracing::info!(repository = %repository.key, %storage, reason, "a replica is not looked through");
            let next = config.retry_after.0;
            db.retrying(|| checks::check_postpone(db.pool(), id, storage, next)).await
        }
    }
}

async fn ask(shared: &Shared, repository: &Repository, storage: &StorageName, turn: Duration) -> Looked {
    let topology = shared.topology.get();
    let Some(address) = topology.address(&repository.key.virtual_storage, storage) else {
        return Looked::Unknown("the storage has no address".to_owned());
    };
    let limit = shared.config.fsck.limit.0;
    let request = CheckObjectsRequest {
        repository: Some(gitaly::Repository {
            storage_name: storage.to_string(),
            relative_path: repository.replica_path.to_string(),
            ..gitaly::Repository::default()
        }),
        patience_milliseconds: milliseconds(turn),
        limit_milliseconds: milliseconds(limit),
    };
    let mut client = ReplicaServiceClient::new(shared.inspector.channel(address));
    match timeout(turn + limit + MARGIN, client.check_objects(request)).await {
        Ok(Ok(answer)) => {
            let answer = answer.into_inner();
            match (answer.exists, answer.sound) {
                (true, true) => Looked::Whole,
                (true, false) => Looked::Damaged(answer.findings),
                // A comparison finds that sooner, and knows what to make of it.
                (false, _) => Looked::Unknown("there is no repository".to_owned()),
            }
        }
        Ok(Err(status)) => Looked::Unknown(format!("{}: {}", status.code(), status.message())),
        Err(_) => Looked::Unknown("the node did not answer in time".to_owned()),
    }
}

fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Has what is damaged made again, if something whole is left; answers which.
pub(crate) async fn act(
    shared: &Arc<Shared>,
    seen: &Repository,
    found: &BTreeMap<StorageName, Looked>,
) -> Result<Vec<StorageName>, Status> {
    let verdict = judge(found, &seen.primary);
    if verdict.different.is_empty() {
        let any = found.values().any(|looked| matches!(looked, Looked::Damaged(_)));
        if any {
            tracing::error!(repository = %seen.key, "replicas are damaged, and none is known to be whole; they go on serving");
        }
        return Ok(Vec::new());
    }
    let damage = |storage: &StorageName| match found.get(storage) {
        Some(Looked::Damaged(damage)) => Some((storage.clone(), damage.clone())),
        _ => None,
    };
    let grounds = Grounds::Damage(verdict.different.iter().filter_map(damage).collect());
    let (task, seen) = (Arc::clone(shared), seen.clone());
    // Also when nobody waits for it any more.
    let expelling = shared
        .tasks
        .spawn("expel-damaged", async move { expulsion::expel(&task, &seen, &verdict, &grounds, &[]).await });
    expelling.await.map_err(|error| Status::internal(error.to_string()))?
}
