//! Write tickets that a duty holds, so that nobody writes while the last of what is missing is copied: rows of `writes` of
//! kind `repair` whose id is the duty's and whose only participant is the duty's target.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tabularium_common::ids::{RepositoryId, StorageName};
use uuid::Uuid;

use super::milliseconds;

/// Locks nothing while the ticket is with somebody: those who wait ask often.
const TICKET_TAKE: &str = "
    WITH seen AS (
        SELECT r.id, EXISTS (SELECT FROM writes w WHERE w.repository_id = r.id AND w.id <> $2) AS held
        FROM repositories r WHERE r.id = $1 AND r.state = 'ready'
    ), r AS (
        SELECT id, epoch, primary_storage FROM repositories
        WHERE id = (SELECT id FROM seen WHERE NOT held) AND state = 'ready' FOR NO KEY UPDATE
    ), intent AS (
        INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id,
                            participants, expires_at)
        SELECT $2, r.id, 'repair', r.epoch, r.primary_storage, $3, 'repair', $4, ARRAY[$5::text],
               now() + $6 * interval '1 millisecond'
        FROM r
        ON CONFLICT DO NOTHING
        RETURNING id
    )
    SELECT EXISTS (SELECT FROM intent) FROM seen";

const TICKET_RENEW: &str = "
    UPDATE writes SET expires_at = now() + $3 * interval '1 millisecond'
    WHERE id = $1 AND router_id = $2 AND kind = 'repair' AND settling_since IS NULL RETURNING id";

const TICKET_RELEASE: &str = "
    DELETE FROM writes WHERE id = $1 AND router_id = $2 AND kind = 'repair' AND settling_since IS NULL RETURNING id";

/// The ticket that a duty wants.
#[derive(Debug, Clone)]
pub(crate) struct DutyTicket {
    /// The duty's id, and the ticket's.
    pub(crate) duty: Uuid,
    pub(crate) worker_id: String,
    /// The replica that is made equal. Unknown when the ticket runs out.
    pub(crate) target: StorageName,
    pub(crate) correlation_id: String,
    pub(crate) lease: Duration,
}

/// Takes it if nobody has it. `None`: the repository is gone.
pub(crate) async fn ticket_take(
    pool: &PgPool,
    repository: RepositoryId,
    ticket: &DutyTicket,
) -> Result<Option<bool>, sqlx::Error> {
    sqlx::query_scalar(TICKET_TAKE)
        .bind(repository.0)
        .bind(ticket.duty)
        .bind(&ticket.worker_id)
        .bind(&ticket.correlation_id)
        .bind(ticket.target.as_str())
        .bind(milliseconds(ticket.lease))
        .fetch_optional(pool)
        .await
}

/// Keeps it. False: the duty does not hold it any more, and its worker must stop.
pub(crate) async fn ticket_renew(
    pool: &PgPool,
    duty: Uuid,
    worker_id: &str,
    lease: Duration,
) -> Result<bool, sqlx::Error> {
    let kept: Option<Uuid> = sqlx::query_scalar(TICKET_RENEW)
        .bind(duty)
        .bind(worker_id)
        .bind(milliseconds(lease))
        .fetch_optional(pool)
        .await?;
    Ok(kept.is_some())
}

/// Gives it back, in the transaction that records what was copied under it; the caller holds the repository's lock. False:
/// the duty did not hold it to the end, so that somebody may have written meanwhile.
pub(crate) async fn ticket_release_in_txn(
    connection: &mut PgConnection,
    duty: Uuid,
    worker_id: &str,
) -> Result<bool, sqlx::Error> {
    let held: Option<Uuid> =
        sqlx::query_scalar(TICKET_RELEASE).bind(duty).bind(worker_id).fetch_optional(connection).await?;
    Ok(held.is_some())
}
