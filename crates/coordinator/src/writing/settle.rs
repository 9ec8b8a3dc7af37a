//! How a write ends of which nobody knows whether it took effect: its router says so, or does not renew it any more.
//!
//! First the write is taken from its router, which can neither renew nor commit it from then on; then the storages say
//! what they hold, when nothing is being changed there any more; then one state is made the one that counts: first in the
//! records that nodes keep, so that what is recorded here is known to them as well, and then here.

use std::{sync::Arc, time::Duration};

use tabularium_common::{
    faults::{CrashPoint, crash_point},
    ids::StorageName,
};
use uuid::Uuid;

use crate::{
    app::Shared,
    db::{
        commits::{self, Committed, Report},
        creations,
        ended_writes::{self, LOOK_AGAIN, Word},
        outbox, replicas, repositories,
        writes::{self, OpenWrite, WriteKind},
    },
    error::WriteError,
    inspection::Inspection,
    records,
    repository::{Repository, RevokedRoute},
    settlement::{self, Settlement},
};

/// How long one has to settle a write before another tries.
pub(crate) const PAUSE: Duration = Duration::from_secs(1);

/// Why a write is to be settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Its router does not know what became of it.
    Reported { router_id: String },
    /// Its router stopped renewing it.
    Expired,
}

/// What was done about a write.
#[derive(Debug)]
enum Settled {
    /// It is gone already.
    Gone,
    /// Nobody can be asked; it is tried again.
    Waiting,
    /// The repository was being created: its name is given back, and what its storages may have is removed.
    CreationCancelled,
    /// A copy under the ticket was not finished: what its target holds is unknown.
    RepairGivenUp,
    /// All hold the same, and nobody had written.
    Unchanged,
    Kept {
        holders: Vec<StorageName>,
        route: RevokedRoute,
        owed: Vec<i64>,
        primary_moved: bool,
    },
}

/// Settles a write of which nobody knows whether it took effect. That it is not there, or was renewed, is no error.
pub(crate) async fn settle(shared: &Arc<Shared>, id: Uuid, doubt: &Doubt) -> Result<(), WriteError> {
    let db = &shared.db;
    let router_id = match doubt {
        Doubt::Reported { router_id } => Some(router_id.as_str()),
        Doubt::Expired => None,
    };
    let taken = db.retrying(|| writes::write_begin_settling(db.pool(), id, router_id, PAUSE)).await?;
    let Some(open) = taken else {
        if let Some(router_id) = router_id {
            db.retrying(|| ended_writes::ended_write_doubt(db.pool(), id, router_id)).await?;
        }
        return Ok(());
    };
    let mut inspection = Inspection::default();
    if open.kind == WriteKind::Update {
        inspection = inspect(shared, &open).await?;
        records::note_settlement(shared, &open, &mut inspection).await?;
    }
    crash_point(CrashPoint::CoordinatorBeforeSettlement);
    let settled = db.retrying(|| settle_under_lock(shared, &open, &inspection)).await?;
    let (repository_id, correlation_id) = (open.repository_id, &open.correlation_id);
    let holders: &[StorageName] = if let Settled::Kept { holders, .. } = &settled { holders } else { &[] };
    tracing::info!(write_id = %id, correlation_id, %repository_id, ?settled, ?holders, ?doubt, "write in doubt settled");
    if matches!(settled, Settled::Waiting) {
        return Ok(());
    }
    shared.metrics.write_settled();
    shared.queues.freed(&open.key);
    shared.bell.notify_one();
    if let Settled::Kept { route, owed, primary_moved, .. } = settled {
        if primary_moved {
            shared.metrics.primary_moved();
        }
        if !owed.is_empty() {
            shared.revoker.revoke(&[route], owed).await?;
        }
    }
    Ok(())
}

/// Asks all that took part or could have.
async fn inspect(shared: &Shared, open: &OpenWrite) -> Result<Inspection, WriteError> {
    let db = &shared.db;
    let found = db.retrying(|| repositories::repository_read(db.pool(), open.repository_id)).await?;
    let Some(repository) = found else { return Ok(Inspection::default()) };
    let mut storages = open.participants.clone();
    storages.extend(repository.up_to_date().filter(|storage| !open.participants.contains(storage)).cloned());
    let (topology, patience) = (shared.topology.get(), shared.config.timing.settle_patience.0);
    Ok(shared.inspector.inspect(&topology, &repository, &storages, patience).await)
}

