//! The life of a write: begun, committed, aborted, or settled when nobody knows what became of it.

use std::sync::Arc;

use tabularium_common::ids::{Epoch, Generation, ReplicaPath, SiteName, StorageName};
use uuid::Uuid;

use crate::{
    app::Shared,
    config::HomeSiteConfig,
    db::{
        DbError, outbox, replicas, repositories, revocations,
        writes::{self, Begun, Committed, Creation, Intent, OpenWrite},
    },
    error::{NameError, WriteError},
    failover::{self, Decision},
    placement::{self, Candidate, Placement},
    repository::{Replica, Repository, RepositoryKey, RevokedRoute},
    settlement::{self, Settlement},
};

/// What a router asks for.
#[derive(Debug, Clone)]
pub(crate) struct Begin {
    pub(crate) key: RepositoryKey,
    pub(crate) kind: Kind,
    pub(crate) additional: Option<RepositoryKey>,
    pub(crate) unreachable: Vec<StorageName>,
    pub(crate) sync_from_site: Option<SiteName>,
    pub(crate) intent: Intent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Update,
    Create,
    Upsert,
}

/// A write that may go to its primary now.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) repository: Repository,
    pub(crate) additional: Option<ReplicaPath>,
    /// Of a creation.
    pub(crate) secondaries: Vec<StorageName>,
}

/// Records the intent of a write and answers where it goes.
pub(crate) async fn begin(shared: &Arc<Shared>, begin: &Begin) -> Result<Started, WriteError> {
    if shared.topology.get().virtual_storage(&begin.key.virtual_storage).is_none() {
        return Err(NameError::UnknownVirtualStorage.into());
    }
    let additional = match &begin.additional {
        None => None,
        Some(key) if key.virtual_storage != begin.key.virtual_storage => {
            return Err(WriteError::AdditionalElsewhere);
        }
        Some(key) => Some(
            shared
                .db
                .retrying(|| repositories::repository_resolve(shared.db.pool(), key))
                .await?
                .ok_or(WriteError::AdditionalNotFound)?,
        ),
    };
    let additional_path = additional.as_ref().map(|repository| repository.replica_path.clone());
    if begin.kind != Kind::Create {
        match update(shared, begin).await? {
            Some(repository) => {
                return Ok(Started { repository, additional: additional_path, secondaries: Vec::new() });
            }
            None if begin.kind == Kind::Update => return Err(WriteError::NotFound),
            None => {}
        }
    }
    let (repository, secondaries) = create(shared, begin, additional.as_ref()).await?;
    Ok(Started { repository, additional: additional_path, secondaries })
}

/// Begins a write to an existing repository; `None` when there is none of that name.
async fn update(shared: &Arc<Shared>, begin: &Begin) -> Result<Option<Repository>, WriteError> {
    let db = &shared.db;
    let site = begin.sync_from_site.as_ref();
    let begun = db
        .retrying(|| writes::write_begin(db.pool(), &begin.key, &begin.intent, site, &begin.unreachable))
        .await?;
    let repository = match begun {
        Begun::Yes(repository) => return Ok(Some(repository)),
        Begun::NotFound => return Ok(None),
        Begun::Undecided(repository) => repository,
    };
    check_site(&shared.config.home_sites, &repository, site)?;
    let Some(moved) = db.retrying(|| begin_with_failover(shared, begin)).await? else { return Ok(None) };
    let moved = moved?;
    if let Some((route, row)) = moved.revoke {
        // Without `row` nothing is wrong with the old route but its primary; commits see to the rest.
        shared.revoke_later(vec![route], row.into_iter().collect());
    }
    Ok(Some(moved.repository))
}

struct Moved {
    repository: Repository,
    revoke: Option<(RevokedRoute, Option<i64>)>,
}

/// Under the repository's lock: moves the primary if need be, and records the intent.
async fn begin_with_failover(
    shared: &Arc<Shared>,
    begin: &Begin,
) -> Result<Option<Result<Moved, WriteError>>, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let Some(mut repository) = repositories::repository_lock_name(&mut transaction, &begin.key).await? else {
        return Ok(None);
    };
    let site = begin.sync_from_site.as_ref();
    if let Err(refused) = check_site(&shared.config.home_sites, &repository, site) {
        return Ok(Some(Err(refused)));
    }
    let healthy = |storage: &StorageName| shared.health.is_healthy(&begin.key.virtual_storage, storage);
    let decision = failover::decide(&repository, &begin.unreachable, healthy, &mut rand::rng());
    let revoke = match decision {
        Decision::Stay => None,
        Decision::ReadOnly => return Ok(Some(Err(WriteError::ReadOnly))),
        Decision::Move { to } => Some(
            move_primary(&mut transaction, &mut repository, to, false, &begin.intent.correlation_id).await?,
        ),
    };
    writes::write_insert_in_txn(&mut transaction, &repository, &begin.intent).await?;
    transaction.commit().await?;
    if revoke.is_some() {
        shared.metrics.primary_moved();
        tracing::info!(
            correlation_id = begin.intent.correlation_id,
            repository_id = %repository.id,
            storage = %repository.primary,
            epoch = %repository.epoch,
            "primary moved"
        );
        shared.bell.notify_one();
    }
    Ok(Some(Ok(Moved { repository, revoke })))
}

