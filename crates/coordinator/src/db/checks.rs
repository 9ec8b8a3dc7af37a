//! Checks: when the objects of a replica are looked through next, and what was found the last time.

use std::time::Duration;

use sqlx::PgPool;
use tabularium_common::ids::{RepositoryId, StorageName, VirtualStorageName};

use super::{milliseconds, of_storage};

/// Until it is reported on, or for `$3`, nobody else takes it.
const CHECK_CLAIM: &str = "
    UPDATE replicas SET check_due_at = now() + $3 * interval '1 millisecond'
    WHERE (repository_id, storage) = (
        SELECT p.repository_id, p.storage FROM replicas p JOIN repositories r ON r.id = p.repository_id
        WHERE p.storage = $2 AND NOT p.behind AND p.check_due_at <= now()
          AND r.virtual_storage = $1 AND r.state = 'ready'
        ORDER BY p.check_due_at LIMIT 1 FOR UPDATE OF p SKIP LOCKED)
    RETURNING repository_id";

const CHECK_WHOLE: &str = "
    UPDATE replicas SET check_due_at = now() + $3 * interval '1 millisecond', checked_at = now(), damage = NULL
    WHERE repository_id = $1 AND storage = $2";

const CHECK_DAMAGED: &str = "
    UPDATE replicas SET check_due_at = now() + $3 * interval '1 millisecond', damage = $4
    WHERE repository_id = $1 AND storage = $2";

const CHECK_POSTPONE: &str = "
    UPDATE replicas SET check_due_at = now() + $3 * interval '1 millisecond'
    WHERE repository_id = $1 AND storage = $2";

const CHECK_DEMAND: &str = "
    UPDATE replicas SET check_due_at = '-infinity'
    WHERE (repository_id, storage) IN (
        SELECT p.repository_id, p.storage FROM replicas p JOIN repositories r ON r.id = p.repository_id
        WHERE r.virtual_storage = $1 AND ($2 = '' OR p.storage = $2) AND p.check_due_at > '-infinity' LIMIT $3)";

/// The repository of a replica on that storage that is due, the longest first. It is the caller's for as long as `lease`.
pub(crate) async fn check_claim(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    lease: Duration,
) -> Result<Option<RepositoryId>, sqlx::Error> {
    let id: Option<i64> = sqlx::query_scalar(CHECK_CLAIM)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .bind(milliseconds(lease))
        .fetch_optional(pool)
        .await?;
    Ok(id.map(RepositoryId))
}

/// A replica was found whole; it is due again after `next`.
pub(crate) async fn check_whole(
    pool: &PgPool,
    id: RepositoryId,
    storage: &StorageName,
    next: Duration,
) -> Result<(), sqlx::Error> {
    let update = sqlx::query(CHECK_WHOLE).bind(id.0).bind(storage.as_str()).bind(milliseconds(next));
    update.execute(pool).await.map(drop)
}

/// A replica was found damaged; it is due again after `next`, or when it has been made again.
pub(crate) async fn check_damaged(
    pool: &PgPool,
    id: RepositoryId,
    storage: &StorageName,
    next: Duration,
    damage: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(CHECK_DAMAGED)
        .bind(id.0)
        .bind(storage.as_str())
        .bind(milliseconds(next))
        .bind(damage)
        .execute(pool)
        .await
        .map(drop)
}

/// A replica could not be looked through; it is due again after `next`.
pub(crate) async fn check_postpone(
    pool: &PgPool,
    id: RepositoryId,
    storage: &StorageName,
    next: Duration,
) -> Result<(), sqlx::Error> {
    let update = sqlx::query(CHECK_POSTPONE).bind(id.0).bind(storage.as_str()).bind(milliseconds(next));
    update.execute(pool).await.map(drop)
}

/// Has up to `limit` replicas of a storage, or of a whole virtual storage, looked through soon; answers how many were not to
/// be yet.
pub(crate) async fn check_demand(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: Option<&StorageName>,
    limit: u32,
) -> Result<u64, sqlx::Error> {
    of_storage(pool, CHECK_DEMAND, virtual_storage, storage, limit).await
}
