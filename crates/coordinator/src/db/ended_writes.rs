//! What became of writes whose intent is gone, kept for a while: a router that lost the answer asks again, and one that was
//! stopped meanwhile reports late.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tabularium_common::ids::{Epoch, Generation, RepositoryId, StorageName};
use uuid::Uuid;

use super::{milliseconds, parsed, writes::texts};
use crate::repository::Repository;

const ENDED_WRITE_FIND: &str = "
    SELECT repository_id, outcome, generation, epoch, storage FROM ended_writes WHERE id = $1 AND router_id = $2";

const ENDED_WRITE_DOUBT: &str = "
    UPDATE ended_writes SET doubtful = true, ended_at = now()
    WHERE id = $1 AND router_id = $2 AND outcome = 'settled'";

const ENDED_WRITE_LIST_DOUBTFUL: &str = "
    SELECT id FROM ended_writes
    WHERE doubtful AND ended_at < now() - $1 * interval '1 millisecond' ORDER BY ended_at LIMIT $2";

const ENDED_WRITE_END_DOUBT: &str =
    "UPDATE ended_writes SET doubtful = false WHERE id = $1 AND doubtful RETURNING repository_id";

/// The ticket of a look at what the replicas hold: a write in doubt of which nobody says anything.
const ENDED_WRITE_LOOK_AGAIN: &str = "
    INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id, participants,
                        expires_at, settling_since)
    VALUES ($1, $2, 'update', $3, $4, '', $5, '', $6, now(), '-infinity')
    ON CONFLICT (repository_id) DO NOTHING RETURNING id";

const ENDED_WRITE_PURGE: &str = "
    DELETE FROM ended_writes WHERE id IN (
        SELECT id FROM ended_writes
        WHERE NOT doubtful AND outcome = $3 AND ended_at < now() - $1 * interval '1 millisecond' LIMIT $2)";

/// What stands for the method of a look at what the replicas hold.
pub(crate) const LOOK_AGAIN: &str = "look again";

/// By whose word a write is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// Its router saw what the nodes did.
    Router,
    /// Nobody's: it was settled.
    Nobody,
}

impl Word {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Router => "committed",
            Self::Nobody => "settled",
        }
    }
}

/// A write whose intent is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EndedWrite {
    pub(crate) repository_id: RepositoryId,
    /// Its router was to be told that it is recorded.
    pub(crate) committed: bool,
    pub(crate) generation: Generation,
    pub(crate) epoch: Epoch,
    /// After it.
    pub(crate) primary: StorageName,
}

/// What became of a router's write whose intent is gone, if that is still known.
pub(crate) async fn ended_write_find(
    pool: &PgPool,
    id: Uuid,
    router_id: &str,
) -> Result<Option<EndedWrite>, sqlx::Error> {
    let row: Option<(i64, String, i64, i64, String)> =
        sqlx::query_as(ENDED_WRITE_FIND).bind(id).bind(router_id).fetch_optional(pool).await?;
    row.map(|(repository_id, outcome, generation, epoch, primary)| {
        Ok(EndedWrite {
            repository_id: RepositoryId(repository_id),
            committed: outcome == Word::Router.as_str(),
            generation: Generation(generation),
            epoch: Epoch(epoch),
            primary: parsed(&primary)?,
        })
    })
    .transpose()
}

/// The router of a settled write has spoken only now: its nodes may have gone on with it, and are to be looked at again.
pub(crate) async fn ended_write_doubt(pool: &PgPool, id: Uuid, router_id: &str) -> Result<(), sqlx::Error> {
    sqlx::query(ENDED_WRITE_DOUBT).bind(id).bind(router_id).execute(pool).await.map(drop)
}

/// Writes settled longer ago than `age` whose replicas are to be looked at again, the oldest first.
pub(crate) async fn ended_write_list_doubtful(
    pool: &PgPool,
    age: Duration,
    limit: u32,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(ENDED_WRITE_LIST_DOUBTFUL)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await
}

/// Ends the doubt about a write; answers the repository. `None`: there is none, or not any more.
pub(crate) async fn ended_write_end_doubt_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
) -> Result<Option<RepositoryId>, sqlx::Error> {
    let id: Option<i64> =
        sqlx::query_scalar(ENDED_WRITE_END_DOUBT).bind(id).fetch_optional(connection).await?;
    Ok(id.map(RepositoryId))
}

/// Takes the ticket for a look at what `participants` hold. False: somebody has it. The caller holds the repository's
/// lock.
pub(crate) async fn ended_write_look_again_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    repository: &Repository,
    participants: &[StorageName],
) -> Result<bool, sqlx::Error> {
    let taken: Option<Uuid> = sqlx::query_scalar(ENDED_WRITE_LOOK_AGAIN)
        .bind(id)
        .bind(repository.id.0)
        .bind(repository.epoch.0)
        .bind(repository.primary.as_str())
        .bind(LOOK_AGAIN)
        .bind(texts(participants))
        .fetch_optional(connection)
        .await?;
    Ok(taken.is_some())
}

/// Forgets writes that ended by that word longer ago than `age`.
pub(crate) async fn ended_write_purge(
    pool: &PgPool,
    word: Word,
    age: Duration,
    limit: u32,
) -> Result<(), sqlx::Error> {
    sqlx::query(ENDED_WRITE_PURGE)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .bind(word.as_str())
        .execute(pool)
        .await
        .map(drop)
}