/// Moves the primary away. Writes that are open on the old one will be refused their commit; what it holds is then
/// unknown, as it is when the caller says that a write is `in_doubt`.
async fn move_primary(
    transaction: &mut sqlx::PgConnection,
    repository: &mut Repository,
    to: StorageName,
    in_doubt: bool,
    correlation_id: &str,
) -> Result<(RevokedRoute, Option<i64>), sqlx::Error> {
    let old = std::mem::replace(&mut repository.primary, to);
    let lost = writes::write_delete_all_in_txn(transaction, repository.id).await?;
    repository.epoch =
        repositories::repository_move_primary_in_txn(transaction, repository.id, &repository.primary).await?;
    // A route of the present generation names the old primary.
    let route = RevokedRoute {
        key: repository.key.clone(),
        id: repository.id,
        generation: repository.generation.next(),
    };
    if lost == 0 && !in_doubt {
        return Ok((route, None));
    }
    replicas::replica_forget_in_txn(transaction, repository.id, &old).await?;
    outbox::duty_drop_replication_in_txn(transaction, repository.id, &old).await?;
    outbox::duty_owe_copy(&mut *transaction, repository, &old, correlation_id).await?;
    if let Some(replica) = repository.replicas.iter_mut().find(|replica| replica.storage == old) {
        replica.generation = Generation::UNKNOWN;
    }
    let row = revocations::revocation_owe_in_txn(transaction, &route).await?;
    Ok((route, Some(row)))
}

/// Whether a write from this origin may go to this repository here.
fn check_site(
    home_sites: &[HomeSiteConfig],
    repository: &Repository,
    from: Option<&SiteName>,
) -> Result<(), WriteError> {
    match (&repository.home_site, from) {
        (None, None) => Ok(()),
        (Some(home), Some(from)) if home == from => Ok(()),
        (None, Some(from)) => Err(WriteError::NotAMirror { site: from.clone() }),
        (Some(home), _) => {
            let push_to = home_sites
                .iter()
                .find(|site| site.name == *home)
                .map(|site| format!("{}/{}", site.url.trim_end_matches('/'), repository.key.relative_path));
            Err(WriteError::Mirror { site: home.clone(), push_to })
        }
    }
}

async fn create(
    shared: &Arc<Shared>,
    begin: &Begin,
    additional: Option<&Repository>,
) -> Result<(Repository, Vec<StorageName>), WriteError> {
    if let Some(site) = &begin.sync_from_site
        && !shared.config.home_sites.iter().any(|home| home.name == *site)
    {
        return Err(WriteError::UnknownHomeSite { site: site.clone() });
    }
    let Placement { primary, secondaries } = choose_storages(shared, begin, additional)?;
    let db = &shared.db;
    let id = db.retrying(|| repositories::repository_reserve_id(db.pool())).await?;
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
        primary,
        generation: Generation(0),
        epoch: Epoch(0),
        home_site: begin.sync_from_site.clone(),
        replicas,
    };
    let creation = Creation { repository, intent: begin.intent.clone() };
    if db.retrying(|| writes::write_begin_creation(db.pool(), &creation)).await? {
        Ok((creation.repository, secondaries))
    } else {
        Err(WriteError::Exists)
    }
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
        usable: !begin.unreachable.contains(storage)
            && shared.health.is_healthy(&virtual_storage.name, storage),
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

/// Records that a write took effect, and answers once no router can read what was before.
pub(crate) async fn commit(
    shared: &Arc<Shared>,
    id: Uuid,
    router_id: &str,
    storages: &[StorageName],
) -> Result<Generation, WriteError> {
    let db = &shared.db;
    let committed = db.retrying(|| writes::write_commit(db.pool(), id, router_id, storages)).await?;
    match committed {
        Committed::Unknown => Err(WriteError::NotOpen { id: id.to_string() }),
        Committed::WithoutPrimary(primary) => Err(WriteError::WithoutPrimary { primary }),
        Committed::Yes { generation, revoke, .. } => {
            shared.bell.notify_one();
            if let Some((route, rows)) = revoke {
                shared.revoker.revoke(&[route], rows).await?;
            }
            Ok(generation)
        }
    }
}

