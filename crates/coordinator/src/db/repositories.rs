//! Repositories. A row in state `creating` is invisible to everybody but the write that creates it.

use sqlx::{PgConnection, PgExecutor, PgPool};
use tabularium_common::ids::{
    Epoch, Generation, RelativePath, RepositoryId, SiteName, StorageName, VirtualStorageName,
};
use time::OffsetDateTime;

use super::{is_duplicate, parsed};
use crate::{
    quorum::QuorumPolicy,
    repository::{Replica, Repository, RepositoryKey, RevokedRoute},
};

/// What the row of a [`Repository`] itself says, from `repositories r`.
macro_rules! repository_values {
    () => {
        "r.id, r.virtual_storage, r.relative_path, r.replica_path, r.primary_storage, r.generation, r.epoch, r.home_site"
    };
}
pub(super) use repository_values;

/// What a [`Repository`] is made of, from `repositories r`.
macro_rules! repository_columns {
    () => {
        "r.id, r.virtual_storage, r.relative_path, r.replica_path, r.primary_storage, r.generation, r.epoch, r.home_site,
         coalesce(r.write_quorum, (SELECT v.write_quorum FROM virtual_storages v WHERE v.name = r.virtual_storage))
             AS write_quorum,
         ARRAY(SELECT p.storage FROM replicas p WHERE p.repository_id = r.id ORDER BY p.storage) AS storages,
         ARRAY(SELECT p.generation FROM replicas p WHERE p.repository_id = r.id ORDER BY p.storage) AS generations,
         (SELECT count(*) FROM replicas p WHERE p.repository_id = r.id AND NOT p.joining) AS members"
    };
}
pub(super) use repository_columns;

const REPOSITORY_RESOLVE: &str = concat!(
    "SELECT ",
    repository_columns!(),
    " FROM repositories r WHERE r.virtual_storage = $1 AND r.relative_path = $2 AND r.state = 'ready'"
);

const REPOSITORY_FIND: &str =
    concat!("SELECT ", repository_columns!(), " FROM repositories r WHERE r.id = $1 AND r.state = 'ready'");

/// The lock is taken first and what depends on it read by the next statement, whose snapshot is younger.
const REPOSITORY_LOCK_NAME: &str = "
    SELECT id FROM repositories WHERE virtual_storage = $1 AND relative_path = $2 AND state = 'ready' FOR UPDATE";

const REPOSITORY_LOCK_ID: &str = "SELECT id FROM repositories WHERE id = $1 FOR UPDATE";

const REPOSITORY_READ: &str =
    concat!("SELECT ", repository_columns!(), " FROM repositories r WHERE r.id = $1");

const REPOSITORY_RESERVE_IDS: &str = "SELECT nextval('repository_id') FROM generate_series(1, $1)";

const REPOSITORY_MOVE_PRIMARY: &str =
    "UPDATE repositories SET primary_storage = $2, epoch = epoch + 1 WHERE id = $1 RETURNING epoch";

const REPOSITORY_SET_WRITE_QUORUM: &str = "
    UPDATE repositories SET write_quorum = $3
    WHERE virtual_storage = $1 AND relative_path = $2 AND state = 'ready' RETURNING id";

const REPOSITORY_REMOVE: &str = "
    WITH gone AS (
        DELETE FROM repositories WHERE virtual_storage = $1 AND relative_path = $2 AND state = 'ready'
        RETURNING id, virtual_storage, relative_path, replica_path, generation, home_site
    ), cleanup AS (
        INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, correlation_id)
        SELECT 'cleanup', gone.id, gone.virtual_storage, gone.replica_path, p.storage, $3
        FROM gone JOIN replicas p ON p.repository_id = gone.id
        ON CONFLICT DO NOTHING
    ), forgotten AS (
        DELETE FROM mirrors m USING gone
        WHERE m.virtual_storage = gone.virtual_storage AND m.relative_path = gone.relative_path
          AND m.state <> 'started'
    ), told AS (
        INSERT INTO geo_log (kind, repository_id, virtual_storage, relative_path, generation)
        SELECT 'deleted', id, virtual_storage, relative_path, generation FROM gone WHERE home_site IS NULL
    ), owed AS (
        INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
        SELECT id, virtual_storage, relative_path, generation + 1 FROM gone RETURNING id
    )
    SELECT gone.id, gone.generation + 1, owed.id FROM gone, owed";

