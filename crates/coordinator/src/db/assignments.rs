//! Assignments: which storages are to hold a repository, which of them are on their way out, and how many there are to be.
//! The caller of what ends in `_in_txn` holds the repository's lock.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tabularium_common::ids::{RepositoryId, StorageName, VirtualStorageName};

use super::{milliseconds, parsed};
use crate::repository::{Repository, RepositoryKey};

const FACTOR_SET: &str = "
    UPDATE repositories SET replication_factor = $3
    WHERE virtual_storage = $1 AND relative_path = $2 AND state = 'ready' RETURNING id";

const ASSIGNMENT_READ: &str = "
    SELECT coalesce(r.replication_factor, v.default_replication_factor) AS factor,
           ARRAY(SELECT p.storage FROM replicas p WHERE p.repository_id = r.id AND p.leaving) AS leaving,
           EXISTS (SELECT FROM writes w WHERE w.repository_id = r.id) AS being_written
    FROM repositories r JOIN virtual_storages v ON v.name = r.virtual_storage
    WHERE r.id = $1 AND r.state = 'ready'";

/// A removal that is owed would take away what is about to come; one that is under way rules the storage out for now.
const CLEANUP_CANCEL: &str = "
    WITH removals AS (
        SELECT id, state FROM duties
        WHERE kind = 'cleanup' AND repository_id = $1 AND target = $2 AND state <> 'done' FOR UPDATE
    ), cancelled AS (
        UPDATE duties SET state = 'done', finished_at = now(), last_error = 'the storage is to hold it again'
        WHERE id IN (SELECT id FROM removals) AND NOT EXISTS (SELECT FROM removals WHERE state = 'started')
    )
    SELECT NOT EXISTS (SELECT FROM removals WHERE state = 'started')";

const REPLICA_ASSIGN: &str = "
    INSERT INTO replicas (repository_id, storage, generation, behind, joining) VALUES ($1, $2, -1, true, true)
    ON CONFLICT (repository_id, storage) DO UPDATE SET leaving = false";

const REPLICA_SET_LEAVING: &str =
    "UPDATE replicas SET leaving = $3 WHERE repository_id = $1 AND storage = $2";

/// The files stay for a while: reads that began before may still use them.
const REPLICA_UNASSIGN: &str = "
    WITH gone AS (
        DELETE FROM replicas WHERE repository_id = $1 AND storage = $2 RETURNING repository_id, storage
    ), pointless AS (
        UPDATE duties SET state = 'done', finished_at = now(), last_error = 'the replica was given up meanwhile'
        WHERE kind = 'replicate' AND repository_id = $1 AND target = $2
          AND state IN ('pending', 'published', 'started', 'parked')
    ), cleanup AS (
        INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, next_attempt_at)
        SELECT 'cleanup', r.id, r.virtual_storage, r.replica_path, gone.storage, now() + $3 * interval '1 millisecond'
        FROM gone JOIN repositories r ON r.id = gone.repository_id
        ON CONFLICT DO NOTHING
    )
    INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
    SELECT r.id, r.virtual_storage, r.relative_path, r.generation + 1
    FROM gone JOIN repositories r ON r.id = gone.repository_id
    RETURNING id";

const REVOCATION_OWE: &str = "
    INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
    SELECT id, virtual_storage, relative_path, generation + 1 FROM repositories WHERE id = $1
    RETURNING id";

const LEAVING_LIST: &str =
    "SELECT repository_id, storage FROM replicas WHERE leaving ORDER BY repository_id, storage LIMIT $1";

const STAYING_ON: &str = "
    SELECT p.repository_id FROM replicas p JOIN repositories r ON r.id = p.repository_id
    WHERE p.storage = $2 AND r.virtual_storage = $1 AND r.state = 'ready' AND NOT p.leaving
    ORDER BY p.repository_id LIMIT $3";

/// A new replica that is still being made counts as a move to its storage, one that is leaving as a move from it.
const MOVES_COUNT: &str = "
    SELECT r.virtual_storage, p.storage, count(*) FILTER (WHERE p.joining), count(*) FILTER (WHERE p.leaving)
    FROM replicas p JOIN repositories r ON r.id = p.repository_id
    WHERE (p.joining AND p.behind) OR p.leaving
    GROUP BY r.virtual_storage, p.storage";

const CURSOR_RESET: &str = "UPDATE virtual_storages SET placement_cursor = 0 WHERE name = $1";

const CURSOR_LIST: &str =
    "SELECT name, placement_cursor FROM virtual_storages WHERE placement_cursor IS NOT NULL ORDER BY name";

/// Whoever reset it meanwhile wants everything to be looked at again.
const CURSOR_ADVANCE: &str =
    "UPDATE virtual_storages SET placement_cursor = $3 WHERE name = $1 AND placement_cursor = $2";

const CURSOR_PAGE: &str = "
    SELECT id FROM repositories WHERE virtual_storage = $1 AND id > $2 AND state = 'ready' ORDER BY id LIMIT $3";

const LARGEST_FACTOR: &str = "
    SELECT greatest(v.default_replication_factor,
                    (SELECT max(r.replication_factor) FROM repositories r WHERE r.virtual_storage = v.name))
    FROM virtual_storages v WHERE v.name = $1";

/// What is wanted of a repository's placement, and what is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Assignment {
    /// 0: all storages.
    pub(crate) factor: u16,
    pub(crate) leaving: Vec<StorageName>,
    /// Somebody holds its write ticket.
    pub(crate) being_written: bool,
}

