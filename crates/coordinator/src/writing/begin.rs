//! How a write begins: the ticket is taken, and it is answered who takes part. The primary is moved first when the router
//! cannot reach it.

use std::{sync::Arc, time::Duration};

use tabularium_common::ids::{ReplicaPath, SiteName, StorageName};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    create,
    ticket::{self, Try},
};
use crate::{
    app::Shared,
    config::HomeSiteConfig,
    db::{
        repositories, revocations,
        writes::{self, Asked, Begun, Intent, Terms},
    },
    error::{NameError, WriteError},
    failover::{self, Decision, Reach},
    repository::{Repository, RepositoryKey, RevokedRoute},
};

/// What a router asks for.
#[derive(Debug, Clone)]
pub(crate) struct Begin {
    pub(crate) key: RepositoryKey,
    pub(crate) kind: Kind,
    pub(crate) additional: Option<RepositoryKey>,
    pub(crate) terms: Terms,
    pub(crate) intent: Intent,
    /// How long it may wait for the ticket.
    pub(crate) wait: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Update,
    Create,
    Upsert,
}

/// A write that may go to its participants now.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) repository: Repository,
    pub(crate) additional: Option<ReplicaPath>,
    /// The primary first.
    pub(crate) participants: Vec<StorageName>,
    /// Of a creation.
    pub(crate) secondaries: Vec<StorageName>,
    /// How long it was until the try began that took the ticket: its lease began no earlier.
    pub(crate) waited: Duration,
}

/// Takes the ticket of a write and answers where it goes. When the caller has hung up it stops waiting.
pub(crate) async fn begin(
    shared: &Arc<Shared>,
    begin: &Begin,
    hung_up: &CancellationToken,
) -> Result<Started, WriteError> {
    if shared.topology.get().virtual_storage(&begin.key.virtual_storage).is_none() {
        return Err(NameError::UnknownVirtualStorage.into());
    }
    let asked = Instant::now();
    let additional = find_additional(shared, begin).await?;
    let additional = additional.as_ref();
    let mut waited = Duration::ZERO;
    let (repository, participants, secondaries) =
        ticket::take(shared, &begin.key, begin.wait, hung_up, || {
            waited = asked.elapsed();
            attempt(shared, begin, additional)
        })
        .await?;
    let additional = additional.map(|repository| repository.replica_path.clone());
    Ok(Started { repository, additional, participants, secondaries, waited })
}

async fn find_additional(shared: &Shared, begin: &Begin) -> Result<Option<Repository>, WriteError> {
    let Some(key) = &begin.additional else { return Ok(None) };
    if key.virtual_storage != begin.key.virtual_storage {
        return Err(WriteError::AdditionalElsewhere);
    }
    let db = &shared.db;
    let found = db.promptly(|| repositories::repository_resolve(db.pool(), key)).await?;
    Ok(Some(found.ok_or(WriteError::AdditionalNotFound)?))
}

/// The repository, its participants, and where a new one will be kept beside the primary.
pub(super) type Attempted = Try<(Repository, Vec<StorageName>, Vec<StorageName>)>;

async fn attempt(
    shared: &Arc<Shared>,
    begin: &Begin,
    additional: Option<&Repository>,
) -> Result<Attempted, WriteError> {
    if begin.kind != Kind::Create {
        match update(shared, begin).await {
            Err(WriteError::NotFound) if begin.kind == Kind::Upsert => {}
            attempted => return attempted,
        }
    }
    create::attempt(shared, begin, additional).await
}

/// Begins a write to an existing repository.
async fn update(shared: &Arc<Shared>, begin: &Begin) -> Result<Attempted, WriteError> {
    let (db, terms) = (&shared.db, &begin.terms);
    let begun = db.promptly(|| writes::write_begin(db.pool(), &begin.key, &begin.intent, terms)).await?;
    let repository = match begun {
        Begun::Yes(repository, participants) => {
            return Ok(Try::Over((repository, participants, Vec::new())));
        }
        Begun::NotFound => return Err(WriteError::NotFound),
        Begun::Held => return Ok(Try::Held),
        Begun::Undecided(repository) => repository,
    };
    check_site(&shared.config.home_sites, &repository, terms.sync_from_site.as_ref())?;
    check_asked(&repository, terms)?;
    let moved = db.promptly(|| begin_with_failover(shared, begin)).await?.ok_or(WriteError::NotFound)?;
    Ok(match moved? {
        Moved::Begun { repository, participants, revoke } => {
            if let Some(route) = revoke {
                // Nobody waits here: nothing acknowledged is missing where the old route leads. Commits wait for what
                // is owed.
                let owed = db.retrying(|| revocations::revocation_list_owed(db.pool(), &route.key)).await?;
                shared.revoke_later(vec![route], owed);
            }
            Try::Over((*repository, participants, Vec::new()))
        }
        Moved::Held => Try::Held,
        Moved::Soon => Try::NotYet(WriteError::ReadOnly),
    })
}

