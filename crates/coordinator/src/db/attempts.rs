//! Attempts at a duty: a worker is given it, and it ends, is tried again later, or is set aside until an operator puts it
//! back to work.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{
    milliseconds,
    outbox::{Duty, DutyRow, duty_columns},
};

const DUTY_START: &str = "
    UPDATE duties SET state = 'started', worker_id = $2, started_at = now(), attempts = attempts + 1, generation = NULL,
           epoch = NULL, lease_until = NULL, copy_attempt = NULL, source = NULL, round_started_at = NULL,
           under_ticket = false, rounds = 0, tickets_lost = 0
    WHERE id = $1";

const DUTY_STARTED_TWIN: &str = concat!(
    "SELECT ",
    duty_columns!(),
    " FROM duties WHERE kind = $1 AND repository_id = $2 AND target = $3 AND state = 'started' AND id <> $4 FOR UPDATE"
);

const DUTY_IS_PARKED_TWIN: &str = "
    SELECT EXISTS (SELECT FROM duties WHERE kind = $1 AND repository_id = $2 AND target = $3 AND state = 'parked' AND id <> $4)";

const DUTY_END: &str = "UPDATE duties SET state = 'done', finished_at = now(), last_error = $2 WHERE id = $1 AND state <> 'done'";

const DUTY_UNPARK_TWIN: &str = "
    DELETE FROM duties WHERE kind = $1 AND repository_id = $2 AND target = $3 AND state = 'parked' AND id <> $4";

const DUTY_RETRY_LATER: &str = "
    UPDATE duties SET state = 'published', published_at = now(), next_attempt_at = now() + $2 * interval '1 millisecond',
           failures = $3, last_error = $4, lease_until = NULL
    WHERE id = $1 AND NOT EXISTS (
        SELECT FROM duties twin
        WHERE twin.kind = duties.kind AND twin.repository_id = duties.repository_id AND twin.target = duties.target
          AND twin.state IN ('pending', 'published') AND twin.id <> $1)";

const DUTY_PARK: &str =
    "UPDATE duties SET state = 'parked', finished_at = now(), failures = $2, last_error = $3 WHERE id = $1";

/// One that waits because this one was set aside gives way.
const DUTY_END_WAITING_TWIN: &str = "
    UPDATE duties SET state = 'done', finished_at = now(), last_error = 'another is tried again in its stead'
    FROM duties parked
    WHERE parked.id = $1 AND parked.state = 'parked' AND duties.state = 'pending'
      AND parked.kind = duties.kind AND parked.repository_id = duties.repository_id AND parked.target = duties.target";

const DUTY_RETRY_NOW: &str = "
    UPDATE duties SET state = 'pending', failures = 0, next_attempt_at = now(), finished_at = NULL, priority = 0,
           bad_sources = '{}'
    WHERE id = $1 AND state = 'parked' AND NOT EXISTS (
        SELECT FROM duties twin
        WHERE twin.kind = duties.kind AND twin.repository_id = duties.repository_id AND twin.target = duties.target
          AND twin.state IN ('pending', 'published'))
    RETURNING id";

/// Hands a duty to a worker.
pub(crate) async fn duty_start_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    worker_id: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(DUTY_START).bind(id).bind(worker_id).execute(connection).await.map(drop)
}

/// Another duty for the same target and repository that is with a worker. Locked.
pub(crate) async fn duty_started_twin(
    connection: &mut PgConnection,
    duty: &Duty,
) -> Result<Option<Duty>, sqlx::Error> {
    let row: Option<DutyRow> = sqlx::query_as(DUTY_STARTED_TWIN)
        .bind(duty.kind.as_str())
        .bind(duty.repository_id.0)
        .bind(&duty.target)
        .bind(duty.id)
        .fetch_optional(connection)
        .await?;
    row.map(Duty::try_from).transpose()
}

/// Whether another duty for the same was set aside.
pub(crate) async fn duty_has_parked_twin_in_txn(
    connection: &mut PgConnection,
    duty: &Duty,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(DUTY_IS_PARKED_TWIN)
        .bind(duty.kind.as_str())
        .bind(duty.repository_id.0)
        .bind(&duty.target)
        .bind(duty.id)
        .fetch_one(connection)
        .await
}

/// Ends a duty. `remark` is empty when its work was done.
pub(crate) async fn duty_end_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    remark: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(DUTY_END).bind(id).bind(remark).execute(connection).await.map(drop)
}

/// Removes the parked duty for the same repository and target: it has been overtaken.
pub(crate) async fn duty_unpark_twin_in_txn(
    connection: &mut PgConnection,
    duty: &Duty,
) -> Result<(), sqlx::Error> {
    sqlx::query(DUTY_UNPARK_TWIN)
        .bind(duty.kind.as_str())
        .bind(duty.repository_id.0)
        .bind(&duty.target)
        .bind(duty.id)
        .execute(connection)
        .await
        .map(drop)
}

/// Records a failed attempt; the bus keeps the message. False: another duty waits for the same, which takes over.
pub(crate) async fn duty_retry_later_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    delay: Duration,
    failures: u32,
    error: &str,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(DUTY_RETRY_LATER)
        .bind(id)
        .bind(milliseconds(delay))
        .bind(i32::try_from(failures).unwrap_or(i32::MAX))
        .bind(error)
        .execute(connection)
        .await?;
    Ok(done.rows_affected() > 0)
}

/// Sets a duty aside.
pub(crate) async fn duty_park_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    failures: u32,
    error: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(DUTY_PARK)
        .bind(id)
        .bind(i32::try_from(failures).unwrap_or(i32::MAX))
        .bind(error)
        .execute(connection)
        .await
        .map(drop)
}

/// Puts a parked duty back to work. False: it is not parked, or the same is under way anyway.
pub(crate) async fn duty_retry_now(pool: &PgPool, id: Uuid) -> Result<bool, sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::query(DUTY_END_WAITING_TWIN).bind(id).execute(&mut *transaction).await?;
    let found: Option<Uuid> =
        sqlx::query_scalar(DUTY_RETRY_NOW).bind(id).fetch_optional(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(found.is_some())
}
