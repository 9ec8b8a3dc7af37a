//! Duties: what is owed to replicas and sites, and how far it is. How the bus hears of them is in `publications`, what
//! workers make of them in `attempts`.
//!
//! `pending` waits for the relay, `published` for a worker (its message is on the bus, new or put back), `started` is with
//! a worker; it ends `done`, or `parked` until an operator looks.
//!
//! For one (kind, repository, target) at most one duty waits, one is started and one is parked.

use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, PgPool};
use tabularium_common::ids::{Epoch, Generation, ReplicaPath, RepositoryId, SiteName, StorageName};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{milliseconds, parsed};
use crate::repository::Repository;

macro_rules! duty_columns {
    () => {
        "id, kind, repository_id, virtual_storage, replica_path, target, state, publications, attempts, failures, worker_id,
         generation, epoch, last_error, correlation_id, created_at, next_attempt_at, started_at, copy_attempt, source,
         round_started_at, under_ticket, rounds, tickets_lost, bad_sources,
         lease_until < clock_timestamp() AS lease_over,
         (extract(epoch FROM clock_timestamp() - round_started_at) * 1000)::bigint AS round_milliseconds"
    };
}
pub(super) use duty_columns;

const DUTY_OWE: &str = "
    INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, correlation_id)
    VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING";

const DUTY_FIND: &str = concat!("SELECT ", duty_columns!(), " FROM duties WHERE id = $1");
const DUTY_LOCK: &str = concat!("SELECT ", duty_columns!(), " FROM duties WHERE id = $1 FOR UPDATE");

const DUTY_DROP_REPLICATION: &str = "
    UPDATE duties SET state = 'done', finished_at = now(), last_error = 'the replica was given up meanwhile'
    WHERE kind = 'replicate' AND repository_id = $1 AND target = $2 AND state IN ('pending', 'published', 'started')";

/// Replicas that are behind, that another replica could mend, and for which nothing is owed. A replica whose duty is
/// parked is left alone until it is written again or an operator looks. Repositories with few good replicas come first.
const DUTY_OWE_BEHIND: &str = "
    INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, priority)
    SELECT 'replicate', r.id, r.virtual_storage, r.replica_path, p.storage,
           CASE WHEN (SELECT count(*) FILTER (WHERE q.behind) * 2 >= count(*) FROM replicas q
                      WHERE q.repository_id = r.id)
                THEN 0 ELSE 1 END
    FROM replicas p JOIN repositories r ON r.id = p.repository_id
    WHERE p.behind AND r.state = 'ready'
      AND EXISTS (SELECT FROM replicas q WHERE q.repository_id = p.repository_id AND q.generation > p.generation)
      AND NOT EXISTS (SELECT FROM duties d WHERE d.kind = 'replicate' AND d.repository_id = p.repository_id
                                             AND d.target = p.storage AND d.state <> 'done')
    LIMIT $1
    ON CONFLICT DO NOTHING";

const DUTY_OWE_NOTIFICATIONS: &str = "
    INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target)
    SELECT 'notify', 0, '', '', s.site
    FROM subscribers s
    WHERE s.site = ANY ($1)
      AND (EXISTS (SELECT FROM geo_log WHERE position > s.notified_position)
           OR EXISTS (SELECT FROM geo_log WHERE position IS NULL))
      AND NOT EXISTS (SELECT FROM duties d WHERE d.kind = 'notify' AND d.repository_id = 0 AND d.target = s.site
                                             AND d.state IN ('pending', 'published', 'started', 'parked'))
    ON CONFLICT DO NOTHING";

const DUTY_PURGE: &str = "
    DELETE FROM duties WHERE id IN (
        SELECT id FROM duties WHERE state = 'done' AND finished_at < now() - $1 * interval '1 millisecond' LIMIT $2)";

const DUTY_LIST: &str = concat!(
    "SELECT d.*, coalesce(r.relative_path, '') AS relative_path
     FROM (SELECT ",
    duty_columns!(),
    " FROM duties WHERE (state = $1) OR ($1 = '' AND state <> 'done') ORDER BY created_at DESC LIMIT $2) d
     LEFT JOIN repositories r ON r.id = d.repository_id
     ORDER BY d.created_at DESC"
);

const DUTY_COUNT: &str = "SELECT state, count(*) FROM duties WHERE state <> 'done' GROUP BY state";

/// What kind of work a duty is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DutyKind {
    Replicate,
    Cleanup,
    Notify,
}

impl DutyKind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Replicate => "replicate",
            Self::Cleanup => "cleanup",
            Self::Notify => "notify",
        }
    }
}

/// How far a duty is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DutyState {
    Pending,
    Published,
    Started,
    Done,
    Parked,
}

