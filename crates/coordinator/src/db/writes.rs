//! Intents: writes that a router said it would make and has not reported on yet; and for a while what became of them.

use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, PgPool};
use tabularium_common::ids::{Generation, RepositoryId, SiteName, StorageName};
use uuid::Uuid;

use super::{
    milliseconds, parsed,
    repositories::{RepositoryRow, repository_columns},
};
use crate::repository::{Repository, RepositoryKey, RevokedRoute};

/// Begins a write to a repository whose primary can take it, in one statement. `KEY SHARE` keeps the primary from being
/// moved until the intent stands, and does not disturb commits.
const WRITE_BEGIN: &str = concat!(
    "WITH r AS (
        SELECT * FROM repositories
        WHERE virtual_storage = $1 AND relative_path = $2 AND state = 'ready'
        FOR KEY SHARE
    ), intent AS (
        INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id, expires_at)
        SELECT $3, r.id, 'update', r.epoch, r.primary_storage, $4, $5, $6, now() + $7 * interval '1 millisecond'
        FROM r
        WHERE r.home_site IS NOT DISTINCT FROM $8
          AND r.primary_storage <> ALL ($9)
          AND EXISTS (SELECT FROM replicas p WHERE p.repository_id = r.id AND p.storage = r.primary_storage
                                               AND p.generation = r.generation)
        RETURNING id
    )
    SELECT ",
    repository_columns!(),
    ", EXISTS (SELECT FROM intent) AS begun FROM r"
);

const WRITE_INSERT: &str = "
    INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id, expires_at)
    VALUES ($1, $2, 'update', $3, $4, $5, $6, $7, now() + $8 * interval '1 millisecond')";

/// The unique index of names lets one of several creators through.
const WRITE_BEGIN_CREATION: &str = "
    WITH r AS (
        INSERT INTO repositories (id, virtual_storage, relative_path, replica_path, state, primary_storage, home_site)
        VALUES ($1, $2, $3, $4, 'creating', $5, $6)
        ON CONFLICT (virtual_storage, relative_path) DO NOTHING
        RETURNING id, epoch
    ), copies AS (
        INSERT INTO replicas (repository_id, storage, generation, behind)
        SELECT r.id, storage, -1, true FROM r, unnest($7::text[]) AS storage
    ), intent AS (
        INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id, expires_at)
        SELECT $8, r.id, 'create', r.epoch, $5, $9, $10, $11, now() + $12 * interval '1 millisecond' FROM r
        RETURNING id
    )
    SELECT EXISTS (SELECT FROM intent)";

/// Whether replica `p` has what the write made: it took part, and it had everything before.
macro_rules! took {
    () => {
        "(p.storage = ANY ($3) AND (p.storage = repo.primary_storage OR repo.kind = 'create'
                                    OR p.generation = raised.generation - 1))"
    };
}

/// Records a write. Everything follows from the intent's deletion, which happens once, under the repository's lock. All
/// replicas are updated, changed or not: the conditions are then judged on their newest rows, not on the snapshot's.
/// Revocations that an earlier commit owes are not looked for here: when this one waited for that one's lock, its
/// snapshot is too old to show them.
const WRITE_COMMIT: &str = concat!(
    "WITH repo AS (
        SELECT r.id, r.virtual_storage, r.relative_path, r.replica_path, r.home_site, w.kind, w.primary_storage,
               w.correlation_id
        FROM writes w JOIN repositories r ON r.id = w.repository_id AND r.epoch = w.epoch
        WHERE w.id = $1 AND w.router_id = $2
        FOR NO KEY UPDATE OF r
    ), intent AS (
        DELETE FROM writes w USING repo WHERE w.id = $1 AND repo.primary_storage = ANY ($3) RETURNING w.id
    ), raised AS (
        UPDATE repositories r SET generation = r.generation + 1, state = 'ready', written_at = now()
        FROM intent, repo WHERE r.id = repo.id
        RETURNING r.id, r.generation
    ), settled AS (
        UPDATE replicas p
        SET generation = CASE WHEN ",
    took!(),
    " THEN raised.generation ELSE p.generation END, behind = NOT ",
    took!(),
    " FROM raised, repo WHERE p.repository_id = raised.id
        RETURNING p.storage, p.behind, p.behind AND p.generation = raised.generation - 1 AS left_behind
    ), owed_copies AS (
        INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, correlation_id)
        SELECT 'replicate', repo.id, repo.virtual_storage, repo.replica_path, settled.storage, repo.correlation_id
        FROM settled, repo WHERE settled.behind
        ON CONFLICT DO NOTHING
    ), told AS (
        INSERT INTO geo_log (kind, repository_id, virtual_storage, relative_path, generation)
        SELECT CASE repo.kind WHEN 'create' THEN 'created' ELSE 'updated' END, repo.id, repo.virtual_storage,
               repo.relative_path, raised.generation
        FROM raised, repo WHERE repo.home_site IS NULL
    ), owed AS (
        INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
        SELECT repo.id, repo.virtual_storage, repo.relative_path, raised.generation
        FROM raised, repo WHERE repo.kind = 'update' AND EXISTS (SELECT FROM settled WHERE left_behind)
    ), ended AS (
        INSERT INTO ended_writes (id, repository_id, storage, router_id, outcome, doubtful, generation)
        SELECT $1, repo.id, repo.primary_storage, $2, $4, $4 = 'settled', raised.generation FROM raised, repo
    )
    SELECT repo.id, repo.virtual_storage, repo.relative_path, repo.primary_storage, raised.generation
    FROM repo LEFT JOIN raised ON true"
);

