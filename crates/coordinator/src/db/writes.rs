//! Intents: writes that a router said it would make and has not reported on yet. A repository has one at most, its write
//! ticket. How one that is reported becomes a generation is in `commits`; what is remembered of it then, in `ended_writes`.
//! What is beside the intent of a repository that does not exist yet, in `creations`.

use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, PgPool};
use tabularium_common::ids::{RepositoryId, SiteName, StorageName, VirtualStorageName};
use uuid::Uuid;

use super::{
    milliseconds, parsed,
    repositories::{RepositoryRow, repository_values},
};
use crate::repository::{Repository, RepositoryKey};

/// Takes the ticket of a repository whose primary can take the write, in one statement. While somebody has it nothing is
/// locked: those who wait ask often. Otherwise the rows are locked before they are judged, so that they are the newest
/// whatever the statement's snapshot shows: `SHARE` and `NO KEY UPDATE` follow a row to its last version, `KEY SHARE` does
/// not.
const WRITE_BEGIN: &str = concat!(
    "WITH seen AS (
        SELECT r.id, EXISTS (SELECT FROM writes w WHERE w.repository_id = r.id) AS held
        FROM repositories r WHERE r.virtual_storage = $1 AND r.relative_path = $2 AND r.state = 'ready'
    ), r AS (
        SELECT * FROM repositories
        WHERE id = (SELECT id FROM seen WHERE NOT held)
          AND virtual_storage = $1 AND relative_path = $2 AND state = 'ready'
        FOR NO KEY UPDATE
    ), copies AS (
        SELECT p.storage, p.generation, p.joining, p.copied_at FROM r JOIN replicas p ON p.repository_id = r.id FOR SHARE OF p
    ), rule AS (
        SELECT coalesce(r.write_quorum, v.write_quorum) AS policy FROM r JOIN virtual_storages v ON v.name = r.virtual_storage
    ), able AS (
        SELECT c.storage FROM copies c, r
        WHERE c.generation = r.generation AND c.storage <> ALL ($9)
          AND ($11::text[] IS NULL OR c.storage = ANY ($11))
    ), intent AS (
        INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id,
                            participants, expires_at)
        SELECT $3, r.id, 'update', r.epoch, r.primary_storage, $4, $5, $6,
               CASE WHEN $10 THEN ARRAY(SELECT storage FROM able ORDER BY storage <> r.primary_storage, storage)
                    ELSE ARRAY[r.primary_storage] END,
               now() + $7 * interval '1 millisecond'
        FROM r, rule
        WHERE r.home_site IS NOT DISTINCT FROM $8
          AND r.primary_storage IN (SELECT storage FROM able)
          AND (NOT $10 OR (SELECT count(*) FROM able)
                          >= CASE rule.policy WHEN 'available' THEN 1 ELSE (SELECT count(*) FROM copies WHERE NOT joining) / 2 + 1 END)
          AND NOT ($15 AND EXISTS (
              SELECT FROM copies c WHERE c.generation = r.generation AND c.storage <> ALL ($9) AND c.storage <> ALL ($11)
                                     AND c.copied_at > now() - $16 * interval '1 millisecond'))
          AND ($12::bigint IS NULL OR (r.id = $12 AND r.epoch = $13 AND r.primary_storage = $14))
        ON CONFLICT (repository_id) DO NOTHING
        RETURNING participants
    )
    SELECT ",
    repository_values!(),
    ", rule.policy AS write_quorum,
       ARRAY(SELECT c.storage FROM copies c ORDER BY c.storage) AS storages,
       ARRAY(SELECT c.generation FROM copies c ORDER BY c.storage) AS generations,
       (SELECT count(*) FROM copies c WHERE NOT c.joining) AS members,
       (SELECT participants FROM intent) AS participants
    FROM seen LEFT JOIN (r CROSS JOIN rule) ON true"
);

const WRITE_LEAVES_OUT_NEWCOMER: &str = "
    SELECT EXISTS (
        SELECT FROM replicas p JOIN repositories r ON r.id = p.repository_id
        WHERE r.id = $1 AND p.generation = r.generation AND p.storage <> ALL ($2) AND p.storage <> ALL ($3)
          AND p.copied_at > now() - $4 * interval '1 millisecond')";

