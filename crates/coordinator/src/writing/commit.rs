//! How a write ends as its router says: recorded, or given up.

use std::sync::Arc;

use tabularium_common::{
    faults::{CrashPoint, SafetyStep, crash_point, is_off},
    ids::StorageName,
};
use uuid::Uuid;

use super::revoke_owed;
use crate::{
    app::Shared,
    db::{
        commits::{self, Committed, Recorded, Report},
        creations, ended_writes, repositories,
        writes::{self, WriteKind},
    },
    error::WriteError,
    records::{self, Vouched},
    repository::{Repository, RevokedRoute},
};

/// Records that a write took effect, and answers once no router can read what was before. A report that is repeated,
/// because its answer was lost, is answered as the first one.
pub(crate) async fn commit(shared: &Arc<Shared>, report: &Report<'_>) -> Result<Recorded, WriteError> {
    let db = &shared.db;
    let everybody = everybody(shared, report).await?;
    let report = &Report {
        storages: everybody.as_deref().unwrap_or(report.storages),
        // What routers count is counted here again, unless a test leaves both out.
        unvoted: report.unvoted || is_off(SafetyStep::RouterQuorum),
        ..report.clone()
    };
    crash_point(CrashPoint::CoordinatorBeforeCommit);
    match db.promptly(|| commits::commit(db.pool(), report)).await? {
        Committed::Unknown => repeated(shared, report).await,
        Committed::WithoutPrimary(primary) => Err(WriteError::WithoutPrimary { primary }),
        Committed::TooFew { committed, quorum } => Err(WriteError::TooFewCommitted { committed, quorum }),
        Committed::Yes { recorded, primary_moved, route, owed } => {
            shared.queues.freed(&route.key);
            shared.bell.notify_one();
            if primary_moved {
                shared.metrics.primary_moved();
                tracing::info!(repository_id = %route.id, storage = %recorded.primary, epoch = %recorded.epoch, "primary moved");
            }
            crash_point(CrashPoint::CoordinatorAfterCommit);
            if report.unvoted {
                // Nodes note what a write makes of their replica when they vote. This one did not.
                let found = db.retrying(|| repositories::repository_find(db.pool(), route.id)).await?;
                if let Some(repository) = found {
                    let (target, generation) = (recorded.primary.clone(), recorded.generation);
                    let vouched = Vouched { repository, target, generation, attempt: 0 };
                    if let Err(status) = records::vouch(shared, &vouched).await {
                        let (repository_id, storage) = (route.id, &recorded.primary);
                        tracing::warn!(%repository_id, %storage, error = status.message(), "a replica's record is not written");
                    }
                }
            }
            if !owed.is_empty() && !is_off(SafetyStep::CoordinatorRevocation) {
                shared.revoker.revoke(&[route], owed).await?;
            }
            crash_point(CrashPoint::CoordinatorAfterRevocation);
            Ok(recorded)
        }
    }
}

/// All that took part, for tests that want to see the difference.
async fn everybody(shared: &Shared, report: &Report<'_>) -> Result<Option<Vec<StorageName>>, WriteError> {
    if !is_off(SafetyStep::CoordinatorCommittedOnly) {
        return Ok(None);
    }
    let db = &shared.db;
    let open = db.promptly(|| writes::write_find(db.pool(), report.id)).await?;
    Ok(open.map(|open| open.participants))
}

/// A report of a write whose intent is gone.
async fn repeated(shared: &Arc<Shared>, report: &Report<'_>) -> Result<Recorded, WriteError> {
    let (db, id) = (&shared.db, report.id);
    let not_open = || WriteError::NotOpen { id: id.to_string() };
    let found = db.promptly(|| ended_writes::ended_write_find(db.pool(), id, report.router_id)).await?;
    let ended = found.ok_or_else(not_open)?;
    if !ended.committed {
        // It was settled, and the nodes may have gone on. Nobody is told that it counts, but what it left must be
        // everywhere or nowhere.
        db.retrying(|| ended_writes::ended_write_doubt(db.pool(), id, report.router_id)).await?;
        return Err(not_open());
    }
    let found = db.retrying(|| repositories::repository_find(db.pool(), ended.repository_id)).await?;
    if let Some(Repository { key, id, .. }) = found {
        // The first report may still be at this, or have died over it.
        revoke_owed(shared, RevokedRoute { key, id, generation: ended.generation }).await?;
    }
    Ok(Recorded { generation: ended.generation, epoch: ended.epoch, primary: ended.primary })
}

/// Clears the intent of a write that did not happen. That it is not there is no error: it was settled before.
pub(crate) async fn discard(shared: &Arc<Shared>, id: Uuid, router_id: &str) -> Result<(), WriteError> {
    let db = &shared.db;
    if let Some(key) = db.retrying(|| writes::write_discard(db.pool(), id, router_id)).await? {
        shared.queues.freed(&key);
        return Ok(());
    }
    let Some(open) = db.retrying(|| writes::write_find(db.pool(), id)).await? else { return Ok(()) };
    if open.kind == WriteKind::Create && open.router_id == router_id {
        db.retrying(|| creations::creation_cancel(db.pool(), &open)).await?;
        shared.queues.freed(&open.key);
        shared.bell.notify_one();
    }
    Ok(())
}