const WRITE_DISCARD: &str =
    "DELETE FROM writes WHERE id = $1 AND router_id = $2 AND kind = 'update' RETURNING repository_id";

const WRITE_FIND: &str = "
    SELECT w.repository_id, w.kind, w.primary_storage, w.router_id, w.correlation_id, w.expires_at < now() AS expired,
           r.virtual_storage
    FROM writes w JOIN repositories r ON r.id = w.repository_id WHERE w.id = $1";

const WRITE_LIST_EXPIRED: &str =
    "SELECT id FROM writes WHERE expires_at < now() ORDER BY expires_at LIMIT $1";

const WRITE_RENEW: &str = "
    UPDATE writes SET expires_at = now() + $3 * interval '1 millisecond'
    WHERE id = ANY ($1) AND router_id = $2 RETURNING id";

const WRITE_FENCE_ALL: &str = "
    WITH lost AS (
        DELETE FROM writes WHERE repository_id = $1 RETURNING id, repository_id, primary_storage, router_id
    ), ended AS (
        INSERT INTO ended_writes (id, repository_id, storage, router_id, outcome, doubtful, generation)
        SELECT id, repository_id, primary_storage, router_id, 'settled', true, -1 FROM lost
    )
    SELECT count(*) FROM lost";

/// Replicas that were copied while a write that is still open ran.
const WRITE_TAINTED: &str = "
    SELECT p.storage FROM replicas p
    WHERE p.repository_id = $1 AND p.storage <> $2
      AND p.copied_at >= (SELECT min(w.begun_at) FROM writes w WHERE w.repository_id = $1)";

const WRITE_FIND_ENDED: &str = "
    SELECT repository_id, outcome, generation FROM ended_writes WHERE id = $1 AND router_id = $2";

const WRITE_LOCK_SETTLED: &str = "
    SELECT repository_id, storage FROM ended_writes
    WHERE id = $1 AND outcome = 'settled' AND (doubtful OR $2) FOR UPDATE";

const WRITE_DOUBT_AGAIN: &str = "
    UPDATE ended_writes SET doubtful = true, ended_at = now()
    WHERE id = $1 AND router_id = $2 AND outcome = 'settled'";

const WRITE_END_DOUBT: &str = "UPDATE ended_writes SET doubtful = false WHERE id = $1";

/// A replica that is behind is to be made again anyway: its turn comes when that was done.
const WRITE_LIST_DOUBTFUL: &str = "
    SELECT e.id FROM ended_writes e
    LEFT JOIN replicas p ON p.repository_id = e.repository_id AND p.storage = e.storage
    WHERE e.doubtful AND e.ended_at < now() - $1 * interval '1 millisecond'
      AND (p.storage IS NULL
           OR (NOT p.behind AND coalesce(p.copied_at, e.ended_at) < now() - $1 * interval '1 millisecond'))
    ORDER BY e.ended_at LIMIT $2";