const WRITE_IS_HELD: &str = "SELECT EXISTS (SELECT FROM writes WHERE repository_id = $1)";

const WRITE_INSERT: &str = "
    INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id, participants,
                        expires_at)
    VALUES ($1, $2, 'update', $3, $4, $5, $6, $7, $8, now() + $9 * interval '1 millisecond')";

const WRITE_DISCARD: &str = "
    DELETE FROM writes w USING repositories r
    WHERE w.id = $1 AND w.router_id = $2 AND w.kind = 'update' AND r.id = w.repository_id
    RETURNING r.virtual_storage, r.relative_path";

macro_rules! open_columns {
    () => {
        "w.id, w.repository_id, w.kind, w.primary_storage, w.router_id, w.method, w.correlation_id,
         CASE w.participants WHEN '{}' THEN ARRAY[w.primary_storage] ELSE w.participants END AS participants,
         r.virtual_storage, r.relative_path,
         CASE WHEN isfinite(w.settling_since) THEN (extract(epoch FROM w.settling_since) * 1000000)::bigint ELSE 0 END
             AS settling"
    };
}

const WRITE_FIND: &str = concat!(
    "SELECT ",
    open_columns!(),
    " FROM writes w JOIN repositories r ON r.id = w.repository_id WHERE w.id = $1"
);

/// From here on its router can neither renew nor commit it. One settles it at a time, and whoever takes longer than the
/// pause has given it up.
const WRITE_BEGIN_SETTLING: &str = concat!(
    "UPDATE writes w SET settling_since = now(), expires_at = least(w.expires_at, now())
     FROM repositories r
     WHERE w.id = $1 AND r.id = w.repository_id
       AND CASE WHEN $2::text IS NULL
                THEN w.expires_at <= now()
                     AND (w.settling_since IS NULL OR w.settling_since < now() - $3 * interval '1 millisecond')
                ELSE w.router_id = $2 AND w.settling_since IS NULL END
     RETURNING ",
    open_columns!()
);

const WRITE_LIST_EXPIRED: &str = "
    SELECT (extract(epoch FROM now()) * 1000000)::bigint, ARRAY(
        SELECT id FROM writes
        WHERE expires_at < now()
          AND (settling_since IS NULL OR settling_since < now() - $2 * interval '1 millisecond')
        ORDER BY expires_at LIMIT $1)";

/// After the database's clock was put back, leases of the dead would last as much longer.
const WRITE_SHORTEN: &str = "
    UPDATE writes SET expires_at = least(expires_at, now() + $1 * interval '1 millisecond'),
                      settling_since = least(settling_since, now())
    WHERE expires_at > now() + $1 * interval '1 millisecond' OR settling_since > now()";

const WRITE_RENEW: &str = "
    UPDATE writes SET expires_at = now() + $3 * interval '1 millisecond'
    WHERE id = ANY ($1) AND router_id = $2 AND settling_since IS NULL RETURNING id";

const WRITE_END: &str = "DELETE FROM writes WHERE id = $1";

const WRITE_COUNT: &str = "SELECT count(*) FROM writes WHERE kind <> 'repair'";

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

/// Whom a router asked before it had the ticket, and by which route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) repository_id: RepositoryId,
    pub(crate) epoch: tabularium_common::ids::Epoch,
    pub(crate) primary: StorageName,
    pub(crate) storages: Vec<StorageName>,
    /// It can ask anew, unseen by its client.
    pub(crate) can_ask_again: bool,
}

/// For how long a replica that has become up to date counts as a newcomer, which writes that were under way may have left
/// out. Longer than a write takes that can begin again.
const NEWCOMER: Duration = Duration::from_secs(10);

/// On what terms a write to an existing repository may begin.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    pub(crate) sync_from_site: Option<SiteName>,
    pub(crate) unreachable: Vec<StorageName>,
    /// The router counts the nodes' votes. One that does not tells the primary alone.
    pub(crate) votes: bool,
    pub(crate) asked: Option<Asked>,
}

