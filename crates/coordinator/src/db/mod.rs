//! Everything that is in Postgres, one file per noun; no other module has SQL.
//!
//! Stored: virtual storages and storages, repositories with their replicas (the truth about who has what), the intent of
//! the write under way in each repository, the outbox of duties, the geo log with each subscriber's position, the registry of mirrors, who
//! coordinates and which routers they serve, and route revocations that are owed.
//!
//! Deliberately not stored: the health of nodes (each coordinator has its own opinion, in memory), which router caches
//! which route (dies with the session), anything about a single read, and git's data.
//!
//! Only coordinators write, several at once. A change to a repository and to its replicas happens under the lock of
//! its row; locks are taken in the order repository, intent, replica, duty. A statement that decides by what it reads
//! takes its snapshot after the lock or decides by columns of the locked rows.

pub(crate) mod assignments;
pub(crate) mod attempts;
pub(crate) mod checks;
pub(crate) mod commits;
pub(crate) mod coordinators;
pub(crate) mod copies;
pub(crate) mod creations;
pub(crate) mod ended_writes;
pub(crate) mod geo_log;
pub(crate) mod geo_registry;
pub(crate) mod history;
pub(crate) mod imports;
pub(crate) mod losses;
pub(crate) mod migrations;
pub(crate) mod outbox;
pub(crate) mod praefect;
pub(crate) mod publications;
pub(crate) mod rebuild;
pub(crate) mod replicas;
pub(crate) mod repositories;
pub(crate) mod revocations;
pub(crate) mod routers;
pub(crate) mod storages;
pub(crate) mod tickets;
pub(crate) mod verifications;
pub(crate) mod writes;

use std::{str::FromStr, time::Duration};

use secrecy::{ExposeSecret as _, SecretString};
use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, PgPool, Postgres, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use crate::database_tls::{DatabaseTls, settled};
use tabularium_common::ids::{StorageName, VirtualStorageName};

/// How long one statement may run.
const STATEMENT_TIMEOUT: &str = "5s";
/// How long a statement may wait for a lock.
const LOCK_TIMEOUT: &str = "2s";
/// How long a transaction may sit idle before the server ends it: a coordinator that hangs must not hold locks.
const IDLE_IN_TRANSACTION_TIMEOUT: &str = "10s";
/// How long a caller waits for a free connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a caller in a hurry waits before it asks whether the database is there at all, and how long for that answer.
const PROMPT: Duration = Duration::from_millis(500);
const THERE: Duration = Duration::from_millis(300);
/// A pooled connection that lay idle this long is tried before it is used; a busy one is not, which saves a round trip.
const TRY_AFTER_IDLE: Duration = Duration::from_secs(1);
/// How often a transaction is run at most when the server ends it for the sake of another.
const MAX_RUNS: u32 = 5;
/// Key of the advisory lock under which migrations run, beside the hash of the schema's name.
const MIGRATION_LOCK: i32 = 0x7ab1;

/// Where the database is.
pub(crate) struct DatabaseSettings {
    pub(crate) url: SecretString,
    pub(crate) password: Option<SecretString>,
    pub(crate) tls: DatabaseTls,
    pub(crate) schema: String,
    pub(crate) max_connections: u32,
}

/// What went wrong between us and Postgres.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DbError {
    /// It cannot be reached, is shutting down, or is too busy; the same call may work later.
    #[error("database unavailable: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// It refused what we asked: a defect, or a database that is not ours.
    #[error("database: {0}")]
    Refused(#[source] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
}

impl From<sqlx::Error> for DbError {
    fn from(error: sqlx::Error) -> Self {
        if is_outage(&error) || is_contention(&error) {
            Self::Unavailable(error)
        } else {
            Self::Refused(error)
        }
    }
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).map(std::borrow::Cow::into_owned)
}

/// Connection lost (08), too many connections (53300), shutting down or starting (57P), cancelled by a timeout (57014).
fn is_outage(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        _ => sqlstate(error).is_some_and(|code| {
            code.starts_with("08")
                || code.starts_with("57P")
                || code == "53300"
                || code == "57014"
                || code == "25P03"
        }),
    }
}

/// Serialisation failure, deadlock, lock not available.
fn is_contention(error: &sqlx::Error) -> bool {
    sqlstate(error).is_some_and(|code| matches!(code.as_str(), "40001" | "40P01" | "55P03"))
}

/// A value that violates a unique index.
pub(crate) fn is_duplicate(error: &sqlx::Error) -> bool {
    sqlstate(error).is_some_and(|code| code == "23505")
}

/// Parses a checked text from a column back into its type.
pub(crate) fn parsed<T>(text: &str) -> Result<T, sqlx::Error>
where
    T: FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

/// A duration as the milliseconds that statements take.
pub(crate) fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Runs a statement about up to `limit` replicas of a storage, or of a whole virtual storage; answers how many it changed.
async fn of_storage(
    pool: &PgPool,
    statement: &'static str,
    virtual_storage: &VirtualStorageName,
    storage: Option<&StorageName>,
    limit: u32,
) -> Result<u64, sqlx::Error> {
    sqlx::query(statement)
        .bind(virtual_storage.as_str())
        .bind(storage.map_or("", StorageName::as_str))
        .bind(i64::from(limit))
        .execute(pool)
        .await
        .map(|done| done.rows_affected())
}