const REPOSITORY_RENAME: &str = "
    WITH before AS (
        SELECT id, relative_path FROM repositories
        WHERE virtual_storage = $1 AND relative_path = $2 AND state = 'ready' FOR UPDATE
    ), renamed AS (
        UPDATE repositories r SET relative_path = $3 FROM before WHERE r.id = before.id
        RETURNING r.id, r.virtual_storage, r.relative_path, r.generation, r.home_site
    ), mirror AS (
        DELETE FROM mirrors WHERE virtual_storage = $1 AND relative_path = $2 AND EXISTS (SELECT FROM renamed)
        RETURNING home_site, state, look_again, claim_id, claim_expires_at, worker_id, failures, last_error, synced_at
    ), mirror_renamed AS (
        INSERT INTO mirrors (virtual_storage, relative_path, home_site, state, look_again, claim_id,
                             claim_expires_at, worker_id, failures, last_error, synced_at)
        SELECT $1, $3, mirror.* FROM mirror
        ON CONFLICT (virtual_storage, relative_path) DO NOTHING
    ), told AS (
        INSERT INTO geo_log (kind, repository_id, virtual_storage, relative_path, old_relative_path, generation)
        SELECT 'renamed', id, virtual_storage, relative_path, $2, generation FROM renamed WHERE home_site IS NULL
    ), owed AS (
        INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
        SELECT id, virtual_storage, $2, generation + 1 FROM renamed RETURNING id
    )
    SELECT renamed.id, renamed.generation + 1, owed.id FROM renamed, owed";

const REPOSITORY_LIST: &str = concat!(
    "SELECT ",
    repository_columns!(),
    ", r.created_at, r.written_at, m.state AS mirror_state, m.last_error AS mirror_error, m.synced_at AS mirror_synced_at
     FROM repositories r
     LEFT JOIN mirrors m ON m.virtual_storage = r.virtual_storage AND m.relative_path = r.relative_path
                        AND m.home_site = r.home_site
     WHERE r.virtual_storage = $1 AND r.relative_path > $2 AND r.relative_path >= $3
       AND r.relative_path < $3 || chr(1114111) AND starts_with(r.relative_path, $3) AND r.state = 'ready'
     ORDER BY r.relative_path LIMIT $4"
);

const REPOSITORY_DETAILS: &str = concat!(
    "SELECT ",
    repository_columns!(),
    ", r.created_at, r.written_at, m.state AS mirror_state, m.last_error AS mirror_error, m.synced_at AS mirror_synced_at
     FROM repositories r
     LEFT JOIN mirrors m ON m.virtual_storage = r.virtual_storage AND m.relative_path = r.relative_path
                        AND m.home_site = r.home_site
     WHERE r.virtual_storage = $1 AND r.relative_path = $2 AND r.state = 'ready'"
);

const REPOSITORY_COUNT: &str = "
    SELECT r.virtual_storage, count(*) AS repositories,
           count(*) FILTER (WHERE EXISTS (SELECT FROM replicas p WHERE p.repository_id = r.id AND p.behind)) AS behind
    FROM repositories r WHERE r.state = 'ready' GROUP BY r.virtual_storage";

#[derive(sqlx::FromRow)]
pub(super) struct RepositoryRow {
    id: i64,
    virtual_storage: String,
    relative_path: String,
    replica_path: String,
    primary_storage: String,
    generation: i64,
    epoch: i64,
    home_site: Option<String>,
    write_quorum: String,
    storages: Vec<String>,
    generations: Vec<i64>,
    members: i64,
}

impl TryFrom<RepositoryRow> for Repository {
    type Error = sqlx::Error;
    fn try_from(row: RepositoryRow) -> Result<Self, sqlx::Error> {
        let replicas = row
            .storages
            .iter()
            .zip(row.generations)
            .map(|(storage, generation)| {
                Ok(Replica { storage: parsed(storage)?, generation: Generation(generation) })
            })
            .collect::<Result<_, sqlx::Error>>()?;
        Ok(Self {
            id: RepositoryId(row.id),
            key: RepositoryKey {
                virtual_storage: parsed(&row.virtual_storage)?,
                relative_path: parsed(&row.relative_path)?,
            },
            replica_path: parsed(&row.replica_path)?,
            primary: parsed(&row.primary_storage)?,
            generation: Generation(row.generation),
            epoch: Epoch(row.epoch),
            home_site: row.home_site.as_deref().map(parsed::<SiteName>).transpose()?,
            write_quorum: parsed(&row.write_quorum)?,
            members: usize::try_from(row.members).unwrap_or(0),
            replicas,
        })
    }
}