/// What became of an attempt to begin in one statement.
#[derive(Debug)]
pub(crate) enum Begun {
    /// The intent stands; these take part, the primary first.
    Yes(Repository, Vec<StorageName>),
    /// The repository is there and the write needs a decision first.
    Undecided(Repository),
    /// Another write has the ticket.
    Held,
    NotFound,
}

/// What a write does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteKind {
    Create,
    Update,
    /// It keeps others from writing while a duty copies.
    Repair,
}

/// An intent as it stands in the database.
#[derive(Debug, Clone)]
pub(crate) struct OpenWrite {
    pub(crate) id: Uuid,
    pub(crate) repository_id: RepositoryId,
    pub(crate) key: RepositoryKey,
    pub(crate) kind: WriteKind,
    /// The primary first.
    pub(crate) participants: Vec<StorageName>,
    pub(crate) router_id: String,
    pub(crate) method: String,
    pub(crate) correlation_id: String,
    /// When somebody last began to settle it, in microseconds by the database's clock; 0: nobody has.
    pub(crate) settling: i64,
}

#[derive(sqlx::FromRow)]
struct BegunRow {
    #[sqlx(flatten)]
    repository: RepositoryRow,
    participants: Option<Vec<String>>,
}

#[derive(sqlx::FromRow)]
struct OpenWriteRow {
    id: Uuid,
    repository_id: i64,
    kind: String,
    router_id: String,
    method: String,
    correlation_id: String,
    participants: Vec<String>,
    virtual_storage: String,
    relative_path: String,
    settling: i64,
}

impl TryFrom<OpenWriteRow> for OpenWrite {
    type Error = sqlx::Error;
    fn try_from(row: OpenWriteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.id,
            repository_id: RepositoryId(row.repository_id),
            key: key(&row.virtual_storage, &row.relative_path)?,
            kind: match row.kind.as_str() {
                "create" => WriteKind::Create,
                "update" => WriteKind::Update,
                "repair" => WriteKind::Repair,
                other => return Err(sqlx::Error::Decode(format!("kind `{other}` of a write").into())),
            },
            participants: row.participants.iter().map(|storage| parsed(storage)).collect::<Result<_, _>>()?,
            router_id: row.router_id,
            method: row.method,
            correlation_id: row.correlation_id,
            settling: row.settling,
        })
    }
}

pub(super) fn key(virtual_storage: &str, relative_path: &str) -> Result<RepositoryKey, sqlx::Error> {
    Ok(RepositoryKey {
        virtual_storage: parsed::<VirtualStorageName>(virtual_storage)?,
        relative_path: parsed(relative_path)?,
    })
}

pub(super) fn texts<'a>(names: impl IntoIterator<Item = &'a StorageName>) -> Vec<String> {
    names.into_iter().map(ToString::to_string).collect()
}

/// Begins a write when it can begin as things are: the ticket is free, the caller may write here, and enough storages
/// that are up to date can take part, the primary among them.
pub(crate) async fn write_begin(
    pool: &PgPool,
    key: &RepositoryKey,
    intent: &Intent,
    terms: &Terms,
) -> Result<Begun, sqlx::Error> {
    use sqlx::{FromRow as _, Row as _};
    let asked = terms.asked.as_ref();
    let row = sqlx::query(WRITE_BEGIN)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(intent.id)
        .bind(&intent.router_id)
        .bind(&intent.method)
        .bind(&intent.correlation_id)
        .bind(milliseconds(intent.lease))
        .bind(terms.sync_from_site.as_ref().map(SiteName::as_str))
        .bind(texts(&terms.unreachable))
        .bind(terms.votes)
        .bind(asked.map(|asked| texts(&asked.storages)))
        .bind(asked.map(|asked| asked.repository_id.0))
        .bind(asked.map(|asked| asked.epoch.0))
        .bind(asked.map(|asked| asked.primary.as_str()))
        .bind(asked.is_some_and(|asked| asked.can_ask_again))
        .bind(milliseconds(NEWCOMER))
        .fetch_optional(pool)
        .await?;
    let Some(row) = row else { return Ok(Begun::NotFound) };
    if row.try_get::<Option<i64>, _>("id")?.is_none() {
        return Ok(Begun::Held);
    }
    let BegunRow { repository, participants } = BegunRow::from_row(&row)?;
    let repository = repository.try_into()?;
    Ok(match participants {
        Some(storages) => {
            let storages = storages.iter().map(|storage| parsed(storage)).collect::<Result<_, _>>()?;
            Begun::Yes(repository, storages)
        }
        None => Begun::Undecided(repository),
    })
}