const WRITE_PURGE_ENDED: &str = "
    DELETE FROM ended_writes WHERE id IN (
        SELECT id FROM ended_writes
        WHERE NOT doubtful AND outcome = $3 AND ended_at < now() - $1 * interval '1 millisecond' LIMIT $2)";

const WRITE_CANCEL_CREATION: &str = "
    WITH gone AS (
        DELETE FROM repositories WHERE id = $1 AND state = 'creating'
        RETURNING id, virtual_storage, replica_path
    )
    INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, correlation_id)
    SELECT 'cleanup', gone.id, gone.virtual_storage, gone.replica_path, $2, $3 FROM gone
    ON CONFLICT DO NOTHING";

const WRITE_COUNT: &str = "SELECT count(*) FROM writes";

/// What an intent says.
#[derive(Debug, Clone)]
pub(crate) struct Intent {
    pub(crate) id: Uuid,
    pub(crate) router_id: String,
    /// Full gRPC method.
    pub(crate) method: String,
    pub(crate) correlation_id: String,
    pub(crate) lease: Duration,
}

/// What became of an attempt to begin in one statement.
#[derive(Debug)]
pub(crate) enum Begun {
    /// The intent stands.
    Yes(Repository),
    /// The repository is there and the write needs a decision first.
    Undecided(Repository),
    NotFound,
}

/// A repository that is to be created, with its intent.
#[derive(Debug, Clone)]
pub(crate) struct Creation {
    pub(crate) repository: Repository,
    pub(crate) intent: Intent,
}

/// What became of a report that a write took effect.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Committed {
    /// Recorded. If a revocation is owed for that name, it comes before the confirmation.
    Yes(RevokedRoute),
    /// The storages named do not hold the primary.
    WithoutPrimary(String),
    /// No such intent, not this router's, or the primary has moved since.
    Unknown,
}

/// By whose word a write is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// Its router saw the node's answer.
    Router,
    /// Nobody's: it was settled.
    Nobody,
}

impl Word {
    fn as_str(self) -> &'static str {
        match self {
            Self::Router => "committed",
            Self::Nobody => "settled",
        }
    }
}

/// A write whose intent is gone.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct EndedWrite {
    pub(crate) repository_id: i64,
    outcome: String,
    pub(crate) generation: i64,
}

impl EndedWrite {
    /// Its router was to be told that it is recorded.
    pub(crate) fn is_committed(&self) -> bool {
        self.outcome == Word::Router.as_str()
    }
}

/// An intent as it stands in the database.
#[derive(Debug, Clone)]
pub(crate) struct OpenWrite {
    pub(crate) repository_id: RepositoryId,
    pub(crate) virtual_storage: tabularium_common::ids::VirtualStorageName,
    pub(crate) creation: bool,
    pub(crate) primary: StorageName,
    pub(crate) router_id: String,
    pub(crate) correlation_id: String,
    pub(crate) expired: bool,
}

#[derive(sqlx::FromRow)]
struct BegunRow {
    #[sqlx(flatten)]
    repository: RepositoryRow,
    begun: bool,
}

#[derive(sqlx::FromRow)]
struct CommittedRow {
    id: i64,
    virtual_storage: String,
    relative_path: String,
    primary_storage: String,
    generation: Option<i64>,
}

#[derive(sqlx::FromRow)]
struct OpenWriteRow {
    repository_id: i64,
    virtual_storage: String,
    kind: String,
    primary_storage: String,
    router_id: String,
    correlation_id: String,
    expired: bool,
}

pub(super) fn texts<'a>(names: impl IntoIterator<Item = &'a StorageName>) -> Vec<String> {
    names.into_iter().map(ToString::to_string).collect()
}