/// A repository with what people want to see of it.
#[derive(Debug, Clone)]
pub(crate) struct RepositoryDetails {
    pub(crate) repository: Repository,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) written_at: OffsetDateTime,
    pub(crate) mirror: Option<MirrorState>,
}

/// What the registry says of a mirror.
#[derive(Debug, Clone)]
pub(crate) struct MirrorState {
    pub(crate) state: String,
    pub(crate) last_error: String,
    pub(crate) synced_at: Option<OffsetDateTime>,
}

#[derive(sqlx::FromRow)]
struct DetailsRow {
    #[sqlx(flatten)]
    repository: RepositoryRow,
    created_at: OffsetDateTime,
    written_at: OffsetDateTime,
    mirror_state: Option<String>,
    mirror_error: Option<String>,
    mirror_synced_at: Option<OffsetDateTime>,
}

impl TryFrom<DetailsRow> for RepositoryDetails {
    type Error = sqlx::Error;
    fn try_from(row: DetailsRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            repository: row.repository.try_into()?,
            created_at: row.created_at,
            written_at: row.written_at,
            mirror: row.mirror_state.map(|state| MirrorState {
                state,
                last_error: row.mirror_error.unwrap_or_default(),
                synced_at: row.mirror_synced_at,
            }),
        })
    }
}

/// How many repositories a virtual storage has.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct RepositoryCounts {
    pub(crate) virtual_storage: String,
    pub(crate) repositories: i64,
    pub(crate) behind: i64,
}

/// A repository that lost its name, and the revocation that this owes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NameGone {
    pub(crate) revoked: RevokedRoute,
    pub(crate) revocation: i64,
}

/// Why a rename was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RenameRefused {
    NotFound,
    NameTaken,
}

/// The repository of that name: one statement on the unique index of names.
pub(crate) async fn repository_resolve(
    executor: impl PgExecutor<'_>,
    key: &RepositoryKey,
) -> Result<Option<Repository>, sqlx::Error> {
    let row: Option<RepositoryRow> = sqlx::query_as(REPOSITORY_RESOLVE)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .fetch_optional(executor)
        .await?;
    row.map(Repository::try_from).transpose()
}

/// The repository of that id, when its creation is complete.
pub(crate) async fn repository_find(
    executor: impl PgExecutor<'_>,
    id: RepositoryId,
) -> Result<Option<Repository>, sqlx::Error> {
    let row: Option<RepositoryRow> =
        sqlx::query_as(REPOSITORY_FIND).bind(id.0).fetch_optional(executor).await?;
    row.map(Repository::try_from).transpose()
}

async fn read_locked(
    connection: &mut PgConnection,
    id: Option<i64>,
) -> Result<Option<Repository>, sqlx::Error> {
    match id {
        Some(id) => repository_read(connection, RepositoryId(id)).await,
        None => Ok(None),
    }
}

/// Locks the repository of that name against every change and reads it.
pub(crate) async fn repository_lock_name(
    connection: &mut PgConnection,
    key: &RepositoryKey,
) -> Result<Option<Repository>, sqlx::Error> {
    let id = sqlx::query_scalar(REPOSITORY_LOCK_NAME)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .fetch_optional(&mut *connection)
        .await?;
    read_locked(connection, id).await
}

/// Locks the repository of that id, complete or not, and reads it.
pub(crate) async fn repository_lock_id(
    connection: &mut PgConnection,
    id: RepositoryId,
) -> Result<Option<Repository>, sqlx::Error> {
    let id = sqlx::query_scalar(REPOSITORY_LOCK_ID).bind(id.0).fetch_optional(&mut *connection).await?;
    read_locked(connection, id).await
}

/// Numbers that no repository has or had.
pub(crate) async fn repository_reserve_ids(
    pool: &PgPool,
    count: i32,
) -> Result<Vec<RepositoryId>, sqlx::Error> {
    let ids: Vec<i64> = sqlx::query_scalar(REPOSITORY_RESERVE_IDS).bind(count).fetch_all(pool).await?;
    Ok(ids.into_iter().map(RepositoryId).collect())
}

