//! Copies that are under way, each of them a duty that is with a worker: their rounds and numbers, and whether somebody
//! writes meanwhile.

use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, PgPool};
use tabularium_common::ids::{Epoch, Generation, RepositoryId, StorageName};
use uuid::Uuid;

use super::milliseconds;

/// Above all numbers given before, also above those of a database that this one was restored from.
const COPY_NUMBER: &str = "
    INSERT INTO copy_attempts AS c (repository_id, storage, attempt)
    VALUES ($1, $2, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
    ON CONFLICT (repository_id, storage) DO UPDATE SET attempt = greatest(c.attempt + 1, excluded.attempt)
    RETURNING attempt";

const COPY_LAST_NUMBER: &str =
    "SELECT attempt FROM copy_attempts WHERE repository_id = $1 AND storage = $2 FOR UPDATE";

const COPY_FIND_TICKET: &str = "SELECT id FROM writes WHERE repository_id = $1";

const COPY_PURGE_NUMBERS: &str = "
    DELETE FROM copy_attempts WHERE ctid = ANY (ARRAY(
        SELECT c.ctid FROM copy_attempts c
        WHERE NOT EXISTS (SELECT FROM repositories r WHERE r.id = c.repository_id) LIMIT $1))";

const COPY_BEGIN_ROUND: &str = "
    UPDATE duties SET generation = $2, epoch = $3, source = $4, copy_attempt = $5, under_ticket = $6,
           lease_until = clock_timestamp() + $7 * interval '1 millisecond', round_started_at = clock_timestamp(),
           rounds = rounds + 1, tickets_lost = tickets_lost + CASE WHEN $8 THEN 1 ELSE 0 END
    WHERE id = $1";

const COPY_AVOID_SOURCE: &str = "
    UPDATE duties SET bad_sources = array_append(bad_sources, $2) WHERE id = $1 AND $2 <> ALL (bad_sources)";

/// A lease that is over stays over, also when nobody has taken the duty yet.
const COPY_RENEW: &str = "
    UPDATE duties SET lease_until = clock_timestamp() + $3 * interval '1 millisecond'
    WHERE id = $1 AND worker_id = $2 AND state = 'started' AND lease_until >= clock_timestamp()
    RETURNING under_ticket, (extract(epoch FROM clock_timestamp() - round_started_at) * 1000)::bigint";

/// A number for the next copy onto a replica, of which the caller holds the duty's lock; or for the end of all copies so far.
pub(crate) async fn copy_number(
    executor: impl PgExecutor<'_>,
    id: RepositoryId,
    target: &StorageName,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(COPY_NUMBER).bind(id.0).bind(target.as_str()).fetch_one(executor).await
}

/// The number that was given last; another is given only after the caller's transaction.
pub(crate) async fn copy_last_number_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    target: &StorageName,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(COPY_LAST_NUMBER).bind(id.0).bind(target.as_str()).fetch_optional(connection).await
}

/// Who holds the repository's write ticket: the id of the write, or of the duty. The caller holds the repository's lock.
pub(crate) async fn copy_find_ticket_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar(COPY_FIND_TICKET).bind(id.0).fetch_optional(connection).await
}

/// What a round of a copy is about.
#[derive(Debug, Clone)]
pub(crate) struct RoundStart<'a> {
    /// Of the source, as it was read.
    pub(crate) generation: Generation,
    /// In which it was read.
    pub(crate) epoch: Epoch,
    pub(crate) source: &'a StorageName,
    pub(crate) copy_attempt: i64,
    pub(crate) under_ticket: bool,
    pub(crate) lease: Duration,
    /// The round before gave its ticket back unused.
    pub(crate) lost_ticket: bool,
}

/// Begins a round of a duty that is with a worker.
pub(crate) async fn copy_begin_round_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    round: &RoundStart<'_>,
) -> Result<(), sqlx::Error> {
    sqlx::query(COPY_BEGIN_ROUND)
        .bind(id)
        .bind(round.generation.0)
        .bind(round.epoch.0)
        .bind(round.source.as_str())
        .bind(round.copy_attempt)
        .bind(round.under_ticket)
        .bind(milliseconds(round.lease))
        .bind(round.lost_ticket)
        .execute(connection)
        .await
        .map(drop)
}

/// From now on the duty copies from another source if it can.
pub(crate) async fn copy_avoid_source_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    source: &StorageName,
) -> Result<(), sqlx::Error> {
    sqlx::query(COPY_AVOID_SOURCE).bind(id).bind(source.as_str()).execute(connection).await.map(drop)
}

/// A round as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Renewed {
    pub(crate) under_ticket: bool,
    /// How long it has been running.
    pub(crate) running: Duration,
}

/// Keeps a copy with its worker. `None`: it is the worker's no more.
pub(crate) async fn copy_renew(
    pool: &PgPool,
    id: Uuid,
    worker_id: &str,
    lease: Duration,
) -> Result<Option<Renewed>, sqlx::Error> {
    let row: Option<(bool, i64)> = sqlx::query_as(COPY_RENEW)
        .bind(id)
        .bind(worker_id)
        .bind(milliseconds(lease))
        .fetch_optional(pool)
        .await?;
    Ok(row.map(|(under_ticket, running)| Renewed {
        under_ticket,
        running: Duration::from_millis(running.max(0).unsigned_abs()),
    }))
}

/// Forgets the numbers of repositories that are gone.
pub(crate) async fn copy_purge_numbers(pool: &PgPool, limit: u32) -> Result<(), sqlx::Error> {
    sqlx::query(COPY_PURGE_NUMBERS).bind(i64::from(limit)).execute(pool).await.map(drop)
}
