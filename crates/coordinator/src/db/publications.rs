//! Which duties the bus is told of, and told of again: those that wait, those whose message was lost, and those whose
//! worker was.

use std::time::Duration;

use sqlx::PgPool;
use tabularium_common::ids::{StorageName, VirtualStorageName};
use uuid::Uuid;

use super::{
    milliseconds,
    outbox::{Duty, DutyKind, duties, duty_columns},
};

/// `SKIP LOCKED`: several relays share the work without waiting for each other. What was set aside a moment ago is not
/// tried again with every write.
const DUTY_CLAIM_PENDING: &str = concat!(
    "UPDATE duties SET state = 'published', published_at = now(), publications = publications + 1
     WHERE id IN (SELECT id FROM duties d WHERE state = 'pending' AND next_attempt_at <= now()
                    AND NOT EXISTS (
                        SELECT FROM duties twin
                        WHERE twin.kind = d.kind AND twin.repository_id = d.repository_id AND twin.target = d.target
                          AND twin.state = 'parked' AND twin.finished_at > now() - $2 * interval '1 millisecond')
                  ORDER BY priority, next_attempt_at LIMIT $1 FOR UPDATE SKIP LOCKED)
     RETURNING ",
    duty_columns!()
);

const DUTY_UNPUBLISH: &str = "
    UPDATE duties SET state = 'pending', next_attempt_at = now() + $2 * interval '1 millisecond'
    WHERE id = ANY ($1) AND state = 'published'";

/// Of a published duty whose message was lost, and of a started one whose worker was, the bus is told again. A started
/// duty keeps its state: whoever takes the message takes it over. One with a lease counts as lost when that is over.
const DUTY_REPUBLISH_STALE: &str = concat!(
    "UPDATE duties SET published_at = now(), publications = publications + 1
     WHERE id IN (SELECT id FROM duties
                  WHERE state IN ('published', 'started')
                    AND (greatest(published_at, next_attempt_at, started_at)
                             < now() - CASE state WHEN 'started' THEN $2 ELSE $1 END * interval '1 millisecond'
                             AND lease_until IS NULL
                         OR lease_until < now() AND published_at < now() - $4 * interval '1 millisecond')
                  ORDER BY published_at LIMIT $3 FOR UPDATE SKIP LOCKED)
     RETURNING ",
    duty_columns!()
);

/// Of what was on the bus when it lost everything, the bus is told again.
const DUTY_REPUBLISH_LOST: &str = concat!(
    "UPDATE duties SET published_at = now(), publications = publications + 1
     WHERE id IN (SELECT id FROM duties
                  WHERE kind = $1 AND state IN ('published', 'started')
                    AND published_at < now() - $2 * interval '1 millisecond'
                  ORDER BY published_at LIMIT $3 FOR UPDATE SKIP LOCKED)
     RETURNING ",
    duty_columns!()
);

/// Of one on the bus the message that comes later finds it done or under way.
const DUTY_HURRY: &str = "
    UPDATE duties SET state = 'pending', next_attempt_at = now()
    WHERE virtual_storage = $1 AND target = $2 AND kind IN ('replicate', 'cleanup')
      AND state IN ('pending', 'published') AND next_attempt_at > now()
    RETURNING id";

/// Takes due duties for publication, but not those whose like was set aside less than `parked_pause` ago.
pub(crate) async fn duty_claim_pending(
    pool: &PgPool,
    limit: u32,
    parked_pause: Duration,
) -> Result<Vec<Duty>, sqlx::Error> {
    let claim = sqlx::query_as(DUTY_CLAIM_PENDING).bind(i64::from(limit)).bind(milliseconds(parked_pause));
    duties(claim.fetch_all(pool).await?)
}

/// Puts duties back whose publication failed.
pub(crate) async fn duty_unpublish(pool: &PgPool, ids: &[Uuid], delay: Duration) -> Result<(), sqlx::Error> {
    sqlx::query(DUTY_UNPUBLISH).bind(ids).bind(milliseconds(delay)).execute(pool).await.map(drop)
}

/// Takes duties to be published again: no result for so long that message or worker must be lost. One with a lease is
/// published again when that is over, every `lapsed_for`.
pub(crate) async fn duty_republish_stale(
    pool: &PgPool,
    published_for: Duration,
    started_for: Duration,
    lapsed_for: Duration,
    limit: u32,
) -> Result<Vec<Duty>, sqlx::Error> {
    let rows = sqlx::query_as(DUTY_REPUBLISH_STALE)
        .bind(milliseconds(published_for))
        .bind(milliseconds(started_for))
        .bind(i64::from(limit))
        .bind(milliseconds(lapsed_for))
        .fetch_all(pool)
        .await?;
    duties(rows)
}

/// Takes duties of one kind that were published longer than `age` ago, before the bus forgot them, to be published
/// again. Those that are with a worker too: if it died, nobody else would ever hear of it.
pub(crate) async fn duty_republish_lost(
    pool: &PgPool,
    kind: DutyKind,
    age: Duration,
    limit: u32,
) -> Result<Vec<Duty>, sqlx::Error> {
    let rows = sqlx::query_as(DUTY_REPUBLISH_LOST)
        .bind(kind.as_str())
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    duties(rows)
}

/// Makes what waits to be tried again on a storage due at once; answers how much that is.
pub(crate) async fn duty_hurry(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    target: &StorageName,
) -> Result<usize, sqlx::Error> {
    let hurried =
        sqlx::query(DUTY_HURRY).bind(virtual_storage.as_str()).bind(target.as_str()).fetch_all(pool).await?;
    Ok(hurried.len())
}