/// Sets how many storages are to hold a repository; `None`: as its virtual storage says. `None`: there is no such
/// repository.
pub(crate) async fn factor_set(
    pool: &PgPool,
    key: &RepositoryKey,
    factor: Option<u16>,
) -> Result<Option<RepositoryId>, sqlx::Error> {
    let id: Option<i64> = sqlx::query_scalar(FACTOR_SET)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(factor.map(i32::from))
        .fetch_optional(pool)
        .await?;
    Ok(id.map(RepositoryId))
}

/// The largest replication factor that anything of a virtual storage asks for; 0: all storages, or none asks.
pub(crate) async fn factor_largest(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
) -> Result<u16, sqlx::Error> {
    let largest: Option<i32> =
        sqlx::query_scalar(LARGEST_FACTOR).bind(virtual_storage.as_str()).fetch_optional(pool).await?;
    Ok(u16::try_from(largest.unwrap_or(0)).unwrap_or(u16::MAX))
}

/// Reads what is wanted of a locked repository.
pub(crate) async fn assignment_read_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
) -> Result<Option<Assignment>, sqlx::Error> {
    let row: Option<(i32, Vec<String>, bool)> =
        sqlx::query_as(ASSIGNMENT_READ).bind(id.0).fetch_optional(connection).await?;
    row.map(|(factor, leaving, being_written)| {
        Ok(Assignment {
            factor: u16::try_from(factor).unwrap_or(u16::MAX),
            leaving: leaving.iter().map(|storage| parsed(storage)).collect::<Result<_, _>>()?,
            being_written,
        })
    })
    .transpose()
}

/// Makes a storage one that is to hold the repository. False: what it had of it is just being removed; ask again later.
pub(crate) async fn replica_assign_in_txn(
    connection: &mut PgConnection,
    repository: &Repository,
    storage: &StorageName,
) -> Result<bool, sqlx::Error> {
    let free: bool = sqlx::query_scalar(CLEANUP_CANCEL)
        .bind(repository.id.0)
        .bind(storage.as_str())
        .fetch_one(&mut *connection)
        .await?;
    if free {
        sqlx::query(REPLICA_ASSIGN).bind(repository.id.0).bind(storage.as_str()).execute(connection).await?;
    }
    Ok(free)
}

/// Says whether a replica is to be given up as soon as that is safe.
pub(crate) async fn replica_set_leaving_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    storage: &StorageName,
    leaving: bool,
) -> Result<(), sqlx::Error> {
    sqlx::query(REPLICA_SET_LEAVING)
        .bind(id.0)
        .bind(storage.as_str())
        .bind(leaving)
        .execute(connection)
        .await
        .map(drop)
}

/// Gives a replica up; its files go after `grace`. Answers the revocation that this owes; `None`: there was none.
pub(crate) async fn replica_unassign_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    storage: &StorageName,
    grace: Duration,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(REPLICA_UNASSIGN)
        .bind(id.0)
        .bind(storage.as_str())
        .bind(milliseconds(grace))
        .fetch_optional(connection)
        .await
}

/// Owes a revocation of every cached route to a repository.
pub(crate) async fn revocation_owe_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(REVOCATION_OWE).bind(id.0).fetch_one(connection).await
}

/// Replicas that are to be given up.
pub(crate) async fn leaving_list(
    pool: &PgPool,
    limit: u32,
) -> Result<Vec<(RepositoryId, StorageName)>, sqlx::Error> {
    let rows: Vec<(i64, String)> =
        sqlx::query_as(LEAVING_LIST).bind(i64::from(limit)).fetch_all(pool).await?;
    rows.into_iter().map(|(id, storage)| Ok((RepositoryId(id), parsed(&storage)?))).collect()
}

/// Repositories with a replica on a storage that is not on its way out.
pub(crate) async fn staying_list(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    limit: u32,
) -> Result<Vec<RepositoryId>, sqlx::Error> {
    let rows: Vec<i64> = sqlx::query_scalar(STAYING_ON)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    Ok(rows.into_iter().map(RepositoryId).collect())
}

/// How many replicas are coming to, and leaving, each storage of each virtual storage just now.
pub(crate) async fn moves_count(pool: &PgPool) -> Result<Vec<(String, String, i64, i64)>, sqlx::Error> {
    sqlx::query_as(MOVES_COUNT).fetch_all(pool).await
}

/// Has every repository of a virtual storage looked at, whether its replicas are where they should be.
pub(crate) async fn cursor_reset(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
) -> Result<(), sqlx::Error> {
    sqlx::query(CURSOR_RESET).bind(virtual_storage.as_str()).execute(pool).await.map(drop)
}

/// Virtual storages with repositories still to be looked at, and from where on.
pub(crate) async fn cursor_list(
    pool: &PgPool,
) -> Result<Vec<(VirtualStorageName, RepositoryId)>, sqlx::Error> {
    let rows: Vec<(String, i64)> = sqlx::query_as(CURSOR_LIST).fetch_all(pool).await?;
    rows.into_iter().map(|(name, cursor)| Ok((parsed(&name)?, RepositoryId(cursor)))).collect()
}

/// Repositories after `cursor`, in the order of their ids.
pub(crate) async fn cursor_page(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    cursor: RepositoryId,
    limit: u32,
) -> Result<Vec<RepositoryId>, sqlx::Error> {
    let rows: Vec<i64> = sqlx::query_scalar(CURSOR_PAGE)
        .bind(virtual_storage.as_str())
        .bind(cursor.0)
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    Ok(rows.into_iter().map(RepositoryId).collect())
}

/// All up to `to` were looked at; `None`: all there are.
pub(crate) async fn cursor_advance(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    from: RepositoryId,
    to: Option<RepositoryId>,
) -> Result<(), sqlx::Error> {
    sqlx::query(CURSOR_ADVANCE)
        .bind(virtual_storage.as_str())
        .bind(from.0)
        .bind(to.map(|id| id.0))
        .execute(pool)
        .await
        .map(drop)
}
