//! Replicas: what each storage has of a repository. Writes record what they did in their own statement
//! (`writes::write_commit`); here is what repair and fencing change. The caller holds the repository's lock.

use sqlx::PgConnection;
use tabularium_common::ids::{Generation, RepositoryId, StorageName};

const REPLICA_FORGET: &str =
    "UPDATE replicas SET generation = -1, behind = true WHERE repository_id = $1 AND storage = $2";

/// `reached` is bounded by what the repository has; a replica that got further by itself meanwhile stays there.
const REPLICA_REPAIRED: &str = "
    UPDATE replicas p
    SET generation = greatest(p.generation, least($3, r.generation)), copied_at = now(),
        behind = greatest(p.generation, least($3, r.generation)) < r.generation
    FROM repositories r
    WHERE r.id = p.repository_id AND p.repository_id = $1 AND p.storage = $2
    RETURNING p.behind";

/// The primary may hold more than is recorded: that counts as a write, which the others lack.
const REPLICA_RAISE_PRIMARY: &str = "
    WITH raised AS (
        UPDATE repositories SET generation = generation + 1, written_at = now() WHERE id = $1
        RETURNING id, virtual_storage, relative_path, replica_path, primary_storage, generation, home_site
    ), settled AS (
        UPDATE replicas p
        SET generation = CASE WHEN p.storage = raised.primary_storage THEN raised.generation ELSE p.generation END,
            behind = p.storage <> raised.primary_storage
        FROM raised WHERE p.repository_id = raised.id
        RETURNING p.storage, p.behind
    ), owed_copies AS (
        INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, correlation_id)
        SELECT 'replicate', raised.id, raised.virtual_storage, raised.replica_path, settled.storage, $2
        FROM settled, raised WHERE settled.behind
        ON CONFLICT DO NOTHING
    ), told AS (
        INSERT INTO geo_log (kind, repository_id, virtual_storage, relative_path, generation)
        SELECT 'updated', id, virtual_storage, relative_path, generation FROM raised WHERE home_site IS NULL
    ), owed AS (
        INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
        SELECT id, virtual_storage, relative_path, generation FROM raised
    )
    SELECT generation FROM raised";

/// Counts what the primary may hold beyond what is recorded as a write; owes copies, an event and a revocation.
pub(crate) async fn replica_raise_primary_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    correlation_id: &str,
) -> Result<Generation, sqlx::Error> {
    sqlx::query_scalar(REPLICA_RAISE_PRIMARY)
        .bind(id.0)
        .bind(correlation_id)
        .fetch_one(connection)
        .await
        .map(Generation)
}

/// Nothing is known of what `storage` has any more.
pub(crate) async fn replica_forget_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    storage: &StorageName,
) -> Result<(), sqlx::Error> {
    sqlx::query(REPLICA_FORGET).bind(id.0).bind(storage.as_str()).execute(connection).await.map(drop)
}

/// `storage` was brought to generation `reached`. Answers whether it is still behind; `None` when it is no replica.
pub(crate) async fn replica_repaired_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    storage: &StorageName,
    reached: Generation,
) -> Result<Option<bool>, sqlx::Error> {
    sqlx::query_scalar(REPLICA_REPAIRED)
        .bind(id.0)
        .bind(storage.as_str())
        .bind(reached.0)
        .fetch_optional(connection)
        .await
}
