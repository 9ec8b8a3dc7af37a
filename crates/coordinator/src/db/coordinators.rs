//! Coordinators and their leases. A coordinator serves routers' caches only under a lease that stands here, so that the
//! others know whom a change of routes concerns. All times are the database's.

use std::time::Duration;

use sqlx::PgPool;

use super::milliseconds;

const COORDINATOR_REGISTER: &str = "
    INSERT INTO coordinators (id, address, lease_until) VALUES ($1, $2, now() + $3 * interval '1 millisecond')";

/// A lease that has lapsed, if only for a moment, is not extended: a peer may have relied on its end.
const COORDINATOR_HEARTBEAT: &str = "
    UPDATE coordinators SET lease_until = now() + $2 * interval '1 millisecond'
    WHERE id = $1 AND NOT fenced AND lease_until > now()";

const COORDINATOR_LIST_LIVE: &str = "
    SELECT id, address, (extract(epoch FROM lease_until - now()) * 1000)::bigint AS remaining_milliseconds
    FROM coordinators WHERE lease_until > now()";

const COORDINATOR_FENCE: &str = "
    UPDATE coordinators SET fenced = true WHERE id = $1 AND lease_until > now()
    RETURNING (extract(epoch FROM lease_until - now()) * 1000)::bigint";

const COORDINATOR_RETIRE: &str = "DELETE FROM coordinators WHERE id = $1";

const COORDINATOR_PURGE: &str =
    "DELETE FROM coordinators WHERE lease_until < now() - $1 * interval '1 millisecond'";

/// A coordinator whose lease stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LiveCoordinator {
    pub(crate) id: String,
    pub(crate) address: String,
    pub(crate) remaining: Duration,
}

/// Adds a coordinator with a fresh lease. Ids are never used twice.
pub(crate) async fn coordinator_register(
    pool: &PgPool,
    id: &str,
    address: &str,
    lease: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(COORDINATOR_REGISTER)
        .bind(id)
        .bind(address)
        .bind(milliseconds(lease))
        .execute(pool)
        .await
        .map(drop)
}

/// Extends a lease. False: it has lapsed, or a peer has put an end to it.
pub(crate) async fn coordinator_heartbeat(
    pool: &PgPool,
    id: &str,
    lease: Duration,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(COORDINATOR_HEARTBEAT).bind(id).bind(milliseconds(lease)).execute(pool).await?;
    Ok(done.rows_affected() > 0)
}

/// All whose lease stands, fenced ones included.
pub(crate) async fn coordinator_list_live(pool: &PgPool) -> Result<Vec<LiveCoordinator>, sqlx::Error> {
    let rows: Vec<(String, String, i64)> = sqlx::query_as(COORDINATOR_LIST_LIVE).fetch_all(pool).await?;
    Ok(rows
        .into_iter()
        .map(|(id, address, remaining)| LiveCoordinator { id, address, remaining: remaining_time(remaining) })
        .collect())
}

/// The millisecond that was cut off is added back: waiting too short would be wrong.
fn remaining_time(milliseconds: i64) -> Duration {
    Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0) + 1)
}

/// Keeps a coordinator from extending its lease; answers how long the lease still stands, or `None` when it is over.
pub(crate) async fn coordinator_fence(pool: &PgPool, id: &str) -> Result<Option<Duration>, sqlx::Error> {
    let remaining: Option<i64> = sqlx::query_scalar(COORDINATOR_FENCE).bind(id).fetch_optional(pool).await?;
    Ok(remaining.map(remaining_time))
}

/// Removes a coordinator that serves no router's cache any more.
pub(crate) async fn coordinator_retire(pool: &PgPool, id: &str) -> Result<(), sqlx::Error> {
    sqlx::query(COORDINATOR_RETIRE).bind(id).execute(pool).await.map(drop)
}

/// Removes coordinators whose lease ended longer ago than `age`.
pub(crate) async fn coordinator_purge(pool: &PgPool, age: Duration) -> Result<u64, sqlx::Error> {
    sqlx::query(COORDINATOR_PURGE)
        .bind(milliseconds(age))
        .execute(pool)
        .await
        .map(|done| done.rows_affected())
}
