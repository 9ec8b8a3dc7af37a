//! Route revocations that a change owes. The change records them in its own statement; whoever has carried one out
//! removes it. One that stays, because its coordinator died, is carried out by the next commit to the same repository
//! or by a sweep: no cached route outlives the change that made it wrong.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tabularium_common::ids::{Generation, RepositoryId};

use super::{milliseconds, parsed};
use crate::repository::{RepositoryKey, RevokedRoute};

const REVOCATION_OWE: &str = "
    INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation) VALUES ($1, $2, $3, $4)
    RETURNING id";

/// A statement of its own, after the change: it shows what others committed while the change waited for a lock.
const REVOCATION_LIST_OWED: &str =
    "SELECT id FROM revocations WHERE virtual_storage = $1 AND relative_path = $2";

const REVOCATION_DONE: &str = "DELETE FROM revocations WHERE id = ANY ($1)";

const REVOCATION_LIST_STALE: &str = "
    SELECT id, repository_id, virtual_storage, relative_path, generation FROM revocations
    WHERE owed_since < now() - $1 * interval '1 millisecond' ORDER BY owed_since LIMIT $2";

/// Records that a route must be revoked.
pub(crate) async fn revocation_owe_in_txn(
    connection: &mut PgConnection,
    route: &RevokedRoute,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(REVOCATION_OWE)
        .bind(route.id.0)
        .bind(route.key.virtual_storage.as_str())
        .bind(route.key.relative_path.as_str())
        .bind(route.generation.0)
        .fetch_one(connection)
        .await
}

/// Revocations owed for a name, whoever owes them.
pub(crate) async fn revocation_list_owed(
    pool: &PgPool,
    key: &RepositoryKey,
) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar(REVOCATION_LIST_OWED)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .fetch_all(pool)
        .await
}

/// The revocations were carried out. If the server crashes and forgets this, they are carried out again: that is
/// harmless, and waiting for the disk is not worth it.
pub(crate) async fn revocation_done(pool: &PgPool, ids: &[i64]) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::query("SET LOCAL synchronous_commit = off").execute(&mut *transaction).await?;
    sqlx::query(REVOCATION_DONE).bind(ids).execute(&mut *transaction).await?;
    transaction.commit().await
}

/// Revocations owed for longer than `age`, the oldest first, with their rows.
pub(crate) async fn revocation_list_stale(
    pool: &PgPool,
    age: Duration,
    limit: u32,
) -> Result<Vec<(RevokedRoute, i64)>, sqlx::Error> {
    let rows: Vec<(i64, i64, String, String, i64)> = sqlx::query_as(REVOCATION_LIST_STALE)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    rows.into_iter()
        .map(|(row, id, virtual_storage, relative_path, generation)| {
            let key = RepositoryKey {
                virtual_storage: parsed(&virtual_storage)?,
                relative_path: parsed(&relative_path)?,
            };
            Ok((RevokedRoute { key, id: RepositoryId(id), generation: Generation(generation) }, row))
        })
        .collect()
}