/// Begins a write when it can begin as things are: the caller may write here, and the primary is reachable and up to date.
pub(crate) async fn write_begin(
    pool: &PgPool,
    key: &RepositoryKey,
    intent: &Intent,
    sync_from_site: Option<&SiteName>,
    unreachable: &[StorageName],
) -> Result<Begun, sqlx::Error> {
    let row: Option<BegunRow> = sqlx::query_as(WRITE_BEGIN)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(intent.id)
        .bind(&intent.router_id)
        .bind(&intent.method)
        .bind(&intent.correlation_id)
        .bind(milliseconds(intent.lease))
        .bind(sync_from_site.map(SiteName::as_str))
        .bind(texts(unreachable))
        .fetch_optional(pool)
        .await?;
    let Some(BegunRow { repository, begun }) = row else { return Ok(Begun::NotFound) };
    let repository = repository.try_into()?;
    Ok(if begun { Begun::Yes(repository) } else { Begun::Undecided(repository) })
}

/// Adds the intent of a write to `repository`. The caller holds its lock and has decided that the write may begin.
pub(crate) async fn write_insert_in_txn(
    connection: &mut PgConnection,
    repository: &Repository,
    intent: &Intent,
) -> Result<(), sqlx::Error> {
    sqlx::query(WRITE_INSERT)
        .bind(intent.id)
        .bind(repository.id.0)
        .bind(repository.epoch.0)
        .bind(repository.primary.as_str())
        .bind(&intent.router_id)
        .bind(&intent.method)
        .bind(&intent.correlation_id)
        .bind(milliseconds(intent.lease))
        .execute(connection)
        .await
        .map(drop)
}

/// Reserves a name, invisibly, with the intent to create it. False: the name is taken.
pub(crate) async fn write_begin_creation(pool: &PgPool, creation: &Creation) -> Result<bool, sqlx::Error> {
    let Creation { repository, intent } = creation;
    sqlx::query_scalar(WRITE_BEGIN_CREATION)
        .bind(repository.id.0)
        .bind(repository.key.virtual_storage.as_str())
        .bind(repository.key.relative_path.as_str())
        .bind(repository.replica_path.as_str())
        .bind(repository.primary.as_str())
        .bind(repository.home_site.as_ref().map(SiteName::as_str))
        .bind(texts(repository.replicas.iter().map(|replica| &replica.storage)))
        .bind(intent.id)
        .bind(&intent.router_id)
        .bind(&intent.method)
        .bind(&intent.correlation_id)
        .bind(milliseconds(intent.lease))
        .fetch_one(pool)
        .await
}

/// Records that a write took effect on `storages`, and everything that follows from it. `word` says whose word it is.
pub(crate) async fn write_commit(
    executor: impl PgExecutor<'_>,
    id: Uuid,
    router_id: &str,
    storages: &[StorageName],
    word: Word,
) -> Result<Committed, sqlx::Error> {
    let row: Option<CommittedRow> = sqlx::query_as(WRITE_COMMIT)
        .bind(id)
        .bind(router_id)
        .bind(texts(storages))
        .bind(word.as_str())
        .fetch_optional(executor)
        .await?;
    let Some(row) = row else { return Ok(Committed::Unknown) };
    let Some(generation) = row.generation else {
        return Ok(if storages.iter().any(|storage| storage.as_str() == row.primary_storage) {
            Committed::Unknown
        } else {
            Committed::WithoutPrimary(row.primary_storage)
        });
    };
    let key = RepositoryKey {
        virtual_storage: parsed(&row.virtual_storage)?,
        relative_path: parsed(&row.relative_path)?,
    };
    Ok(Committed::Yes(RevokedRoute { key, id: RepositoryId(row.id), generation: Generation(generation) }))
}

/// Clears the intent of a write to an existing repository that did not happen. False: there is none.
pub(crate) async fn write_discard(pool: &PgPool, id: Uuid, router_id: &str) -> Result<bool, sqlx::Error> {
    let found: Option<i64> =
        sqlx::query_scalar(WRITE_DISCARD).bind(id).bind(router_id).fetch_optional(pool).await?;
    Ok(found.is_some())
}

/// An intent, if it stands.
pub(crate) async fn write_find(
    executor: impl PgExecutor<'_>,
    id: Uuid,
) -> Result<Option<OpenWrite>, sqlx::Error> {
    let row: Option<OpenWriteRow> = sqlx::query_as(WRITE_FIND).bind(id).fetch_optional(executor).await?;
    row.map(|row| {
        Ok(OpenWrite {
            repository_id: RepositoryId(row.repository_id),
            virtual_storage: parsed(&row.virtual_storage)?,
            creation: row.kind == "create",
            primary: parsed(&row.primary_storage)?,
            router_id: row.router_id,
            correlation_id: row.correlation_id,
            expired: row.expired,
        })
    })
    .transpose()
}

