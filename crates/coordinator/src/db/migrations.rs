//! Migrations: which of them a database has, and whether it can be written to at all.

use std::time::Duration;

use sqlx::Connection as _;
use time::OffsetDateTime;

use super::{DatabaseSettings, DbError, connect, options};

const IS_KEPT: &str = "SELECT to_regclass('_sqlx_migrations') IS NOT NULL";

const LIST: &str =
    "SELECT version, description, installed_on FROM _sqlx_migrations WHERE success ORDER BY version";

/// Gone with the transaction, whatever becomes of it.
const WRITE: &str = "CREATE TEMPORARY TABLE read_write (id integer) ON COMMIT DROP";

/// One step of the schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    /// Number and name, as its file has them.
    pub name: String,
    /// When the database got it. `None`: not yet.
    pub applied_at: Option<OffsetDateTime>,
    /// A later version of the program made it; this one does not know it.
    pub unknown: bool,
    /// What it does; empty when it is unknown.
    pub sql: String,
}

async fn within<T>(
    deadline: Duration,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, DbError> {
    match tokio::time::timeout(deadline, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(DbError::Unavailable(std::io::Error::from(std::io::ErrorKind::TimedOut).into())),
    }
}

fn name(version: i64, description: &str) -> String {
    format!("{version:04}_{}", description.replace(' ', "_"))
}

/// All migrations that this program or the database knows, in order.
pub(crate) async fn migration_list(
    settings: &DatabaseSettings,
    deadline: Duration,
) -> Result<Vec<Migration>, DbError> {
    let options = options(settings)?;
    let applied: Vec<(i64, String, OffsetDateTime)> = within(deadline, async {
        let mut connection = connect(options).await?;
        let kept: bool = sqlx::query_scalar(IS_KEPT).fetch_one(&mut connection).await?;
        let applied = if kept { sqlx::query_as(LIST).fetch_all(&mut connection).await? } else { Vec::new() };
        connection.close().await?;
        Ok(applied)
    })
    .await?;
    let known = sqlx::migrate!("./migrations");
    let mut all: Vec<_> = known
        .iter()
        .map(|migration| Migration {
            name: name(migration.version, &migration.description),
            applied_at: applied
                .iter()
                .find(|(version, ..)| *version == migration.version)
                .map(|(_, _, at)| *at),
            unknown: false,
            sql: migration.sql.as_str().to_owned(),
        })
        .collect();
    let unknown = applied.into_iter().filter(|(version, ..)| !known.version_exists(*version));
    all.extend(unknown.map(|(version, description, at)| Migration {
        name: name(version, &description),
        applied_at: Some(at),
        unknown: true,
        sql: String::new(),
    }));
    Ok(all)
}

/// Writes something that does not stay.
pub(crate) async fn write_and_undo(settings: &DatabaseSettings, deadline: Duration) -> Result<(), DbError> {
    let options = options(settings)?;
    within(deadline, async {
        let mut connection = connect(options).await?;
        let mut transaction = connection.begin().await?;
        sqlx::query(WRITE).execute(&mut *transaction).await?;
        sqlx::query("INSERT INTO read_write VALUES (1)").execute(&mut *transaction).await?;
        let _: i32 = sqlx::query_scalar("SELECT id FROM read_write").fetch_one(&mut *transaction).await?;
        transaction.rollback().await?;
        connection.close().await
    })
    .await
}