/// Whether a replica has just become up to date that was not asked, though it can be reached. It would fall behind again
/// with every write that was under way when it came. The caller holds the repository's lock.
pub(crate) async fn write_leaves_out_newcomer_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    unreachable: &[StorageName],
    asked: &[StorageName],
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(WRITE_LEAVES_OUT_NEWCOMER)
        .bind(id.0)
        .bind(texts(unreachable))
        .bind(texts(asked))
        .bind(milliseconds(NEWCOMER))
        .fetch_one(connection)
        .await
}

/// Whether somebody has the repository's ticket. The caller holds its lock.
pub(crate) async fn write_is_held_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(WRITE_IS_HELD).bind(id.0).fetch_one(connection).await
}

/// Adds the intent of a write to `repository`. The caller holds its lock, has seen that nobody has its ticket, and has
/// decided that the write may begin.
pub(crate) async fn write_insert_in_txn(
    connection: &mut PgConnection,
    repository: &Repository,
    participants: &[StorageName],
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
        .bind(texts(participants))
        .bind(milliseconds(intent.lease))
        .execute(connection)
        .await
        .map(drop)
}

/// Clears the intent of a write to an existing repository that did not happen. `None`: there is none.
pub(crate) async fn write_discard(
    pool: &PgPool,
    id: Uuid,
    router_id: &str,
) -> Result<Option<RepositoryKey>, sqlx::Error> {
    let found: Option<(String, String)> =
        sqlx::query_as(WRITE_DISCARD).bind(id).bind(router_id).fetch_optional(pool).await?;
    found.map(|(virtual_storage, path)| key(&virtual_storage, &path)).transpose()
}

/// An intent, if it stands.
pub(crate) async fn write_find(
    executor: impl PgExecutor<'_>,
    id: Uuid,
) -> Result<Option<OpenWrite>, sqlx::Error> {
    let row: Option<OpenWriteRow> = sqlx::query_as(WRITE_FIND).bind(id).fetch_optional(executor).await?;
    row.map(OpenWrite::try_from).transpose()
}

/// Takes a write from its router, to be settled: because that router asked for it, or, without one, because it ran out and
/// nobody has begun to settle it within `pause`. `None`: it does not stand, or not so.
pub(crate) async fn write_begin_settling(
    pool: &PgPool,
    id: Uuid,
    router_id: Option<&str>,
    pause: Duration,
) -> Result<Option<OpenWrite>, sqlx::Error> {
    let row: Option<OpenWriteRow> = sqlx::query_as(WRITE_BEGIN_SETTLING)
        .bind(id)
        .bind(router_id)
        .bind(milliseconds(pause))
        .fetch_optional(pool)
        .await?;
    row.map(OpenWrite::try_from).transpose()
}

/// Intents that nobody renewed in time and nobody has begun to settle within `pause`, the oldest first; and what the
/// database's clock shows, in microseconds since the epoch.
pub(crate) async fn write_list_expired(
    pool: &PgPool,
    limit: u32,
    pause: Duration,
) -> Result<(i64, Vec<Uuid>), sqlx::Error> {
    sqlx::query_as(WRITE_LIST_EXPIRED).bind(i64::from(limit)).bind(milliseconds(pause)).fetch_one(pool).await
}

/// Has no intent stand for longer than `longest` without being renewed; answers how many would have.
pub(crate) async fn write_shorten(pool: &PgPool, longest: Duration) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(WRITE_SHORTEN).bind(milliseconds(longest)).execute(pool).await?;
    Ok(done.rows_affected())
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

/// Gives the ticket of a write back that changed nothing. The caller holds the repository's lock.
pub(crate) async fn write_end_in_txn(connection: &mut PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(WRITE_END).bind(id).execute(connection).await.map(drop)
}

/// Writes under way.
pub(crate) async fn write_count(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(WRITE_COUNT).fetch_one(pool).await
}
