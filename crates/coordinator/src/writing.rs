//! The life of a write: begun, committed, aborted, or settled when nobody knows what became of it.

use std::sync::Arc;

use tabularium_common::ids::{Epoch, Generation, ReplicaPath, RepositoryId, SiteName, StorageName};
use uuid::Uuid;

use crate::{
    app::Shared,
    config::HomeSiteConfig,
    db::{
        DbError, outbox, replicas, repositories, revocations,
        writes::{self, Begun, Committed, Creation, Intent, OpenWrite, Word},
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
    if let Some(route) = moved.revoke {
        // Nobody waits here: nothing acknowledged is missing where the old route leads. Commits wait for what is owed.
        let owed = db.retrying(|| revocations::revocation_list_owed(db.pool(), &route.key)).await?;
        shared.revoke_later(vec![route], owed);
    }
    Ok(Some(moved.repository))
}

struct Moved {
    repository: Repository,
    revoke: Option<RevokedRoute>,
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
    let tainted = writes::write_tainted_in_txn(&mut transaction, repository.id, &repository.primary).await?;
    let decision = failover::decide(&repository, &begin.unreachable, &tainted, healthy, &mut rand::rng());
    let revoke = match decision {
        Decision::Stay => None,
        Decision::ReadOnly => return Ok(Some(Err(WriteError::ReadOnly))),
        Decision::Move { to } => Some(
            move_primary(&mut transaction, &mut repository, to, &tainted, &begin.intent.correlation_id)
                .await?,
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
/// unknown, and so is what the `tainted` replicas hold, which were copied from it while those writes ran.
async fn move_primary(
    transaction: &mut sqlx::PgConnection,
    repository: &mut Repository,
    to: StorageName,
    tainted: &[StorageName],
    correlation_id: &str,
) -> Result<RevokedRoute, sqlx::Error> {
    let old = std::mem::replace(&mut repository.primary, to);
    let lost = writes::write_fence_all_in_txn(transaction, repository.id).await?;
    repository.epoch =
        repositories::repository_move_primary_in_txn(transaction, repository.id, &repository.primary).await?;
    if lost > 0 {
        forget_replica(transaction, repository, &old, correlation_id).await?;
        if tainted.contains(&repository.primary) {
            // It may hold more than other replicas of its generation, so it is given one of its own.
            let raised =
                replicas::replica_raise_primary_in_txn(transaction, repository.id, correlation_id).await?;
            repository.generation = raised;
            if let Some(primary) =
                repository.replicas.iter_mut().find(|replica| replica.storage == repository.primary)
            {
                primary.generation = raised;
            }
        } else {
            for storage in tainted {
                forget_replica(transaction, repository, storage, correlation_id).await?;
            }
        }
    }
    // A route of the present generation names the old primary.
    let route = RevokedRoute {
        key: repository.key.clone(),
        id: repository.id,
        generation: repository.generation.next(),
    };
    if lost > 0 {
        revocations::revocation_owe_in_txn(transaction, &route).await?;
    }
    Ok(route)
}

/// What `storage` holds is not known any more, whatever is being copied to it: it is to be made again.
async fn forget_replica(
    transaction: &mut sqlx::PgConnection,
    repository: &mut Repository,
    storage: &StorageName,
    correlation_id: &str,
) -> Result<(), sqlx::Error> {
    replicas::replica_forget_in_txn(transaction, repository.id, storage).await?;
    outbox::duty_drop_replication_in_txn(transaction, repository.id, storage).await?;
    outbox::duty_owe_copy(&mut *transaction, repository, storage, correlation_id).await?;
    if let Some(replica) = repository.replicas.iter_mut().find(|replica| replica.storage == *storage) {
        replica.generation = Generation::UNKNOWN;
    }
    Ok(())
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

/// Records that a write took effect, and answers once no router can read what was before. A report that is repeated,
/// because its answer was lost, is answered as the first one.
pub(crate) async fn commit(
    shared: &Arc<Shared>,
    id: Uuid,
    router_id: &str,
    storages: &[StorageName],
) -> Result<Generation, WriteError> {
    let db = &shared.db;
    let committed =
        db.retrying(|| writes::write_commit(db.pool(), id, router_id, storages, Word::Router)).await?;
    match committed {
        Committed::Unknown => {}
        Committed::WithoutPrimary(primary) => return Err(WriteError::WithoutPrimary { primary }),
        Committed::Yes(route) => {
            shared.bell.notify_one();
            let generation = route.generation;
            revoke_owed(shared, route).await?;
            return Ok(generation);
        }
    }
    let ended = db.retrying(|| writes::write_find_ended(db.pool(), id, router_id)).await?;
    let Some(ended) = ended else { return Err(WriteError::NotOpen { id: id.to_string() }) };
    if !ended.is_committed() {
        // It was settled, and the node went on. Nobody is told that it counts, but what it left must be everywhere or
        // nowhere.
        reconsider(shared, id, true).await?;
        return Err(WriteError::NotOpen { id: id.to_string() });
    }
    let (generation, repository_id) = (Generation(ended.generation), RepositoryId(ended.repository_id));
    let found = db.retrying(|| repositories::repository_find(db.pool(), repository_id)).await?;
    if let Some(Repository { key, id, .. }) = found {
        // The first report may still be at this, or have died over it.
        revoke_owed(shared, RevokedRoute { key, id, generation }).await?;
    }
    Ok(generation)
}

/// Carries out what revocations are owed for a name, and waits until no router can read by the old route.
async fn revoke_owed(shared: &Shared, route: RevokedRoute) -> Result<(), DbError> {
    let db = &shared.db;
    let owed = db.retrying(|| revocations::revocation_list_owed(db.pool(), &route.key)).await?;
    if owed.is_empty() { Ok(()) } else { shared.revoker.revoke(&[route], owed).await }
}

/// Looks again at the storage of a write that was settled while its node may have been at it: if it is the primary, what
/// it holds counts as one more write; otherwise it is made again. Once for each write, unless its router reports `late`.
pub(crate) async fn reconsider(shared: &Arc<Shared>, id: Uuid, late: bool) -> Result<(), WriteError> {
    let route = shared.db.retrying(|| reconsider_under_lock(shared, id, late)).await?;
    let Some(route) = route else { return Ok(()) };
    tracing::info!(write_id = %id, repository_id = %route.id, generation = %route.generation, "settled write looked at again");
    shared.bell.notify_one();
    Ok(revoke_owed(shared, route).await?)
}

async fn reconsider_under_lock(
    shared: &Arc<Shared>,
    id: Uuid,
    late: bool,
) -> Result<Option<RevokedRoute>, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let found = writes::write_lock_settled_in_txn(&mut transaction, id, late).await?;
    let Some((repository_id, storage)) = found else { return Ok(None) };
    let repository = repositories::repository_lock_id(&mut transaction, repository_id).await?;
    writes::write_end_doubt_in_txn(&mut transaction, id).await?;
    let mut route = None;
    if let Some(mut repository) = repository
        && repository.replica(&storage).is_some()
    {
        let generation = if repository.primary == storage {
            replicas::replica_raise_primary_in_txn(&mut transaction, repository.id, "").await?
        } else {
            forget_replica(&mut transaction, &mut repository, &storage, "").await?;
            repository.generation.next()
        };
        let revoked = RevokedRoute { key: repository.key, id: repository.id, generation };
        if repository.primary != storage {
            revocations::revocation_owe_in_txn(&mut transaction, &revoked).await?;
        }
        route = Some(revoked);
    }
    transaction.commit().await?;
    Ok(route)
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
    let Some(open) = db.retrying(|| writes::write_find(db.pool(), id)).await? else {
        if let Doubt::Reported { router_id, .. } = doubt {
            db.retrying(|| writes::write_doubt_again(db.pool(), id, router_id)).await?;
        }
        return Ok(());
    };
    let reachable = open.creation || is_primary_reachable(shared, &open, doubt).await;
    let settled = db.retrying(|| settle_under_lock(shared, id, doubt, reachable)).await?;
    let Some((settlement, route)) = settled else { return Ok(()) };
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
    if let Some(route) = route {
        revoke_owed(shared, route).await?;
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

type Settled = (Settlement, Option<RevokedRoute>);

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
    let tainted = writes::write_tainted_in_txn(&mut transaction, repository.id, &open.primary).await?;
    let settlement = settlement::settle(
        &repository,
        open.creation,
        reachable,
        unreachable,
        &tainted,
        healthy,
        &mut rand::rng(),
    );
    let route = match &settlement {
        Settlement::CancelCreation => {
            let primary = &open.primary;
            writes::write_cancel_creation(&mut *transaction, repository.id, primary, &open.correlation_id)
                .await?;
            None
        }
        Settlement::CountAsWritten => {
            let storages = std::slice::from_ref(&open.primary);
            let router_id = &open.router_id;
            match writes::write_commit(&mut *transaction, id, router_id, storages, Word::Nobody).await? {
                Committed::Yes(route) => Some(route),
                Committed::Unknown | Committed::WithoutPrimary(_) => None,
            }
        }
        Settlement::Fence { to } => {
            let to = to.clone();
            let route =
                move_primary(&mut transaction, &mut repository, to, &tainted, &open.correlation_id).await?;
            shared.metrics.primary_moved();
            Some(route)
        }
    };
    transaction.commit().await?;
    Ok(Some((settlement, route)))
}
