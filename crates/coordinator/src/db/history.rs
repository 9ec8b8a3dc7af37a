//! How attempts at duties ended: for the operator, bounded for each target and in time.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tabularium_common::ids::StorageName;
use time::OffsetDateTime;

use super::{milliseconds, outbox::Duty};

/// Ends that are kept of one kind of duty for one repository and target.
const KEPT: i64 = 32;

const HISTORY_ADD: &str = "
    WITH old AS (
        DELETE FROM duty_history WHERE repository_id = $3 AND target = $4 AND kind = $2 AND id <= (
            SELECT id FROM duty_history WHERE repository_id = $3 AND target = $4 AND kind = $2
            ORDER BY id DESC OFFSET $13 LIMIT 1)
    )
    INSERT INTO duty_history (duty_id, kind, repository_id, target, worker_id, copy_attempt, source, generation,
                              under_ticket, outcome, error, started_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, coalesce($12, now()))";

const HISTORY_LIST: &str = "
    SELECT kind, repository_id, target, worker_id, copy_attempt, source, generation, under_ticket, outcome, error,
           started_at, ended_at
    FROM duty_history
    WHERE (kind, repository_id, target) IN (SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[]))
    ORDER BY id DESC";

const HISTORY_PURGE: &str = "
    DELETE FROM duty_history WHERE id IN (
        SELECT id FROM duty_history WHERE ended_at < now() - $1 * interval '1 millisecond' ORDER BY ended_at LIMIT $2)";

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The duty was fulfilled.
    Done,
    /// Something was written meanwhile; another round follows.
    Round,
    Failed,
    /// Its worker was silent.
    Lost,
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Round => "round",
            Self::Failed => "failed",
            Self::Lost => "lost",
        }
    }
}

/// An attempt that is over.
#[derive(Debug, Clone, sqlx::FromRow)]
pub(crate) struct EndedAttempt {
    kind: String,
    repository_id: i64,
    target: String,
    pub(crate) worker_id: String,
    /// Of a copy: its number, where it was copied from, and the generation that this had.
    pub(crate) copy_attempt: Option<i64>,
    pub(crate) source: Option<String>,
    pub(crate) generation: Option<i64>,
    pub(crate) under_ticket: bool,
    pub(crate) outcome: String,
    pub(crate) error: String,
    pub(crate) started_at: OffsetDateTime,
    pub(crate) ended_at: OffsetDateTime,
}

/// Remembers how the present attempt of `duty` ended.
pub(crate) async fn history_add_in_txn(
    connection: &mut PgConnection,
    duty: &Duty,
    end: End,
    error: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(HISTORY_ADD)
        .bind(duty.id)
        .bind(duty.kind.as_str())
        .bind(duty.repository_id.0)
        .bind(&duty.target)
        .bind(duty.worker_id.as_deref().unwrap_or_default())
        .bind(duty.copy_attempt)
        .bind(duty.source.as_ref().map(StorageName::as_str))
        .bind(duty.generation.map(|generation| generation.0))
        .bind(duty.under_ticket)
        .bind(end.as_str())
        .bind(error)
        .bind(duty.round_started_at.or(duty.started_at))
        .bind(KEPT - 1)
        .execute(connection)
        .await
        .map(drop)
}

impl EndedAttempt {
    /// Whether it was one at this duty, or at one of the kind for the same target.
    pub(crate) fn is_of(&self, duty: &Duty) -> bool {
        self.kind == duty.kind.as_str()
            && self.repository_id == duty.repository_id.0
            && self.target == duty.target
    }
}

/// Ended attempts at any of these duties, the newest first.
pub(crate) async fn history_list<'a>(
    pool: &PgPool,
    duties: impl Iterator<Item = &'a Duty> + Clone,
) -> Result<Vec<EndedAttempt>, sqlx::Error> {
    sqlx::query_as(HISTORY_LIST)
        .bind(duties.clone().map(|duty| duty.kind.as_str()).collect::<Vec<_>>())
        .bind(duties.clone().map(|duty| duty.repository_id.0).collect::<Vec<_>>())
        .bind(duties.map(|duty| duty.target.as_str()).collect::<Vec<_>>())
        .fetch_all(pool)
        .await
}

/// Forgets what ended longer ago than `age`.
pub(crate) async fn history_purge(pool: &PgPool, age: Duration, limit: u32) -> Result<(), sqlx::Error> {
    sqlx::query(HISTORY_PURGE).bind(milliseconds(age)).bind(i64::from(limit)).execute(pool).await.map(drop)
}