impl DutyState {
    pub(crate) const ALL: [Self; 5] =
        [Self::Pending, Self::Published, Self::Started, Self::Done, Self::Parked];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Published => "published",
            Self::Started => "started",
            Self::Done => "done",
            Self::Parked => "parked",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// A duty as it stands.
#[derive(Debug, Clone)]
pub(crate) struct Duty {
    pub(crate) id: Uuid,
    pub(crate) kind: DutyKind,
    /// 0 for a notification.
    pub(crate) repository_id: RepositoryId,
    /// Empty for a notification.
    pub(crate) virtual_storage: String,
    /// Empty for a notification.
    pub(crate) replica_path: String,
    /// A storage, or the site to notify.
    pub(crate) target: String,
    pub(crate) state: DutyState,
    pub(crate) publications: u32,
    pub(crate) attempts: u32,
    pub(crate) failures: u32,
    pub(crate) worker_id: Option<String>,
    /// Generation of the source when the present attempt started.
    pub(crate) generation: Option<Generation>,
    /// Epoch of the repository when the present attempt started.
    pub(crate) epoch: Option<Epoch>,
    pub(crate) last_error: String,
    pub(crate) correlation_id: String,
    pub(crate) created_at: OffsetDateTime,
    pub(crate) next_attempt_at: OffsetDateTime,
    pub(crate) started_at: Option<OffsetDateTime>,
    /// The number of the present copy; every round has one of its own.
    pub(crate) copy_attempt: Option<i64>,
    /// Where the present round copies from.
    pub(crate) source: Option<StorageName>,
    pub(crate) round_started_at: Option<OffsetDateTime>,
    /// How long the present round has been running.
    pub(crate) round_took: Duration,
    /// The present round runs under the repository's write ticket.
    pub(crate) under_ticket: bool,
    /// Rounds begun since its worker started it.
    pub(crate) rounds: u32,
    /// Tickets given back unused since then.
    pub(crate) tickets_lost: u32,
    /// Sources from which a copy failed.
    pub(crate) bad_sources: Vec<StorageName>,
    /// `None`: it is not held under a lease.
    pub(crate) lease_over: Option<bool>,
}

#[derive(sqlx::FromRow)]
pub(super) struct DutyRow {
    id: Uuid,
    kind: String,
    repository_id: i64,
    virtual_storage: String,
    replica_path: String,
    target: String,
    state: String,
    publications: i32,
    attempts: i32,
    failures: i32,
    worker_id: Option<String>,
    generation: Option<i64>,
    epoch: Option<i64>,
    last_error: String,
    correlation_id: String,
    created_at: OffsetDateTime,
    next_attempt_at: OffsetDateTime,
    started_at: Option<OffsetDateTime>,
    copy_attempt: Option<i64>,
    source: Option<String>,
    round_started_at: Option<OffsetDateTime>,
    under_ticket: bool,
    rounds: i32,
    tickets_lost: i32,
    bad_sources: Vec<String>,
    lease_over: Option<bool>,
    round_milliseconds: Option<i64>,
}

fn unknown(what: &str, found: &str) -> sqlx::Error {
    sqlx::Error::Decode(format!("{what} `{found}` of a duty").into())
}

impl TryFrom<DutyRow> for Duty {
    type Error = sqlx::Error;
    fn try_from(row: DutyRow) -> Result<Self, sqlx::Error> {
        let kind = match row.kind.as_str() {
            "replicate" => DutyKind::Replicate,
            "cleanup" => DutyKind::Cleanup,
            "notify" => DutyKind::Notify,
            other => return Err(unknown("kind", other)),
        };
        Ok(Self {
            id: row.id,
            kind,
            repository_id: RepositoryId(row.repository_id),
            virtual_storage: row.virtual_storage,
            replica_path: row.replica_path,
            target: row.target,
            state: DutyState::parse(&row.state).ok_or_else(|| unknown("state", &row.state))?,
            publications: row.publications.unsigned_abs(),
            attempts: row.attempts.unsigned_abs(),
            failures: row.failures.unsigned_abs(),
            worker_id: row.worker_id,
            generation: row.generation.map(Generation),
            epoch: row.epoch.map(Epoch),
            last_error: row.last_error,
            correlation_id: row.correlation_id,
            created_at: row.created_at,
            next_attempt_at: row.next_attempt_at,
            started_at: row.started_at,
            copy_attempt: row.copy_attempt,
            source: row.source.as_deref().map(parsed).transpose()?,
            round_started_at: row.round_started_at,
            round_took: Duration::from_millis(
                row.round_milliseconds.unwrap_or_default().max(0).unsigned_abs(),
            ),
            under_ticket: row.under_ticket,
            rounds: row.rounds.unsigned_abs(),
            tickets_lost: row.tickets_lost.unsigned_abs(),
            bad_sources: row.bad_sources.iter().map(|storage| parsed(storage)).collect::<Result<_, _>>()?,
            lease_over: row.lease_over,
        })
    }
}

pub(super) fn duties(rows: Vec<DutyRow>) -> Result<Vec<Duty>, sqlx::Error> {
    rows.into_iter().map(Duty::try_from).collect()
}

async fn owe(
    executor: impl PgExecutor<'_>,
    kind: DutyKind,
    id: RepositoryId,
    (virtual_storage, replica_path): (&str, &str),
    target: &str,
    correlation_id: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(DUTY_OWE)
        .bind(kind.as_str())
        .bind(id.0)
        .bind(virtual_storage)
        .bind(replica_path)
        .bind(target)
        .bind(correlation_id)
        .execute(executor)
        .await
        .map(drop)
}

/// Owes a storage the newest state of a repository, unless that is owed already.
pub(crate) async fn duty_owe_copy(
    executor: impl PgExecutor<'_>,
    repository: &Repository,
    target: &StorageName,
    correlation_id: &str,
) -> Result<(), sqlx::Error> {
    let place = (repository.key.virtual_storage.as_str(), repository.replica_path.as_str());
    owe(executor, DutyKind::Replicate, repository.id, place, target.as_str(), correlation_id).await
}

/// Owes the removal of what the work of `duty` may have left on its target after the repository went.
pub(crate) async fn duty_owe_cleanup_after(
    executor: impl PgExecutor<'_>,
    duty: &Duty,
) -> Result<(), sqlx::Error> {
    let place = (duty.virtual_storage.as_str(), duty.replica_path.as_str());
    owe(executor, DutyKind::Cleanup, duty.repository_id, place, &duty.target, &duty.correlation_id).await
}

/// A duty as it stands, not locked.
pub(crate) async fn duty_find(executor: impl PgExecutor<'_>, id: Uuid) -> Result<Option<Duty>, sqlx::Error> {
    let row: Option<DutyRow> = sqlx::query_as(DUTY_FIND).bind(id).fetch_optional(executor).await?;
    row.map(Duty::try_from).transpose()
}

/// Locks a duty.
pub(crate) async fn duty_lock(connection: &mut PgConnection, id: Uuid) -> Result<Option<Duty>, sqlx::Error> {
    let row: Option<DutyRow> = sqlx::query_as(DUTY_LOCK).bind(id).fetch_optional(connection).await?;
    row.map(Duty::try_from).transpose()
}

/// Ends what is owed or under way for a replica of which nothing is known any more: a result that still arrives is void.
pub(crate) async fn duty_drop_replication_in_txn(
    connection: &mut PgConnection,
    id: RepositoryId,
    target: &StorageName,
) -> Result<(), sqlx::Error> {
    sqlx::query(DUTY_DROP_REPLICATION).bind(id.0).bind(target.as_str()).execute(connection).await.map(drop)
}

/// Owes copies to replicas that are behind and forgotten; answers to how many.
pub(crate) async fn duty_owe_behind(pool: &PgPool, limit: u32) -> Result<u64, sqlx::Error> {
    sqlx::query(DUTY_OWE_BEHIND).bind(i64::from(limit)).execute(pool).await.map(|done| done.rows_affected())
}

/// Owes a notification to each of `sites` that has not seen the end of the geo log; answers to how many.
pub(crate) async fn duty_owe_notifications(pool: &PgPool, sites: &[SiteName]) -> Result<u64, sqlx::Error> {
    let sites: Vec<&str> = sites.iter().map(SiteName::as_str).collect();
    sqlx::query(DUTY_OWE_NOTIFICATIONS).bind(sites).execute(pool).await.map(|done| done.rows_affected())
}

/// Removes duties done longer ago than `age`; answers how many.
pub(crate) async fn duty_purge(pool: &PgPool, age: Duration, limit: u32) -> Result<u64, sqlx::Error> {
    sqlx::query(DUTY_PURGE)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .execute(pool)
        .await
        .map(|done| done.rows_affected())
}

/// A duty with the present name of its repository; empty when that is gone.
#[derive(Debug, Clone)]
pub(crate) struct ListedDuty {
    pub(crate) duty: Duty,
    pub(crate) relative_path: String,
}

#[derive(sqlx::FromRow)]
struct ListedRow {
    #[sqlx(flatten)]
    duty: DutyRow,
    relative_path: String,
}

/// Duties in `state`, or all that are not done, the newest first.
pub(crate) async fn duty_list(
    pool: &PgPool,
    state: Option<DutyState>,
    limit: u32,
) -> Result<Vec<ListedDuty>, sqlx::Error> {
    let rows: Vec<ListedRow> = sqlx::query_as(DUTY_LIST)
        .bind(state.map_or("", DutyState::as_str))
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    rows.into_iter()
        .map(|row| Ok(ListedDuty { duty: row.duty.try_into()?, relative_path: row.relative_path }))
        .collect()
}

/// How many duties are in each state, done ones not counted.
pub(crate) async fn duty_count(pool: &PgPool) -> Result<Vec<(DutyState, i64)>, sqlx::Error> {
    let rows: Vec<(String, i64)> = sqlx::query_as(DUTY_COUNT).fetch_all(pool).await?;
    rows.into_iter()
        .map(|(state, count)| Ok((DutyState::parse(&state).ok_or_else(|| unknown("state", &state))?, count)))
        .collect()
}

/// The target of a duty about a repository.
pub(crate) fn target_storage(duty: &Duty) -> Result<StorageName, sqlx::Error> {
    parsed(&duty.target)
}

/// The path of a duty about a repository.
pub(crate) fn target_path(duty: &Duty) -> Result<ReplicaPath, sqlx::Error> {
    parsed(&duty.replica_path)
}
