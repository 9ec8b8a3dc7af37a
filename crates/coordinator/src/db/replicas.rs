//! Replicas: what each storage has of a repository. Writes record what they did in their own statement
//! (`commits::commit`); here is what repair and the settling of writes change. The caller holds the repository's lock.

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
