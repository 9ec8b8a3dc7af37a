//! The geo log: what happened to repositories whose home is here, in order; and how far each subscriber has been told.
//! Rows are appended by the statement that makes the change they report.

use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, PgPool};
use tabularium_common::ids::SiteName;

use super::{Db, milliseconds};

/// Lets one reader at a time give out positions.
const GEO_LOG_LOCK: &str = "SELECT pg_advisory_xact_lock(hashtext(current_schema() || '.geo_log'))";

const GEO_LOG_PLACE: &str = "
    UPDATE geo_log g SET position = placed.position
    FROM (SELECT id, (SELECT coalesce(max(position), 0) FROM geo_log) + row_number() OVER (ORDER BY id) AS position
          FROM (SELECT id FROM geo_log WHERE position IS NULL ORDER BY id LIMIT $1) AS unplaced) AS placed
    WHERE g.id = placed.id";

const GEO_LOG_UNPLACED: &str = "SELECT EXISTS (SELECT FROM geo_log WHERE position IS NULL)";

const GEO_LOG_READ: &str = "
    SELECT g.position, g.kind, g.repository_id, g.virtual_storage, g.relative_path, g.old_relative_path, g.generation
    FROM geo_log g JOIN subscribers s ON g.position > s.notified_position
    WHERE s.site = $1 ORDER BY g.position LIMIT $2";

const GEO_LOG_POSITION: &str = "SELECT coalesce(max(position), 0) FROM geo_log";

/// Looks at the oldest `$2` events only. The newest stays: positions are counted on from it.
const GEO_LOG_PRUNE: &str = "
    DELETE FROM geo_log WHERE id IN (
        SELECT oldest.id
        FROM (SELECT id, position, recorded_at FROM geo_log WHERE position IS NOT NULL
              ORDER BY position LIMIT $2) AS oldest,
             (SELECT min(notified_position) AS position FROM subscribers
              WHERE wanted_at > now() - $1 * interval '1 millisecond') AS told
        WHERE CASE WHEN told.position IS NULL THEN oldest.recorded_at < now() - $1 * interval '1 millisecond'
                   ELSE oldest.position <= told.position END
          AND oldest.position < (SELECT max(position) FROM geo_log))";

const SUBSCRIBER_ADD: &str = "
    INSERT INTO subscribers (site) VALUES ($1) ON CONFLICT (site) DO UPDATE SET wanted_at = now()";

const SUBSCRIBER_ADVANCE: &str = "
    UPDATE subscribers
    SET notified_position = greatest(notified_position, least($2, (SELECT coalesce(max(position), 0) FROM geo_log)))
    WHERE site = $1";

const SUBSCRIBER_LIST: &str = "SELECT site, notified_position FROM subscribers ORDER BY site";

/// Events given positions in one transaction.
const PLACE_LIMIT: i64 = 10_000;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct GeoEvent {
    pub(crate) position: i64,
    /// `created`, `updated`, `renamed` or `deleted`.
    pub(crate) kind: String,
    pub(crate) repository_id: i64,
    pub(crate) virtual_storage: String,
    pub(crate) relative_path: String,
    pub(crate) old_relative_path: String,
    pub(crate) generation: i64,
}

/// Gives every event that has none its position. Events of one repository keep their order: each was appended under the
/// repository's lock.
pub(crate) async fn geo_log_place(db: &Db) -> Result<(), sqlx::Error> {
    let unplaced: bool = sqlx::query_scalar(GEO_LOG_UNPLACED).fetch_one(db.pool()).await?;
    if !unplaced {
        return Ok(());
    }
    let mut transaction = db.begin().await?;
    geo_log_place_in_txn(&mut transaction).await?;
    transaction.commit().await
}

/// The same in the caller's transaction, at whose end the next reader may do it.
pub(crate) async fn geo_log_place_in_txn(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query(GEO_LOG_LOCK).execute(&mut *connection).await?;
    sqlx::query(GEO_LOG_PLACE).bind(PLACE_LIMIT).execute(connection).await.map(drop)
}

/// Removes, from the oldest `limit` events, those that every subscriber was told of; without subscribers, those older
/// than `keep`. A subscriber that no coordinator has named for that long does not count any more.
pub(crate) async fn geo_log_prune(pool: &PgPool, keep: Duration, limit: u32) -> Result<u64, sqlx::Error> {
    sqlx::query(GEO_LOG_PRUNE)
        .bind(milliseconds(keep))
        .bind(i64::from(limit))
        .execute(pool)
        .await
        .map(|done| done.rows_affected())
}

/// What a subscriber has not been told yet, in order.
pub(crate) async fn geo_log_read(
    executor: impl PgExecutor<'_>,
    site: &SiteName,
    limit: u32,
) -> Result<Vec<GeoEvent>, sqlx::Error> {
    sqlx::query_as(GEO_LOG_READ).bind(site.as_str()).bind(i64::from(limit)).fetch_all(executor).await
}

/// Position of the newest event.
pub(crate) async fn geo_log_position(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(GEO_LOG_POSITION).fetch_one(pool).await
}

/// Adds a subscriber, which is told everything from the beginning of the log as it is; or says that it is still one.
pub(crate) async fn subscriber_add(pool: &PgPool, site: &SiteName) -> Result<(), sqlx::Error> {
    sqlx::query(SUBSCRIBER_ADD).bind(site.as_str()).execute(pool).await.map(drop)
}

/// A subscriber was told everything up to `position`.
pub(crate) async fn subscriber_advance(
    executor: impl PgExecutor<'_>,
    site: &SiteName,
    position: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(SUBSCRIBER_ADVANCE).bind(site.as_str()).bind(position).execute(executor).await.map(drop)
}

/// Subscribers, with the position up to which each was told.
pub(crate) async fn subscriber_list(pool: &PgPool) -> Result<Vec<(String, i64)>, sqlx::Error> {
    sqlx::query_as(SUBSCRIBER_LIST).fetch_all(pool).await
}