/// The repository of that id, complete or not, not locked.
pub(crate) async fn repository_read(
    executor: impl PgExecutor<'_>,
    id: RepositoryId,
) -> Result<Option<Repository>, sqlx::Error> {
    let row: Option<RepositoryRow> =
        sqlx::query_as(REPOSITORY_READ).bind(id.0).fetch_optional(executor).await?;
    row.map(Repository::try_from).transpose()
}

/// Makes another replica the primary and raises the epoch. The caller holds the repository's lock.
pub(crate) async fn repository_move_primary_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    primary: &StorageName,
) -> Result<Epoch, sqlx::Error> {
    sqlx::query_scalar(REPOSITORY_MOVE_PRIMARY)
        .bind(id.0)
        .bind(primary.as_str())
        .fetch_one(connection)
        .await
        .map(Epoch)
}

/// Gives a repository a write quorum of its own, or `None`: as its virtual storage says. False: there is none of that
/// name. Routes cached before name the old quorum; what is committed is judged by the new one.
pub(crate) async fn repository_set_write_quorum(
    pool: &PgPool,
    key: &RepositoryKey,
    policy: Option<QuorumPolicy>,
) -> Result<bool, sqlx::Error> {
    let found: Option<i64> = sqlx::query_scalar(REPOSITORY_SET_WRITE_QUORUM)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(policy.map(QuorumPolicy::as_str))
        .fetch_optional(pool)
        .await?;
    Ok(found.is_some())
}

/// Forgets a repository with its intents, owes the removal of its replicas, tells the geo log.
pub(crate) async fn repository_remove(
    pool: &PgPool,
    key: &RepositoryKey,
    correlation_id: &str,
) -> Result<Option<NameGone>, sqlx::Error> {
    let row: Option<(i64, i64, i64)> = sqlx::query_as(REPOSITORY_REMOVE)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(correlation_id)
        .fetch_optional(pool)
        .await?;
    Ok(row.map(|row| name_gone(key, row)))
}

fn name_gone(key: &RepositoryKey, (id, generation, revocation): (i64, i64, i64)) -> NameGone {
    let revoked = RevokedRoute { key: key.clone(), id: RepositoryId(id), generation: Generation(generation) };
    NameGone { revoked, revocation }
}

/// Gives a repository another name in the same virtual storage, and its mirror's record with it.
pub(crate) async fn repository_rename(
    pool: &PgPool,
    key: &RepositoryKey,
    to: &RelativePath,
) -> Result<Result<NameGone, RenameRefused>, sqlx::Error> {
    let renamed: Result<Option<(i64, i64, i64)>, _> = sqlx::query_as(REPOSITORY_RENAME)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(to.as_str())
        .fetch_optional(pool)
        .await;
    match renamed {
        Ok(Some(row)) => Ok(Ok(name_gone(key, row))),
        Ok(None) => Ok(Err(RenameRefused::NotFound)),
        Err(error) if is_duplicate(&error) => Ok(Err(RenameRefused::NameTaken)),
        Err(error) => Err(error),
    }
}

/// Repositories whose name starts with `prefix` and comes after `after`, by name.
pub(crate) async fn repository_list(
    pool: &PgPool,
    virtual_storage: &VirtualStorageName,
    after: &str,
    prefix: &str,
    limit: u32,
) -> Result<Vec<RepositoryDetails>, sqlx::Error> {
    let rows: Vec<DetailsRow> = sqlx::query_as(REPOSITORY_LIST)
        .bind(virtual_storage.as_str())
        .bind(after)
        .bind(prefix)
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    rows.into_iter().map(RepositoryDetails::try_from).collect()
}

/// One repository with its details.
pub(crate) async fn repository_details(
    pool: &PgPool,
    key: &RepositoryKey,
) -> Result<Option<RepositoryDetails>, sqlx::Error> {
    let row: Option<DetailsRow> = sqlx::query_as(REPOSITORY_DETAILS)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .fetch_optional(pool)
        .await?;
    row.map(RepositoryDetails::try_from).transpose()
}

/// How many repositories there are. Reads all of them.
pub(crate) async fn repository_count(pool: &PgPool) -> Result<Vec<RepositoryCounts>, sqlx::Error> {
    sqlx::query_as(REPOSITORY_COUNT).fetch_all(pool).await
}