async fn settle_under_lock(
    shared: &Shared,
    open: &OpenWrite,
    inspection: &Inspection,
) -> Result<Settled, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let locked = repositories::repository_lock_id(&mut transaction, open.repository_id).await?;
    // Only now nobody else can settle it. Whoever began to after us has told the nodes something else.
    let found = writes::write_find(&mut *transaction, open.id).await?;
    let stands = found.is_some_and(|found| found.settling == open.settling);
    let (Some(repository), true) = (locked, stands) else { return Ok(Settled::Gone) };
    let settled = match open.kind {
        WriteKind::Create => {
            creations::creation_cancel(&mut *transaction, open).await?;
            Settled::CreationCancelled
        }
        WriteKind::Repair => {
            for target in &open.participants {
                forget_replica(&mut transaction, &repository, target, &open.correlation_id).await?;
            }
            writes::write_end_in_txn(&mut transaction, open.id).await?;
            Settled::RepairGivenUp
        }
        WriteKind::Update => settle_update(&mut transaction, &repository, open, inspection).await?,
    };
    transaction.commit().await?;
    Ok(settled)
}

async fn settle_update(
    transaction: &mut sqlx::PgConnection,
    repository: &Repository,
    open: &OpenWrite,
    inspection: &Inspection,
) -> Result<Settled, sqlx::Error> {
    let looked_at = open.method == LOOK_AGAIN;
    let holders = match settlement::settle(repository, &open.participants, &inspection.answers) {
        Settlement::Wait => return Ok(Settled::Waiting),
        Settlement::Keep { holders } => holders,
    };
    if looked_at && repository.up_to_date().all(|storage| holders.contains(storage)) {
        writes::write_end_in_txn(transaction, open.id).await?;
        return Ok(Settled::Unchanged);
    }
    let report = Report {
        id: open.id,
        router_id: &open.router_id,
        storages: &holders,
        unvoted: false,
        word: Word::Nobody,
        doubtful: !inspection.quiet && !looked_at,
    };
    Ok(match commits::commit(&mut *transaction, &report).await? {
        Committed::Yes { primary_moved, route, owed, .. } => {
            Settled::Kept { holders, route, owed, primary_moved }
        }
        // Its epoch is over: another binary moved the primary under it. Nothing is known of what it did.
        Committed::Unknown | Committed::TooFew { .. } | Committed::WithoutPrimary(_) => {
            for storage in open.participants.iter().filter(|storage| **storage != repository.primary) {
                forget_replica(&mut *transaction, repository, storage, &open.correlation_id).await?;
            }
            writes::write_end_in_txn(transaction, open.id).await?;
            Settled::Gone
        }
    })
}

/// What `storage` holds is not known any more, whatever is being copied to it: it is to be made again.
async fn forget_replica(
    transaction: &mut sqlx::PgConnection,
    repository: &Repository,
    storage: &StorageName,
    correlation_id: &str,
) -> Result<(), sqlx::Error> {
    replicas::replica_forget_in_txn(transaction, repository.id, storage).await?;
    outbox::duty_drop_replication_in_txn(transaction, repository.id, storage).await?;
    outbox::duty_owe_copy(transaction, repository, storage, correlation_id).await
}

/// Looks again at the replicas of a write that was settled while its nodes may have been at it: under the ticket, they are
/// compared as if another write were in doubt. Once for each write, unless its router reports late.
pub(crate) async fn look_again(shared: &Arc<Shared>, ended: Uuid) -> Result<(), WriteError> {
    let look = Uuid::now_v7();
    if shared.db.retrying(|| take_for_look(shared, ended, look)).await? {
        settle(shared, look, &Doubt::Expired).await?;
    }
    Ok(())
}

/// False: there is nothing to look at, or a write holds the ticket.
async fn take_for_look(shared: &Shared, ended: Uuid, look: Uuid) -> Result<bool, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let Some(id) = ended_writes::ended_write_end_doubt_in_txn(&mut transaction, ended).await? else {
        return Ok(false);
    };
    let mut taken = false;
    if let Some(repository) = repositories::repository_lock_id(&mut transaction, id).await? {
        let mut participants: Vec<StorageName> = repository.up_to_date().cloned().collect();
        participants.sort_by_key(|storage| *storage != repository.primary);
        taken =
            ended_writes::ended_write_look_again_in_txn(&mut transaction, look, &repository, &participants)
                .await?;
        if !taken {
            return Ok(false);
        }
    }
    transaction.commit().await?;
    Ok(taken)
}
