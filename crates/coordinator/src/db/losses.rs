//! What is behind, what nobody can serve, and an operator's word about which replica is the truth.

use std::collections::HashMap;

use sqlx::{PgConnection, PgExecutor, PgPool};
use tabularium_common::ids::{Generation, RepositoryId, StorageName, VirtualStorageName};
use time::OffsetDateTime;

use super::repositories::{RepositoryRow, repository_columns};
use crate::repository::{Repository, RepositoryKey};

/// `$4`: storages that are healthy. `$5`: only what none of them can serve.
const LOSS_LIST: &str = concat!(
    "SELECT ",
    repository_columns!(),
    ", r.written_at, coalesce(r.replication_factor, w.default_replication_factor) AS factor
     FROM repositories r JOIN virtual_storages w ON w.name = r.virtual_storage
     WHERE r.virtual_storage = $1 AND r.relative_path > $2 AND r.state = 'ready'
       AND ((NOT $5 AND EXISTS (SELECT FROM replicas p WHERE p.repository_id = r.id
                                                        AND (p.behind OR p.damage IS NOT NULL
                                                             OR p.unreadable IS NOT NULL)))
            OR NOT EXISTS (SELECT FROM replicas p WHERE p.repository_id = r.id AND NOT p.behind
                                                    AND p.unreadable IS NULL AND p.storage = ANY ($4)))
     ORDER BY r.relative_path LIMIT $3"
);

const PLACEMENT_OF_NAME: &str = concat!(
    "SELECT ",
    repository_columns!(),
    ", r.written_at, coalesce(r.replication_factor, w.default_replication_factor) AS factor
     FROM repositories r JOIN virtual_storages w ON w.name = r.virtual_storage
     WHERE r.virtual_storage = $1 AND r.relative_path = $2 AND r.state = 'ready'"
);

const PLACEMENT_OF_ID: &str = concat!(
    "SELECT ",
    repository_columns!(),
    ", r.written_at, coalesce(r.replication_factor, w.default_replication_factor) AS factor
     FROM repositories r JOIN virtual_storages w ON w.name = r.virtual_storage
     WHERE r.id = $1 AND r.state = 'ready'"
);

const CONDITIONS: &str = "
    SELECT repository_id, storage, leaving, behind_since, verified_at, checked_at,
           coalesce(damage, unreadable, '') AS damage, unreadable IS NOT NULL AS unreadable
    FROM replicas WHERE repository_id = ANY ($1)";

/// The others may hold anything: they are made again, and what they hold beyond the truth is gone then.
const TRUTH_ACCEPT: &str = "
    WITH truth AS (
        UPDATE repositories SET generation = generation + 1, epoch = epoch + 1, primary_storage = $2, written_at = now()
        WHERE id = $1
        RETURNING id, virtual_storage, relative_path, generation, home_site
    ), settled AS (
        UPDATE replicas p
        SET generation = CASE WHEN p.storage = $2 THEN truth.generation ELSE -1 END, behind = p.storage <> $2,
            leaving = p.leaving AND p.storage <> $2, verified_at = NULL, unreadable = NULL
        FROM truth WHERE p.repository_id = truth.id
    ), pointless AS (
        UPDATE duties SET state = 'done', finished_at = now(), last_error = 'another replica became the truth'
        WHERE kind = 'replicate' AND repository_id = $1 AND state IN ('pending', 'published', 'started', 'parked')
    ), told AS (
        INSERT INTO geo_log (kind, repository_id, virtual_storage, relative_path, generation)
        SELECT 'updated', id, virtual_storage, relative_path, generation FROM truth WHERE home_site IS NULL
    ), owed AS (
        INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
        SELECT id, virtual_storage, relative_path, generation FROM truth RETURNING id
    )
    SELECT truth.generation, owed.id FROM truth, owed";

#[derive(sqlx::FromRow)]
struct PlacementRow {
    #[sqlx(flatten)]
    repository: RepositoryRow,
    written_at: OffsetDateTime,
    factor: i32,
}

#[derive(sqlx::FromRow)]
struct ConditionRow {
    repository_id: i64,
    storage: String,
    leaving: bool,
    behind_since: Option<OffsetDateTime>,
    verified_at: Option<OffsetDateTime>,
    checked_at: Option<OffsetDateTime>,
    damage: String,
    unreadable: bool,
}

/// What is known of one replica beside its generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) leaving: bool,
    pub(crate) behind_since: Option<OffsetDateTime>,
    pub(crate) verified_at: Option<OffsetDateTime>,
    pub(crate) checked_at: Option<OffsetDateTime>,
    /// Of its objects, in git's words, or why its node cannot read it; empty: none is known.
    pub(crate) damage: String,
    /// Its node cannot say what it holds.
    pub(crate) unreadable: bool,
}

/// A repository with all that is known of its replicas.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) repository: Repository,
    pub(crate) written_at: OffsetDateTime,
    /// 0: all storages.
    pub(crate) factor: u16,
    /// By storage.
    pub(crate) conditions: HashMap<String, Condition>,
}

