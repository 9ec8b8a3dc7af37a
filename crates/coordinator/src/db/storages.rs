//! Virtual storages and storages. Written from each coordinator's configuration when it starts, and by operators at run time.
//! A storage that was removed stays as a row, so that a configuration that still names it does not bring it back.

use std::str::FromStr;

use sqlx::PgPool;
use tabularium_common::{
    grpc::Address,
    ids::{Generation, RepositoryId, StorageName, VirtualStorageName},
};

use super::parsed;
use crate::{
    quorum::QuorumPolicy,
    repository::{RepositoryKey, RevokedRoute},
};

const VIRTUAL_STORAGE_UPSERT: &str = "
    INSERT INTO virtual_storages (name, default_replication_factor, write_quorum) VALUES ($1, $2, $3)
    ON CONFLICT (name) DO UPDATE SET default_replication_factor = excluded.default_replication_factor,
                                     write_quorum = excluded.write_quorum";

const STORAGE_UPSERT: &str = "
    INSERT INTO storages (virtual_storage, name, address) VALUES ($1, $2, $3)
    ON CONFLICT (virtual_storage, name) DO UPDATE SET address = excluded.address";

const STORAGE_LIST: &str = "
    SELECT virtual_storage, name, address, state, added, filesystem_id FROM storages ORDER BY virtual_storage, name";

/// One that was removed comes back as a new one: whatever file system is there now is its own.
const STORAGE_ADD: &str = "
    INSERT INTO storages (virtual_storage, name, address, added) VALUES ($1, $2, $3, true)
    ON CONFLICT (virtual_storage, name) DO UPDATE
    SET address = excluded.address, state = 'active', added = true, filesystem_id = NULL
    WHERE storages.state = 'removed'
    RETURNING name";

const STORAGE_SET_STATE: &str = "
    UPDATE storages SET state = $4 WHERE virtual_storage = $1 AND name = $2 AND state = ANY ($3) RETURNING name";

const STORAGE_NOTE_FILESYSTEM: &str = "
    UPDATE storages SET filesystem_id = $3
    WHERE virtual_storage = $1 AND name = $2 AND filesystem_id IS NULL RETURNING name";

const STORAGE_SET_FILESYSTEM: &str =
    "UPDATE storages SET filesystem_id = $3 WHERE virtual_storage = $1 AND name = $2";

/// Repositories of which nobody else has the newest generation.
const STORAGE_COUNT_ONLY_HERE: &str = "
    SELECT count(*) FROM replicas p JOIN repositories r ON r.id = p.repository_id
    WHERE p.storage = $2 AND r.virtual_storage = $1 AND r.state = 'ready' AND p.generation = r.generation
      AND NOT EXISTS (SELECT FROM replicas q WHERE q.repository_id = r.id AND q.storage <> $2
                                               AND q.generation = r.generation)";

/// Writes down that nothing is known of a storage's replicas any more, a batch at a time; a primary moves to a replica that
/// is up to date, if there is one.
const STORAGE_FORGET: &str = "
    WITH held AS (
        SELECT r.id, r.virtual_storage, r.relative_path, r.generation, r.primary_storage,
               (SELECT q.storage FROM replicas q WHERE q.repository_id = r.id AND q.storage <> $2
                                                   AND q.generation = r.generation
                ORDER BY q.leaving, q.storage LIMIT 1) AS heir
        FROM replicas p JOIN repositories r ON r.id = p.repository_id
        WHERE p.storage = $2 AND r.virtual_storage = $1 AND p.generation >= 0
        ORDER BY r.id LIMIT $3 FOR UPDATE OF r
    ), forgotten AS (
        UPDATE replicas p SET generation = -1, behind = true, verified_at = NULL
        FROM held WHERE p.repository_id = held.id AND p.storage = $2
    ), pointless AS (
        UPDATE duties SET state = 'done', finished_at = now(), last_error = 'what the storage had is unknown'
        WHERE kind = 'replicate' AND target = $2 AND repository_id IN (SELECT id FROM held)
          AND state IN ('pending', 'published', 'started')
    ), moved AS (
        UPDATE repositories r SET primary_storage = held.heir, epoch = r.epoch + 1
        FROM held WHERE r.id = held.id AND held.primary_storage = $2 AND held.heir IS NOT NULL
    ), owed AS (
        INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
        SELECT id, virtual_storage, relative_path, generation + 1 FROM held
        RETURNING id, repository_id
    )
    SELECT held.id, held.relative_path, held.generation + 1, owed.id
    FROM held JOIN owed ON owed.repository_id = held.id";