/// The pool, and the only place where a transaction begins.
#[derive(Clone)]
pub(crate) struct Db {
    pool: PgPool,
}

impl Db {
    /// A pool that connects when it is first used.
    pub(crate) async fn open(settings: &DatabaseSettings) -> Result<Self, DbError> {
        let pool = PgPoolOptions::new()
            .max_connections(settings.max_connections)
            .min_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .before_acquire(|connection, meta| {
                Box::pin(async move {
                    if meta.idle_for >= TRY_AFTER_IDLE && connection.ping().await.is_err() {
                        return Ok(false);
                    }
                    Ok(true)
                })
            })
            .connect_lazy_with(settled(options(settings)?).await?);
        Ok(Self { pool })
    }

    /// For a single statement.
    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Begins a transaction. Inside [`Db::retrying`] only.
    pub(crate) async fn begin(&self) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        self.pool.begin().await
    }

    /// Runs `work`, a transaction or a single statement, again while the server ends it for the sake of another, at
    /// most [`MAX_RUNS`] times.
    pub(crate) async fn retrying<T, F, Fut>(&self, mut work: F) -> Result<T, DbError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        let mut runs = 1;
        loop {
            match work().await {
                Err(error) if is_contention(&error) && runs < MAX_RUNS => {
                    tracing::debug!(%error, runs, "transaction is run again");
                    let pause = rand::random_range(1..=5) * u64::from(runs);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                    runs += 1;
                }
                result => return result.map_err(DbError::from),
            }
        }
    }

    /// As [`Db::retrying`], for callers that would rather hear that the database is gone than wait for it: when the work
    /// takes long, the database is asked whether it is there, and the work is given up when it is not. It may be done
    /// nevertheless, once the database is back.
    pub(crate) async fn promptly<T, F, Fut>(&self, work: F) -> Result<T, DbError>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, sqlx::Error>>,
    {
        let mut working = std::pin::pin!(self.retrying(work));
        loop {
            match tokio::time::timeout(PROMPT, &mut working).await {
                Ok(done) => return done,
                Err(_) if self.is_there().await => {}
                Err(_) => {
                    return Err(DbError::Unavailable(
                        std::io::Error::from(std::io::ErrorKind::TimedOut).into(),
                    ));
                }
            }
        }
    }

    /// Asks on a connection of its own: the pool's may all be waiting.
    async fn is_there(&self) -> bool {
        let asking = async {
            let mut connection = PgConnection::connect_with(&self.pool.connect_options()).await?;
            connection.ping().await?;
            connection.close().await
        };
        matches!(tokio::time::timeout(THERE, asking).await, Ok(Ok(())))
    }

    /// Closes every connection.
    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

fn options(settings: &DatabaseSettings) -> Result<PgConnectOptions, DbError> {
    let mut options: PgConnectOptions = settings.url.expose_secret().parse()?;
    if let Some(password) = &settings.password {
        options = options.password(password.expose_secret());
    }
    Ok(settings.tls.apply(options).application_name("tabularium-coordinator").options([
        ("search_path", settings.schema.as_str()),
        ("statement_timeout", STATEMENT_TIMEOUT),
        ("lock_timeout", LOCK_TIMEOUT),
        ("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION_TIMEOUT),
    ]))
}

/// One connection outside the pool.
async fn connect(options: PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    PgConnection::connect_with(&settled(options).await?).await
}

/// Asks the database whether it is there, within `deadline`. True: so is our schema.
pub(crate) async fn ping(settings: &DatabaseSettings, deadline: Duration) -> Result<bool, DbError> {
    let asking = async {
        let mut connection = connect(options(settings)?).await?;
        let there: bool = sqlx::query_scalar("SELECT to_regclass('repositories') IS NOT NULL")
            .fetch_one(&mut connection)
            .await?;
        connection.close().await?;
        Ok(there)
    };
    let late = || DbError::Unavailable(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
    tokio::time::timeout(deadline, asking).await.unwrap_or_else(|_| Err(late()))
}

/// Brings the schema up to date. Of several coordinators one does it and the others wait.
pub(crate) async fn migrate(settings: &DatabaseSettings) -> Result<(), DbError> {
    let mut connection = connect(options(settings)?).await?;
    // A migration may take its time, and so may the one we wait for.
    sqlx::query("SELECT set_config('statement_timeout', '0', false), set_config('lock_timeout', '0', false)")
        .execute(&mut connection)
        .await?;
    sqlx::query("SELECT pg_advisory_lock($1, hashtext($2))")
        .bind(MIGRATION_LOCK)
        .bind(&settings.schema)
        .execute(&mut connection)
        .await?;
    // The configuration admits plain identifiers only.
    sqlx::query(AssertSqlSafe(format!("CREATE SCHEMA IF NOT EXISTS {}", settings.schema)))
        .execute(&mut connection)
        .await?;
    let mut migrations = sqlx::migrate!("./migrations");
    // A newer binary may have been here: its additions suit this one too.
    migrations.set_ignore_missing(true);
    migrations.run(&mut connection).await?;
    Ok(connection.close().await?)
}