enum Moved {
    Begun { repository: Box<Repository>, participants: Vec<StorageName>, revoke: Option<RevokedRoute> },
    Held,
    Soon,
}

/// Under the repository's lock: moves the primary if need be, and takes the ticket. `None`: the repository is gone.
async fn begin_with_failover(
    shared: &Arc<Shared>,
    begin: &Begin,
) -> Result<Option<Result<Moved, WriteError>>, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let Some(mut repository) = repositories::repository_lock_name(&mut transaction, &begin.key).await? else {
        return Ok(None);
    };
    let terms = &begin.terms;
    if let Err(refused) = check_site(&shared.config.home_sites, &repository, terms.sync_from_site.as_ref()) {
        return Ok(Some(Err(refused)));
    }
    if let Err(stale) = check_asked(&repository, terms) {
        return Ok(Some(Err(stale)));
    }
    if writes::write_is_held_in_txn(&mut transaction, repository.id).await? {
        return Ok(Some(Ok(Moved::Held)));
    }
    if let Some(asked) = terms.asked.as_ref().filter(|asked| asked.can_ask_again) {
        let (id, asked) = (repository.id, &asked.storages);
        if writes::write_leaves_out_newcomer_in_txn(&mut transaction, id, &terms.unreachable, asked).await? {
            return Ok(Some(Err(WriteError::StaleRoute)));
        }
    }
    let healthy = |storage: &StorageName| shared.health.is_healthy(&begin.key.virtual_storage, storage);
    let router = Reach {
        unreachable: &terms.unreachable,
        votes: terms.votes,
        asked: terms.asked.as_ref().map(|asked| &*asked.storages),
        can_ask_again: terms.asked.as_ref().is_some_and(|asked| asked.can_ask_again),
    };
    let (participants, moves) = match failover::decide(&repository, router, healthy, &mut rand::rng()) {
        Decision::Stay { participants } => (participants, false),
        Decision::Move { participants } => (participants, true),
        Decision::AskAnew => return Ok(Some(Err(WriteError::StaleRoute))),
        Decision::Soon => return Ok(Some(Ok(Moved::Soon))),
        Decision::ReadOnly => return Ok(Some(Err(WriteError::ReadOnly))),
    };
    let mut revoke = None;
    if moves && let Some(primary) = participants.first() {
        repository.primary = primary.clone();
        repository.epoch =
            repositories::repository_move_primary_in_txn(&mut transaction, repository.id, primary).await?;
        // A route of the present generation names the old primary.
        revoke = Some(RevokedRoute {
            key: repository.key.clone(),
            id: repository.id,
            generation: repository.generation.next(),
        });
    }
    writes::write_insert_in_txn(&mut transaction, &repository, &participants, &begin.intent).await?;
    transaction.commit().await?;
    if moves {
        shared.metrics.primary_moved();
        tracing::info!(
            correlation_id = begin.intent.correlation_id,
            repository_id = %repository.id,
            storage = %repository.primary,
            epoch = %repository.epoch,
            "primary moved"
        );
    }
    Ok(Some(Ok(Moved::Begun { repository: Box::new(repository), participants, revoke })))
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

/// Whether the nodes that were asked already were asked by a route that still holds.
fn check_asked(repository: &Repository, terms: &Terms) -> Result<(), WriteError> {
    let Some(Asked { repository_id, epoch, primary, .. }) = &terms.asked else { return Ok(()) };
    let holds =
        *repository_id == repository.id && *epoch == repository.epoch && *primary == repository.primary;
    if holds { Ok(()) } else { Err(WriteError::StaleRoute) }
}
