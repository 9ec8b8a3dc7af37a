//! How a creation begins: storages are chosen, the name is reserved, and nobody sees it before the commit.

use std::sync::{Arc, Mutex, PoisonError};

use tabularium_common::ids::{Epoch, Generation, ReplicaPath, RepositoryId, StorageName};

use super::{Begin, Kind, begin::Attempted, ticket::Try};
use crate::{
    app::Shared,
    db::{
        DbError,
        creations::{self, Creation},
        repositories,
    },
    error::{NameError, WriteError},
    placement::{self, Candidate, Placement},
    quorum::QuorumPolicy,
    repository::{Replica, Repository, RepositoryKey},
};

/// Numbers reserved with one statement.
const IDS_AT_ONCE: i32 = 32;

/// Numbers for new repositories; those left when the process ends are never given out.
#[derive(Default)]
pub(crate) struct RepositoryIds(Mutex<Vec<RepositoryId>>);

impl RepositoryIds {
    /// Those that are left are not given out: they may be taken.
    pub(crate) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// One that no repository has or had.
    pub(crate) async fn next(&self, shared: &Shared) -> Result<RepositoryId, DbError> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(id) = kept {
            return Ok(id);
        }
        let db = &shared.db;
        let ids = db.promptly(|| repositories::repository_reserve_ids(db.pool(), IDS_AT_ONCE)).await?;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(ids);
        kept.pop().ok_or_else(|| DbError::from(sqlx::Error::RowNotFound))
    }
}

/// Tries to reserve the name.
pub(super) async fn attempt(
    shared: &Arc<Shared>,
    begin: &Begin,
    additional: Option<&Repository>,
) -> Result<Attempted, WriteError> {
    if let Some(site) = &begin.terms.sync_from_site
        && !shared.config.home_sites.iter().any(|home| home.name == *site)
    {
        return Err(WriteError::UnknownHomeSite { site: site.clone() });
    }
    let Placement { primary, secondaries } = choose_storages(shared, begin, additional)?;
    let id = shared.repository_ids.next(shared).await?;
    let replica_path = if begin.intent.method.contains("CreateObjectPool") {
        ReplicaPath::for_object_pool(id)
    } else {
        ReplicaPath::for_repository(id)
    };
    let replicas = [&primary]
        .into_iter()
        .chain(&secondaries)
        .map(|storage| Replica { storage: storage.clone(), generation: Generation::UNKNOWN })
        .collect();
    let repository = Repository {
        id,
        key: begin.key.clone(),
        replica_path,
        primary: primary.clone(),
        generation: Generation(0),
        epoch: Epoch(0),
        home_site: begin.terms.sync_from_site.clone(),
        write_quorum: quorum_policy(shared, &begin.key),
        members: secondaries.len() + 1,
        replicas,
    };
    let mut participants = vec![primary];
    if begin.terms.votes {
        participants.extend(secondaries.iter().filter(|storage| is_usable(shared, begin, storage)).cloned());
        let (able, quorum) = (participants.len(), repository.quorum());
        if able < quorum {
            return Err(WriteError::TooFewStorages { able, quorum });
        }
    }
    let creation = Creation { repository, participants, intent: begin.intent.clone() };
    let db = &shared.db;
    if db.promptly(|| creations::creation_begin(db.pool(), &creation)).await? {
        return Ok(Try::Over((creation.repository, creation.participants, secondaries)));
    }
    name_taken(shared, begin).await
}

/// What to do about a name that somebody has. The very same request, whose answer was lost, starts anew; a creation that
/// nobody renews is about to be cancelled; and what another is creating will exist.
async fn name_taken(shared: &Arc<Shared>, begin: &Begin) -> Result<Attempted, WriteError> {
    let db = &shared.db;
    let holder = db.promptly(|| creations::creation_find_name(db.pool(), &begin.key, &begin.intent)).await?;
    let Some(holder) = holder else { return Ok(Try::Held) };
    let upsert = begin.kind == Kind::Upsert;
    if holder.ready {
        return if upsert { Ok(Try::Held) } else { Err(WriteError::Exists) };
    }
    if holder.same_request == Some(true)
        && let Some(creation) = holder.creation
    {
        super::discard(shared, creation, &begin.intent.router_id).await?;
        return Ok(Try::Held);
    }
    if upsert || holder.expired == Some(true) { Ok(Try::Held) } else { Err(WriteError::Exists) }
}

/// As our configuration says; of a virtual storage that only others know, the stricter one.
fn quorum_policy(shared: &Shared, key: &RepositoryKey) -> QuorumPolicy {
    let configured = shared.config.virtual_storages.iter().find(|known| known.name == key.virtual_storage);
    configured.map(|known| known.write_quorum).unwrap_or_default()
}

fn is_usable(shared: &Shared, begin: &Begin, storage: &StorageName) -> bool {
    !begin.terms.unreachable.contains(storage)
        && shared.health.is_healthy(&begin.key.virtual_storage, storage)
}

fn choose_storages(
    shared: &Shared,
    begin: &Begin,
    additional: Option<&Repository>,
) -> Result<Placement, WriteError> {
    let topology = shared.topology.get();
    let virtual_storage =
        topology.virtual_storage(&begin.key.virtual_storage).ok_or(NameError::UnknownVirtualStorage)?;
    let candidate = |storage: &StorageName| Candidate {
        storage: storage.clone(),
        usable: is_usable(shared, begin, storage),
    };
    let mut rng = rand::rng();
    let placed = if let Some(beside) = additional {
        let holders: Vec<Candidate> = beside
            .replicas
            .iter()
            .map(|replica| Candidate {
                // A copy that lacks something is no place to link objects from.
                usable: candidate(&replica.storage).usable && replica.generation == beside.generation,
                storage: replica.storage.clone(),
            })
            .collect();
        placement::place_beside(&holders, &beside.primary, &mut rng)
    } else {
        let candidates: Vec<Candidate> = virtual_storage
            .storages
            .iter()
            .filter(|known| known.configured)
            .map(|known| candidate(&known.name))
            .collect();
        placement::place(&candidates, virtual_storage.default_replication_factor, &mut rng)
    };
    placed.map_err(|placement::NoHealthyNode| WriteError::NoHealthyNode)
}
