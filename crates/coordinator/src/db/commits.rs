//! What a write that took effect leads to: the next generation, who has it, who lacks it, what is owed for that.

use sqlx::PgExecutor;
use tabularium_common::ids::{Epoch, Generation, RepositoryId, StorageName};
use uuid::Uuid;

use super::{
    ended_writes::Word,
    parsed,
    writes::{key, texts},
};
use crate::repository::RevokedRoute;

/// Everything follows from the intent's deletion, which happens once, under the repository's lock. Repository and replicas
/// are judged on their newest rows: they are locked first. Revocations that are owed already are judged on the
/// statement's snapshot, which is younger than this write's ticket and therefore than the write before it.
const COMMIT: &str = "
    WITH repo AS (
        SELECT r.id, r.virtual_storage, r.relative_path, r.replica_path, r.home_site, r.generation, r.primary_storage,
               coalesce(r.write_quorum, v.write_quorum) AS policy, w.kind, w.correlation_id,
               CASE w.participants WHEN '{}' THEN ARRAY[w.primary_storage] ELSE w.participants END AS participants
        FROM writes w
        JOIN repositories r ON r.id = w.repository_id AND r.epoch = w.epoch
        JOIN virtual_storages v ON v.name = r.virtual_storage
        WHERE w.id = $1 AND w.router_id = $2 AND w.kind <> 'repair'
        FOR NO KEY UPDATE OF r
    ), copies AS (
        SELECT p.storage, p.generation, p.joining FROM repo JOIN replicas p ON p.repository_id = repo.id FOR NO KEY UPDATE OF p
    ), took AS (
        SELECT c.storage FROM copies c, repo
        WHERE c.storage = ANY ($3)
          AND (repo.kind = 'create'
               OR c.generation = repo.generation AND ($4 = 'settled' OR c.storage = ANY (repo.participants)))
    ), judged AS (
        SELECT (SELECT count(*) FROM took) AS committed,
               CASE repo.policy WHEN 'available' THEN 1 ELSE (SELECT count(*) FROM copies WHERE NOT joining) / 2 + 1 END AS quorum,
               (SELECT t.storage FROM took t
                ORDER BY t.storage <> repo.primary_storage, array_position($3, t.storage) LIMIT 1) AS primary_storage
        FROM repo
    ), intent AS (
        DELETE FROM writes w USING repo, judged
        WHERE w.id = $1 AND (w.settling_since IS NULL OR $4 = 'settled')
          AND CASE WHEN $4 = 'settled' THEN judged.committed > 0
                   WHEN $5 THEN judged.primary_storage = repo.primary_storage
                   ELSE judged.committed >= judged.quorum END
        RETURNING w.id
    ), raised AS (
        UPDATE repositories r
        SET generation = r.generation + 1, state = 'ready', written_at = now(), primary_storage = judged.primary_storage,
            epoch = r.epoch + (r.primary_storage <> judged.primary_storage)::integer
        FROM intent, repo, judged WHERE r.id = repo.id
        RETURNING r.id, r.generation, r.epoch, r.primary_storage
    ), settled AS (
        UPDATE replicas p
        SET generation = CASE WHEN p.storage IN (SELECT storage FROM took) THEN raised.generation
                              WHEN $4 = 'settled' AND p.storage = ANY (repo.participants) THEN -1
                              ELSE p.generation END,
            behind = p.storage NOT IN (SELECT storage FROM took)
        FROM raised, repo WHERE p.repository_id = raised.id
        RETURNING p.storage, p.behind
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
        FROM raised, repo
        WHERE repo.kind = 'update'
          AND EXISTS (SELECT FROM copies c
                      WHERE (c.generation = repo.generation OR c.storage = ANY (repo.participants))
                        AND c.storage NOT IN (SELECT storage FROM took))
        RETURNING id
    ), ended AS (
        INSERT INTO ended_writes (id, repository_id, storage, router_id, outcome, doubtful, generation, epoch)
        SELECT $1, repo.id, raised.primary_storage, $2, $4, $6, raised.generation, raised.epoch FROM raised, repo
    )
    SELECT repo.id, repo.virtual_storage, repo.relative_path, repo.primary_storage AS was_primary, judged.committed,
           judged.quorum, raised.generation, raised.epoch, raised.primary_storage,
           ARRAY(SELECT id FROM owed)
           || ARRAY(SELECT v.id FROM revocations v
                    WHERE v.virtual_storage = repo.virtual_storage AND v.relative_path = repo.relative_path) AS owed
    FROM repo CROSS JOIN judged LEFT JOIN raised ON true";