/// Clears the intent of a write that did not happen. That it is not there is no error: it was settled before.
pub(crate) async fn discard(shared: &Arc<Shared>, id: Uuid, router_id: &str) -> Result<(), WriteError> {
    let db = &shared.db;
    if db.retrying(|| writes::write_discard(db.pool(), id, router_id)).await? {
        return Ok(());
    }
    let Some(open) = db.retrying(|| writes::write_find(db.pool(), id)).await? else { return Ok(()) };
    if open.creation && open.router_id == router_id {
        cancel_creation(shared, &open).await?;
    }
    Ok(())
}

async fn cancel_creation(shared: &Arc<Shared>, open: &OpenWrite) -> Result<(), DbError> {
    let pool = shared.db.pool();
    let (id, primary, correlation) = (open.repository_id, &open.primary, &open.correlation_id);
    shared.db.retrying(|| writes::write_cancel_creation(pool, id, primary, correlation)).await?;
    shared.bell.notify_one();
    Ok(())
}

/// Why a write is to be settled.
#[derive(Debug, Clone)]
pub(crate) enum Doubt {
    /// Its router does not know what became of it; it could not reach these storages.
    Reported { router_id: String, unreachable: Vec<StorageName> },
    /// Its router stopped renewing it.
    Expired,
}

/// Settles a write of which nobody knows whether it took effect. That it is not there, or was renewed, is no error.
pub(crate) async fn settle(shared: &Arc<Shared>, id: Uuid, doubt: &Doubt) -> Result<(), WriteError> {
    let db = &shared.db;
    let Some(open) = db.retrying(|| writes::write_find(db.pool(), id)).await? else { return Ok(()) };
    let reachable = open.creation || is_primary_reachable(shared, &open, doubt).await;
    let revoke = db.retrying(|| settle_under_lock(shared, id, doubt, reachable)).await?;
    let Some((settlement, revoke)) = revoke else { return Ok(()) };
    shared.metrics.write_settled();
    shared.bell.notify_one();
    tracing::info!(
        write_id = %id,
        correlation_id = open.correlation_id,
        repository_id = %open.repository_id,
        ?settlement,
        ?doubt,
        "write in doubt settled"
    );
    if let Some((route, rows)) = revoke {
        shared.revoker.revoke(&[route], rows).await?;
    }
    Ok(())
}

/// Asks the node itself when it is not known to be gone: our last probe may be older than its death.
async fn is_primary_reachable(shared: &Arc<Shared>, open: &OpenWrite, doubt: &Doubt) -> bool {
    if let Doubt::Reported { unreachable, .. } = doubt
        && unreachable.contains(&open.primary)
    {
        return false;
    }
    match shared.topology.get().address(&open.virtual_storage, &open.primary) {
        Some(address) => {
            shared.health.dial(&open.virtual_storage, &open.primary, address).await.storage_served
        }
        None => false,
    }
}

type Settled = (Settlement, Option<(RevokedRoute, Vec<i64>)>);

async fn settle_under_lock(
    shared: &Arc<Shared>,
    id: Uuid,
    doubt: &Doubt,
    reachable: bool,
) -> Result<Option<Settled>, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let Some(seen) = writes::write_find(&mut *transaction, id).await? else { return Ok(None) };
    let locked = repositories::repository_lock_id(&mut transaction, seen.repository_id).await?;
    // Read again: only now nobody else can settle or commit it.
    let open = writes::write_find(&mut *transaction, id).await?;
    let (Some(mut repository), Some(open)) = (locked, open) else { return Ok(None) };
    let (stands, unreachable) = match doubt {
        Doubt::Reported { router_id, unreachable } => (open.router_id == *router_id, unreachable.as_slice()),
        Doubt::Expired => (open.expired, [].as_slice()),
    };
    if !stands {
        return Ok(None);
    }
    let virtual_storage = repository.key.virtual_storage.clone();
    let healthy = |storage: &StorageName| shared.health.is_healthy(&virtual_storage, storage);
    let settlement =
        settlement::settle(&repository, open.creation, reachable, unreachable, healthy, &mut rand::rng());
    let revoke = match &settlement {
        Settlement::CancelCreation => {
            let primary = &open.primary;
            writes::write_cancel_creation(&mut *transaction, repository.id, primary, &open.correlation_id)
                .await?;
            None
        }
        Settlement::CountAsWritten => {
            let storages = std::slice::from_ref(&open.primary);
            match writes::write_commit(&mut *transaction, id, &open.router_id, storages).await? {
                Committed::Yes { revoke, .. } => revoke,
                Committed::Unknown | Committed::WithoutPrimary(_) => None,
            }
        }
        Settlement::Fence { to } => {
            let to = to.clone();
            let (route, row) =
                move_primary(&mut transaction, &mut repository, to, true, &open.correlation_id).await?;
            shared.metrics.primary_moved();
            Some((route, row.into_iter().collect()))
        }
    };
    transaction.commit().await?;
    Ok(Some((settlement, revoke)))
}
