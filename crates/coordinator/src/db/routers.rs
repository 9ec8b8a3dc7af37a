//! Which routers have a session, and where: for the operator to see. Sessions themselves are in memory.

use sqlx::PgPool;

const ROUTER_SET: &str = "
    WITH gone AS (DELETE FROM routers WHERE coordinator_id = $1 AND router_id <> ALL ($2))
    INSERT INTO routers (router_id, coordinator_id)
    SELECT DISTINCT router_id, $1 FROM unnest($2::text[]) AS router_id
    WHERE EXISTS (SELECT FROM coordinators WHERE id = $1)
    ON CONFLICT (router_id) DO UPDATE SET coordinator_id = excluded.coordinator_id";

const ROUTER_LIST: &str = "
    SELECT t.router_id, t.coordinator_id FROM routers t JOIN coordinators c ON c.id = t.coordinator_id
    ORDER BY t.router_id";

/// Records the routers that one coordinator serves.
pub(crate) async fn router_set(
    pool: &PgPool,
    coordinator_id: &str,
    router_ids: &[String],
) -> Result<(), sqlx::Error> {
    sqlx::query(ROUTER_SET).bind(coordinator_id).bind(router_ids).execute(pool).await.map(drop)
}

/// Routers of all coordinators, each with its coordinator.
pub(crate) async fn router_list(pool: &PgPool) -> Result<Vec<(String, String)>, sqlx::Error> {
    sqlx::query_as(ROUTER_LIST).fetch_all(pool).await
}