/// The rows of a storage whose replicas are given up for lost. Repositories that have no other keep theirs: somebody must
/// be able to say what became of them.
const STORAGE_GIVE_UP: &str = "
    WITH gone AS (
        SELECT p.repository_id FROM replicas p JOIN repositories r ON r.id = p.repository_id
        WHERE p.storage = $2 AND r.virtual_storage = $1 AND p.generation < 0
          AND EXISTS (SELECT FROM replicas q WHERE q.repository_id = r.id AND q.storage <> $2)
        ORDER BY r.id LIMIT $3 FOR UPDATE OF r
    ), moved AS (
        UPDATE repositories r
        SET primary_storage = (SELECT q.storage FROM replicas q WHERE q.repository_id = r.id AND q.storage <> $2
                               ORDER BY q.generation DESC, q.storage LIMIT 1), epoch = epoch + 1
        WHERE r.id IN (SELECT repository_id FROM gone) AND r.primary_storage = $2
    )
    DELETE FROM replicas WHERE storage = $2 AND repository_id IN (SELECT repository_id FROM gone)";

const STORAGE_COUNT_REPLICAS: &str = "
    SELECT r.virtual_storage, p.storage, count(*) AS replicas, count(*) FILTER (WHERE p.behind) AS behind,
           count(*) FILTER (WHERE r.primary_storage = p.storage) AS primaries
    FROM replicas p JOIN repositories r ON r.id = p.repository_id
    WHERE r.state = 'ready'
    GROUP BY r.virtual_storage, p.storage";

/// What a storage is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StorageState {
    Active,
    /// Its replicas move away, and no new ones come.
    Draining,
    /// Nobody uses it any more.
    Removed,
}

impl StorageState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Removed => "removed",
        }
    }
}

/// A text in the database that names no state.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no state of a storage")]
pub(crate) struct UnknownState(String);

impl FromStr for StorageState {
    type Err = UnknownState;
    fn from_str(text: &str) -> Result<Self, UnknownState> {
        [Self::Active, Self::Draining, Self::Removed]
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| UnknownState(text.to_owned()))
    }
}

/// A storage with what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredStorage {
    pub(crate) storage: Storage,
    pub(crate) state: StorageState,
    /// By an operator, at run time.
    pub(crate) added: bool,
    /// Of the file system that its replicas are on; `None` while none was seen.
    pub(crate) filesystem_id: Option<String>,
}

/// A repository whose replica on a storage was forgotten, and the revocation that this owes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Forgotten {
    pub(crate) route: RevokedRoute,
    pub(crate) revocation: i64,
}

/// A storage as it is configured.
#[expect(clippy::struct_field_names, reason = "that is what it is called everywhere")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Storage {
    pub(crate) virtual_storage: VirtualStorageName,
    pub(crate) name: StorageName,
    pub(crate) address: Address,
}

/// What one storage holds.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct StorageCounts {
    pub(crate) virtual_storage: String,
    pub(crate) storage: String,
    pub(crate) replicas: i64,
    pub(crate) behind: i64,
    pub(crate) primaries: i64,
}

/// Adds a virtual storage, or changes its default replication factor and write quorum.
pub(crate) async fn virtual_storage_upsert(
    pool: &PgPool,
    name: &VirtualStorageName,
    default_replication_factor: u16,
    write_quorum: QuorumPolicy,
) -> Result<(), sqlx::Error> {
    sqlx::query(VIRTUAL_STORAGE_UPSERT)
        .bind(name.as_str())
        .bind(i32::from(default_replication_factor))
        .bind(write_quorum.as_str())
        .execute(pool)
        .await
        .map(drop)
}

/// Adds a storage, or changes its address.
pub(crate) async fn storage_upsert(pool: &PgPool, storage: &Storage) -> Result<(), sqlx::Error> {
    sqlx::query(STORAGE_UPSERT)
        .bind(storage.virtual_storage.as_str())
        .bind(storage.name.as_str())
        .bind(storage.address.to_string())
        .execute(pool)
        .await
        .map(drop)
}