/// Intents that nobody renewed in time, the oldest first.
pub(crate) async fn write_list_expired(pool: &PgPool, limit: u32) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(WRITE_LIST_EXPIRED).bind(i64::from(limit)).fetch_all(pool).await
}

/// Keeps a router's intents; answers those that stand.
pub(crate) async fn write_renew(
    pool: &PgPool,
    ids: &[Uuid],
    router_id: &str,
    lease: Duration,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(WRITE_RENEW).bind(ids).bind(router_id).bind(milliseconds(lease)).fetch_all(pool).await
}

/// Ends every intent of a repository whose primary moves; answers how many there were. The caller holds its lock.
pub(crate) async fn write_fence_all_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(WRITE_FENCE_ALL).bind(id.0).fetch_one(connection).await
}

/// Replicas beside `primary` that may hold something of a write that is still open, because they were copied while it
/// ran. The caller holds the repository's lock.
pub(crate) async fn write_tainted_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    primary: &StorageName,
) -> Result<Vec<StorageName>, sqlx::Error> {
    let tainted: Vec<String> =
        sqlx::query_scalar(WRITE_TAINTED).bind(id.0).bind(primary.as_str()).fetch_all(connection).await?;
    tainted.iter().map(|storage| parsed(storage)).collect()
}

/// What became of a router's write whose intent is gone, if that is still known.
pub(crate) async fn write_find_ended(
    pool: &PgPool,
    id: Uuid,
    router_id: &str,
) -> Result<Option<EndedWrite>, sqlx::Error> {
    sqlx::query_as(WRITE_FIND_ENDED).bind(id).bind(router_id).fetch_optional(pool).await
}

/// The repository and the storage of a write that was settled and may have gone on since; with `late`, also of one that
/// was looked at again. Locked.
pub(crate) async fn write_lock_settled_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
    late: bool,
) -> Result<Option<(RepositoryId, StorageName)>, sqlx::Error> {
    let row: Option<(i64, String)> =
        sqlx::query_as(WRITE_LOCK_SETTLED).bind(id).bind(late).fetch_optional(connection).await?;
    row.map(|(id, storage)| Ok((RepositoryId(id), parsed(&storage)?))).transpose()
}

/// The router of a settled write has cut it off only now: its storage is to be looked at again.
pub(crate) async fn write_doubt_again(pool: &PgPool, id: Uuid, router_id: &str) -> Result<(), sqlx::Error> {
    sqlx::query(WRITE_DOUBT_AGAIN).bind(id).bind(router_id).execute(pool).await.map(drop)
}

/// Nothing of that write is expected to happen any more.
pub(crate) async fn write_end_doubt_in_txn(
    connection: &mut PgConnection,
    id: Uuid,
) -> Result<(), sqlx::Error> {
    sqlx::query(WRITE_END_DOUBT).bind(id).execute(connection).await.map(drop)
}

/// Writes settled longer ago than `age` whose storage is to be looked at again, the oldest first.
pub(crate) async fn write_list_doubtful(
    pool: &PgPool,
    age: Duration,
    limit: u32,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(WRITE_LIST_DOUBTFUL)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await
}

/// Forgets writes that ended by that word longer ago than `age`.
pub(crate) async fn write_purge_ended(
    pool: &PgPool,
    word: Word,
    age: Duration,
    limit: u32,
) -> Result<(), sqlx::Error> {
    sqlx::query(WRITE_PURGE_ENDED)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .bind(word.as_str())
        .execute(pool)
        .await
        .map(drop)
}

/// Gives the name of an unfinished creation back, with its intent, and owes the removal of what the primary may have.
pub(crate) async fn write_cancel_creation(
    executor: impl PgExecutor<'_>,
    id: RepositoryId,
    primary: &StorageName,
    correlation_id: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(WRITE_CANCEL_CREATION)
        .bind(id.0)
        .bind(primary.as_str())
        .bind(correlation_id)
        .execute(executor)
        .await
        .map(drop)
}

/// Intents that stand.
pub(crate) async fn write_count(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(WRITE_COUNT).fetch_one(pool).await
}
