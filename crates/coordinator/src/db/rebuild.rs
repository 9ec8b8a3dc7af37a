//! Filling an empty database.

use sqlx::{PgConnection, PgPool};

use super::milliseconds;
use crate::rebuild::Rebuilt;

/// One rebuild at a time, and nobody else makes repositories meanwhile.
const LOCK: &str = "LOCK TABLE repositories IN SHARE ROW EXCLUSIVE MODE";

const IS_EMPTY: &str = "SELECT NOT EXISTS (SELECT FROM repositories)";

const INSERT_REPOSITORIES: &str = "
    INSERT INTO repositories (id, virtual_storage, relative_path, replica_path, state, primary_storage, generation, epoch)
    SELECT f.id, f.virtual_storage, f.relative_path, f.replica_path, 'ready', f.primary_storage, f.generation, f.epoch
    FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::bigint[])
         AS f (id, virtual_storage, relative_path, replica_path, primary_storage, generation, epoch)
    WHERE NOT EXISTS (SELECT FROM repositories r
                      WHERE r.virtual_storage = f.virtual_storage AND r.replica_path = f.replica_path)
    ON CONFLICT DO NOTHING RETURNING id";

const INSERT_REPLICAS: &str = "
    INSERT INTO replicas (repository_id, storage, generation, behind)
    SELECT f.id, f.storage, f.generation, f.generation < r.generation
    FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS f (id, storage, generation)
    JOIN repositories r ON r.id = f.id";

const RAISE_IDS: &str = "
    SELECT setval('repository_id', greatest((SELECT last_value FROM repository_id), $1), true)";

/// Locks out everybody who would make repositories; for as long as the transaction takes, which is at most `patience` per
/// statement.
pub(crate) async fn rebuild_lock_in_txn(
    connection: &mut PgConnection,
    patience: std::time::Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT set_config('statement_timeout', $1, true)")
        .bind(milliseconds(patience).to_string())
        .execute(&mut *connection)
        .await?;
    sqlx::query(LOCK).execute(connection).await?;
    Ok(())
}

/// Whether there is no repository.
pub(crate) async fn rebuild_is_empty(executor: impl sqlx::PgExecutor<'_>) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(IS_EMPTY).fetch_one(executor).await
}

/// Which of these ids and names are there already.
pub(crate) async fn rebuild_list_present(
    pool: &PgPool,
    repositories: &[Rebuilt],
) -> Result<Vec<i64>, sqlx::Error> {
    const PRESENT: &str = "
        SELECT f.id FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[])
             AS f (id, virtual_storage, relative_path, replica_path)
        WHERE EXISTS (SELECT FROM repositories r
                      WHERE r.id = f.id OR r.virtual_storage = f.virtual_storage
                        AND (r.relative_path = f.relative_path OR r.replica_path = f.replica_path))";
    let column = |of: &dyn Fn(&Rebuilt) -> String| repositories.iter().map(of).collect::<Vec<String>>();
    sqlx::query_scalar(PRESENT)
        .bind(repositories.iter().map(|rebuilt| rebuilt.id.0).collect::<Vec<_>>())
        .bind(column(&|rebuilt| rebuilt.key.virtual_storage.to_string()))
        .bind(column(&|rebuilt| rebuilt.key.relative_path.to_string()))
        .bind(column(&|rebuilt| rebuilt.replica_path.to_string()))
        .fetch_all(pool)
        .await
}

/// Writes repositories with their replicas, but for those that are there already. Answers the ids of those written.
pub(crate) async fn rebuild_insert_in_txn(
    connection: &mut PgConnection,
    repositories: &[Rebuilt],
) -> Result<Vec<i64>, sqlx::Error> {
    let column = |of: &dyn Fn(&Rebuilt) -> String| repositories.iter().map(of).collect::<Vec<String>>();
    let written: Vec<i64> = sqlx::query_scalar(INSERT_REPOSITORIES)
        .bind(repositories.iter().map(|rebuilt| rebuilt.id.0).collect::<Vec<_>>())
        .bind(column(&|rebuilt| rebuilt.key.virtual_storage.to_string()))
        .bind(column(&|rebuilt| rebuilt.key.relative_path.to_string()))
        .bind(column(&|rebuilt| rebuilt.replica_path.to_string()))
        .bind(column(&|rebuilt| rebuilt.primary.to_string()))
        .bind(repositories.iter().map(|rebuilt| rebuilt.generation.0).collect::<Vec<_>>())
        .bind(repositories.iter().map(|rebuilt| rebuilt.epoch.0).collect::<Vec<_>>())
        .fetch_all(&mut *connection)
        .await?;
    let (mut ids, mut storages, mut generations) = (Vec::new(), Vec::new(), Vec::new());
    for rebuilt in repositories.iter().filter(|rebuilt| written.contains(&rebuilt.id.0)) {
        for replica in &rebuilt.replicas {
            ids.push(rebuilt.id.0);
            storages.push(replica.storage.to_string());
            generations.push(replica.generation.0);
        }
    }
    sqlx::query(INSERT_REPLICAS).bind(ids).bind(storages).bind(generations).execute(connection).await?;
    Ok(written)
}

/// New repositories get ids above `last`. Not undone when the transaction is.
pub(crate) async fn rebuild_raise_ids_in_txn(
    connection: &mut PgConnection,
    last: i64,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(RAISE_IDS).bind(last.max(1)).fetch_one(connection).await
}