/// What is reported of a write.
#[derive(Debug, Clone)]
pub(crate) struct Report<'a> {
    pub(crate) id: Uuid,
    pub(crate) router_id: &'a str,
    /// Those that have it; one of them is to be the primary when the present one is not among them, the first that can.
    pub(crate) storages: &'a [StorageName],
    /// The nodes did not vote on it: the primary's word is enough.
    pub(crate) unvoted: bool,
    pub(crate) word: Word,
    /// The nodes may go on with it: they are to be looked at again.
    pub(crate) doubtful: bool,
}

/// A write that is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) generation: Generation,
    pub(crate) epoch: Epoch,
    pub(crate) primary: StorageName,
}

/// What became of a report that a write took effect.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Committed {
    Yes {
        recorded: Recorded,
        primary_moved: bool,
        route: RevokedRoute,
        /// Revocations of that route that are to be carried out before anybody is told.
        owed: Vec<i64>,
    },
    /// The storages named do not hold the primary, and nobody voted.
    WithoutPrimary(String),
    /// Fewer of the storages named were up to date than the quorum.
    TooFew { committed: usize, quorum: usize },
    /// No such intent, not this router's, or it is being settled.
    Unknown,
}

#[derive(sqlx::FromRow)]
struct CommittedRow {
    id: i64,
    virtual_storage: String,
    relative_path: String,
    was_primary: String,
    committed: i64,
    quorum: i64,
    generation: Option<i64>,
    epoch: Option<i64>,
    primary_storage: Option<String>,
    owed: Vec<i64>,
}

/// Records what a write did, and everything that follows from it.
pub(crate) async fn commit(
    executor: impl PgExecutor<'_>,
    report: &Report<'_>,
) -> Result<Committed, sqlx::Error> {
    let row: Option<CommittedRow> = sqlx::query_as(COMMIT)
        .bind(report.id)
        .bind(report.router_id)
        .bind(texts(report.storages))
        .bind(report.word.as_str())
        .bind(report.unvoted)
        .bind(report.doubtful)
        .fetch_optional(executor)
        .await?;
    let Some(row) = row else { return Ok(Committed::Unknown) };
    let (Some(generation), Some(epoch), Some(primary)) = (row.generation, row.epoch, &row.primary_storage)
    else {
        let (committed, quorum) = (row.committed.unsigned_abs(), row.quorum.unsigned_abs());
        let has_primary = report.storages.iter().any(|storage| storage.as_str() == row.was_primary);
        return Ok(if report.word == Word::Router && report.unvoted && !has_primary {
            Committed::WithoutPrimary(row.was_primary)
        } else if report.word == Word::Router && !report.unvoted && committed < quorum {
            let count = |number| usize::try_from(number).unwrap_or(usize::MAX);
            Committed::TooFew { committed: count(committed), quorum: count(quorum) }
        } else {
            Committed::Unknown
        });
    };
    let generation = Generation(generation);
    let route = RevokedRoute {
        key: key(&row.virtual_storage, &row.relative_path)?,
        id: RepositoryId(row.id),
        generation,
    };
    let primary_moved = *primary != row.was_primary;
    let recorded = Recorded { generation, epoch: Epoch(epoch), primary: parsed(primary)? };
    Ok(Committed::Yes { recorded, primary_moved, route, owed: row.owed })
}
