//! Verifications: when a replica was last found to hold what the others hold.

use std::time::Duration;

use sqlx::PgPool;
use tabularium_common::ids::{Generation, RepositoryId, StorageName, VirtualStorageName};
use uuid::Uuid;

use super::{milliseconds, of_storage};
use crate::repository::RepositoryKey;

const UNVERIFIED_LIST: &str = "
    SELECT p.repository_id FROM replicas p JOIN repositories r ON r.id = p.repository_id
    WHERE NOT p.behind AND (p.verified_at IS NULL OR p.verified_at < now() - $1 * interval '1 millisecond')
      AND (r.virtual_storage, p.storage) IN (SELECT * FROM unnest($3::text[], $4::text[]))
      AND r.state = 'ready' AND NOT EXISTS (SELECT FROM writes w WHERE w.repository_id = r.id)
    ORDER BY p.verified_at NULLS FIRST LIMIT $2";

const COMPARING: &str = "UPDATE replicas SET comparing = $2 WHERE repository_id = $1";

/// Only when nothing was written since it was looked at, nobody is writing, and nobody has asked for another comparison.
const VERIFIED: &str = "
    UPDATE replicas SET verified_at = now(), unreadable = NULL, comparing = NULL
    WHERE repository_id = $1 AND storage = ANY ($2) AND NOT behind AND comparing = $4
      AND EXISTS (SELECT FROM repositories r WHERE r.id = $1 AND r.generation = $3)
      AND NOT EXISTS (SELECT FROM writes w WHERE w.repository_id = $1)";

const UNREADABLE_NOTE: &str = "
    UPDATE replicas SET unreadable = $3
    WHERE repository_id = $1 AND storage = $2 AND NOT behind AND unreadable IS DISTINCT FROM $3";

const MARK_REPOSITORY: &str = "
    UPDATE replicas p SET verified_at = NULL, comparing = NULL FROM repositories r
    WHERE r.id = p.repository_id AND r.virtual_storage = $1 AND r.relative_path = $2 AND r.state = 'ready'";

const MARK_REPLICA: &str = "
    UPDATE replicas SET verified_at = NULL, comparing = NULL
    WHERE repository_id = $1 AND storage = $2 AND NOT behind AND (verified_at IS NOT NULL OR comparing IS NOT NULL)";

const MARK_STORAGE: &str = "
    UPDATE replicas SET verified_at = NULL, comparing = NULL
    WHERE (repository_id, storage) IN (
        SELECT p.repository_id, p.storage FROM replicas p JOIN repositories r ON r.id = p.repository_id
        WHERE r.virtual_storage = $1 AND ($2 = '' OR p.storage = $2)
          AND (p.verified_at IS NOT NULL OR p.comparing IS NOT NULL) LIMIT $3)";

/// Repositories with replicas on these storages that were not verified for `age`, the longest first.
pub(crate) async fn unverified_list(
    pool: &PgPool,
    storages: &[(VirtualStorageName, StorageName)],
    age: Duration,
    limit: u32,
) -> Result<Vec<RepositoryId>, sqlx::Error> {
    let (virtual_storages, storages): (Vec<&str>, Vec<&str>) = storages
        .iter()
        .map(|(virtual_storage, storage)| (virtual_storage.as_str(), storage.as_str()))
        .unzip();
    let rows: Vec<i64> = sqlx::query_scalar(UNVERIFIED_LIST)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .bind(virtual_storages)
        .bind(storages)
        .fetch_all(pool)
        .await?;
    Ok(rows.into_iter().map(RepositoryId).collect())
}

/// A comparison of a repository's replicas, under way. The next one that begins takes its place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Comparison(Uuid);

/// Begins a comparison, before anything is looked at.
pub(crate) async fn comparison_begin(pool: &PgPool, id: RepositoryId) -> Result<Comparison, sqlx::Error> {
    let comparison = Uuid::new_v4();
    sqlx::query(COMPARING).bind(id.0).bind(comparison).execute(pool).await?;
    Ok(Comparison(comparison))
}

/// Remembers that a comparison found replicas equal at a generation.
pub(crate) async fn replica_verified(
    pool: &PgPool,
    id: RepositoryId,
    comparison: Comparison,
    storages: &[StorageName],
    generation: Generation,
) -> Result<u64, sqlx::Error> {
    let storages: Vec<&str> = storages.iter().map(StorageName::as_str).collect();
    let verified = sqlx::query(VERIFIED).bind(id.0).bind(storages).bind(generation.0).bind(comparison.0);
    verified.execute(pool).await.map(|done| done.rows_affected())
}

/// Remembers why a replica cannot be read, until it can be.
pub(crate) async fn replica_unreadable(
    pool: &PgPool,
    id: RepositoryId,
    storage: &StorageName,
    why: &str,
) -> Result<(), sqlx::Error> {
    let note = sqlx::query(UNREADABLE_NOTE).bind(id.0).bind(storage.as_str()).bind(why);
    note.execute(pool).await.map(drop)
}

/// Has one replica compared with the others as soon as its storage is well; a comparison under way does not count.
pub(crate) async fn unverify_replica(
    pool: &PgPool,
    id: RepositoryId,
    storage: &StorageName,
) -> Result<(), sqlx::Error> {
    sqlx::query(MARK_REPLICA).bind(id.0).bind(storage.as_str()).execute(pool).await.map(drop)
}

/// Has one repository's replicas compared soon; answers how many there are.
pub(crate) async fn unverify_repository(pool: &PgPool, key: &RepositoryKey) -> Result<u64, sqlx::Error> {
    sqlx::query(MARK_REPOSITORY)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .execute(pool)
        .await
        .map(|done| done.rows_affected())
}

/// Has up to `limit` replicas of a storage, or of a whole virtual storage, compared soon; answers how many were marked.
pub(crate) async fn unverify_storage(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: Option<&StorageName>,
    limit: u32,
) -> Result<u64, sqlx::Error> {
    of_storage(pool, MARK_STORAGE, virtual_storage, storage, limit).await
}