async fn placed(pool: &PgPool, rows: Vec<PlacementRow>) -> Result<Vec<Placed>, sqlx::Error> {
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        found.push(Placed {
            repository: row.repository.try_into()?,
            written_at: row.written_at,
            factor: u16::try_from(row.factor).unwrap_or(u16::MAX),
            conditions: HashMap::new(),
        });
    }
    let ids: Vec<i64> = found.iter().map(|placed| placed.repository.id.0).collect();
    let rows: Vec<ConditionRow> = sqlx::query_as(CONDITIONS).bind(ids).fetch_all(pool).await?;
    for row in rows {
        if let Some(placed) = found.iter_mut().find(|placed| placed.repository.id.0 == row.repository_id) {
            let ConditionRow { leaving, behind_since, verified_at, checked_at, damage, unreadable, .. } = row;
            let condition = Condition { leaving, behind_since, verified_at, checked_at, damage, unreadable };
            placed.conditions.insert(row.storage, condition);
        }
    }
    Ok(found)
}

/// What a page of [`loss_list`] is about.
#[derive(Debug, Clone)]
pub(crate) struct LossQuery {
    pub(crate) virtual_storage: VirtualStorageName,
    /// Only names that come after this.
    pub(crate) after: String,
    pub(crate) limit: u32,
    pub(crate) only_unavailable: bool,
}

/// Repositories of which a replica is behind, damaged or cannot be read, or that none of the `healthy` storages can serve, by name.
pub(crate) async fn loss_list(
    pool: &PgPool,
    query: &LossQuery,
    healthy: &[StorageName],
) -> Result<Vec<Placed>, sqlx::Error> {
    let healthy: Vec<&str> = healthy.iter().map(StorageName::as_str).collect();
    let rows = sqlx::query_as(LOSS_LIST)
        .bind(query.virtual_storage.as_str())
        .bind(&query.after)
        .bind(i64::from(query.limit))
        .bind(healthy)
        .bind(query.only_unavailable)
        .fetch_all(pool)
        .await?;
    placed(pool, rows).await
}

/// One repository with all that is known of its replicas.
pub(crate) async fn placement_of_name(
    pool: &PgPool,
    key: &RepositoryKey,
) -> Result<Option<Placed>, sqlx::Error> {
    let rows = sqlx::query_as(PLACEMENT_OF_NAME)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .fetch_all(pool)
        .await?;
    Ok(placed(pool, rows).await?.pop())
}

/// As [`placement_of_name`].
pub(crate) async fn placement_of_id(pool: &PgPool, id: RepositoryId) -> Result<Option<Placed>, sqlx::Error> {
    let rows = sqlx::query_as(PLACEMENT_OF_ID).bind(id.0).fetch_all(pool).await?;
    Ok(placed(pool, rows).await?.pop())
}

/// Makes the replica on `storage` the truth, and the primary. Answers the new generation and the revocation that is owed.
/// The caller holds the repository's lock, has seen that nobody writes, and owes the copies.
pub(crate) async fn truth_accept_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    storage: &StorageName,
) -> Result<(Generation, i64), sqlx::Error> {
    let (generation, revocation): (i64, i64) =
        sqlx::query_as(TRUTH_ACCEPT).bind(id.0).bind(storage.as_str()).fetch_one(connection).await?;
    Ok((Generation(generation), revocation))
}

/// Whether a replica path is in no record of a virtual storage.
const UNTRACKED: &str = "
    SELECT path FROM unnest($2::text[]) AS path
    WHERE NOT EXISTS (SELECT FROM repositories r WHERE r.replica_path = path AND r.virtual_storage = $1
                        AND (r.state = 'creating'
                             OR EXISTS (SELECT FROM replicas p WHERE p.repository_id = r.id AND p.storage = $3)))
      AND NOT EXISTS (SELECT FROM duties d WHERE d.kind = 'cleanup' AND d.state <> 'done' AND d.replica_path = path
                                             AND d.virtual_storage = $1 AND d.target = $3)";

const TRACK: &str = "
    WITH made AS (
        INSERT INTO repositories (id, virtual_storage, relative_path, replica_path, state, primary_storage, generation)
        SELECT $1, $2, $3, $4, 'ready', $5, 1
        WHERE NOT EXISTS (SELECT FROM repositories WHERE replica_path = $4 AND virtual_storage = $2)
        RETURNING id, virtual_storage, relative_path, generation
    ), replica AS (
        INSERT INTO replicas (repository_id, storage, generation, behind) SELECT id, $5, generation, false FROM made
    ), told AS (
        INSERT INTO geo_log (kind, repository_id, virtual_storage, relative_path, generation)
        SELECT 'created', id, virtual_storage, relative_path, generation FROM made
    )
    SELECT id FROM made";

/// Which of a storage's `paths` are in no record, and are not about to be removed either.
pub(crate) async fn path_list_untracked(
    executor: impl PgExecutor<'_>,
    virtual_storage: &VirtualStorageName,
    storage: &StorageName,
    paths: &[String],
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(UNTRACKED)
        .bind(virtual_storage.as_str())
        .bind(paths)
        .bind(storage.as_str())
        .fetch_all(executor)
        .await
}

/// Makes a repository known that is on a storage already. False: that path is another repository's. A name that is taken
/// violates the unique index of names.
pub(crate) async fn repository_track(
    pool: &PgPool,
    id: RepositoryId,
    key: &RepositoryKey,
    replica_path: &str,
    storage: &StorageName,
) -> Result<bool, sqlx::Error> {
    let made: Option<i64> = sqlx::query_scalar(TRACK)
        .bind(id.0)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(replica_path)
        .bind(storage.as_str())
        .fetch_optional(pool)
        .await?;
    Ok(made.is_some())
}
