//! Coordinators and their leases. A coordinator serves routers' caches only under a lease that stands here, so that the
//! others know whom a change of routes concerns. Whether one is over is for [`Peers`](crate::peers::Peers) to say.

use std::time::Duration;

use sqlx::PgPool;

use super::milliseconds;
use crate::peers::Beat;

const COORDINATOR_REGISTER: &str = "
    INSERT INTO coordinators (id, address, lease_until) VALUES ($1, $2, now() + $3 * interval '1 millisecond')";

/// The time is for coordinators of an older version, who take a lease for over by the database's clock: they may have relied
/// on its end.
const COORDINATOR_HEARTBEAT: &str = "
    UPDATE coordinators SET lease_until = now() + $2 * interval '1 millisecond'
    WHERE id = $1 AND NOT fenced AND lease_until > now()";

const COORDINATOR_LIST: &str =
    "SELECT id, address, (extract(epoch FROM lease_until) * 1000000)::bigint FROM coordinators";

const COORDINATOR_FENCE: &str = "UPDATE coordinators SET fenced = true WHERE id = $1";

const COORDINATOR_RETIRE: &str = "DELETE FROM coordinators WHERE id = $1";

const COORDINATOR_DISMISS: &str =
    "DELETE FROM coordinators WHERE id = $1 AND (extract(epoch FROM lease_until) * 1000000)::bigint = $2";

/// A coordinator as it is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registered {
    pub(crate) id: String,
    pub(crate) address: String,
    pub(crate) beat: Beat,
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

/// All of them, fenced ones and those whose lease is over included.
pub(crate) async fn coordinator_list(pool: &PgPool) -> Result<Vec<Registered>, sqlx::Error> {
    let rows: Vec<(String, String, i64)> = sqlx::query_as(COORDINATOR_LIST).fetch_all(pool).await?;
    Ok(rows.into_iter().map(|(id, address, beat)| Registered { id, address, beat: Beat(beat) }).collect())
}

/// Keeps a coordinator from extending its lease.
pub(crate) async fn coordinator_fence(pool: &PgPool, id: &str) -> Result<(), sqlx::Error> {
    sqlx::query(COORDINATOR_FENCE).bind(id).execute(pool).await.map(drop)
}

/// Removes a coordinator whose lease is over, unless it has extended it since that heartbeat. True: it is gone.
pub(crate) async fn coordinator_dismiss(pool: &PgPool, id: &str, beat: Beat) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(COORDINATOR_DISMISS).bind(id).bind(beat.0).execute(pool).await?;
    Ok(done.rows_affected() > 0)
}

/// Removes a coordinator that serves no router's cache any more.
pub(crate) async fn coordinator_retire(pool: &PgPool, id: &str) -> Result<(), sqlx::Error> {
    sqlx::query(COORDINATOR_RETIRE).bind(id).execute(pool).await.map(drop)
}