/// All storages, by name, removed ones too.
pub(crate) async fn storage_list(pool: &PgPool) -> Result<Vec<StoredStorage>, sqlx::Error> {
    let rows: Vec<(String, String, String, String, bool, Option<String>)> =
        sqlx::query_as(STORAGE_LIST).fetch_all(pool).await?;
    rows.into_iter()
        .map(|(virtual_storage, name, address, state, added, filesystem_id)| {
            Ok(StoredStorage {
                storage: Storage {
                    virtual_storage: parsed(&virtual_storage)?,
                    name: parsed(&name)?,
                    address: parsed(&address)?,
                },
                state: parsed(&state)?,
                added,
                filesystem_id,
            })
        })
        .collect()
}

/// Adds a storage at run time. False: there is one of that name.
pub(crate) async fn storage_add(pool: &PgPool, storage: &Storage) -> Result<bool, sqlx::Error> {
    let added: Option<String> = sqlx::query_scalar(STORAGE_ADD)
        .bind(storage.virtual_storage.as_str())
        .bind(storage.name.as_str())
        .bind(storage.address.to_string())
        .fetch_optional(pool)
        .await?;
    Ok(added.is_some())
}

/// Changes what a storage is there for. False: it was in none of the states `from`.
pub(crate) async fn storage_set_state(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    from: &[StorageState],
    to: StorageState,
) -> Result<bool, sqlx::Error> {
    let from: Vec<&str> = from.iter().map(|state| state.as_str()).collect();
    let changed: Option<String> = sqlx::query_scalar(STORAGE_SET_STATE)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .bind(from)
        .bind(to.as_str())
        .fetch_optional(pool)
        .await?;
    Ok(changed.is_some())
}

/// Remembers the first file system seen at a storage. False: one was seen before.
pub(crate) async fn storage_note_filesystem(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    filesystem_id: &str,
) -> Result<bool, sqlx::Error> {
    let noted: Option<String> = sqlx::query_scalar(STORAGE_NOTE_FILESYSTEM)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .bind(filesystem_id)
        .fetch_optional(pool)
        .await?;
    Ok(noted.is_some())
}

/// Makes another file system the storage's own. What was known of its replicas has been forgotten before.
pub(crate) async fn storage_set_filesystem(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    filesystem_id: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(STORAGE_SET_FILESYSTEM)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .bind(filesystem_id)
        .execute(pool)
        .await
        .map(drop)
}

/// Of how many repositories nobody else has the newest generation.
pub(crate) async fn storage_count_only_here(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(STORAGE_COUNT_ONLY_HERE)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .fetch_one(pool)
        .await
}

/// Forgets what up to `limit` of a storage's replicas hold.
pub(crate) async fn storage_forget(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    limit: u32,
) -> Result<Vec<Forgotten>, sqlx::Error> {
    let rows: Vec<(i64, String, i64, i64)> = sqlx::query_as(STORAGE_FORGET)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    rows.into_iter()
        .map(|(id, relative_path, generation, revocation)| {
            let key = RepositoryKey {
                virtual_storage: virtual_storage.clone(),
                relative_path: parsed(&relative_path)?,
            };
            let route = RevokedRoute { key, id: RepositoryId(id), generation: Generation(generation) };
            Ok(Forgotten { route, revocation })
        })
        .collect()
}

/// Deletes up to `limit` replicas of a storage that were forgotten; answers how many.
pub(crate) async fn storage_give_up(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    limit: u32,
) -> Result<u64, sqlx::Error> {
    sqlx::query(STORAGE_GIVE_UP)
        .bind(virtual_storage.as_str())
        .bind(storage.as_str())
        .bind(i64::from(limit))
        .execute(pool)
        .await
        .map(|done| done.rows_affected())
}

/// How many replicas every storage holds. Reads all replicas: for people and gauges, not for requests of clients.
pub(crate) async fn storage_count_replicas(pool: &PgPool) -> Result<Vec<StorageCounts>, sqlx::Error> {
    sqlx::query_as(STORAGE_COUNT_REPLICAS).fetch_all(pool).await
}
