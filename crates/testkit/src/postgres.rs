//! Databases for tests.

use std::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};

use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
pub use tabularium_cli::local::postgres::{Durability, PostgresServer};
use tokio::sync::OnceCell;

/// Names a server to use instead of starting one. Its user must be allowed to create databases.
const URL_VARIABLE: &str = "TABULARIUM_TEST_POSTGRES_URL";

/// Never dropped: when the test process ends, however it ends, the server's watcher stops it and removes its data.
static SHARED: OnceCell<PostgresServer> = OnceCell::const_new();
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A Postgres server to make databases on.
#[derive(Debug)]
pub struct Postgres {
    /// URL of the server with the name of a database that exists.
    server: String,
    given: bool,
    databases: Mutex<Vec<String>>,
}

impl Postgres {
    /// The server that the environment names, or the one that all tests of this process share, started on first use.
    pub async fn start() -> Self {
        if let Ok(server) = std::env::var(URL_VARIABLE) {
            return Self { server, given: true, databases: Mutex::default() };
        }
        let server = SHARED.get_or_init(start_shared).await;
        Self { server: server.url("postgres"), given: false, databases: Mutex::default() }
    }

    /// The URL of a fresh, empty database that no other test uses.
    pub async fn database(&self) -> String {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Two test processes may share a server that was given.
        let name =
            format!("t_{}_{number}_{}", std::process::id(), &uuid::Uuid::new_v4().simple().to_string()[..8]);
        execute(&self.server, &format!("create database {name}")).await;
        self.databases.lock().unwrap().push(name.clone());
        with_database(&self.server, &name)
    }
}

/// Transactions that a database has committed since it was made. The server adds them up about once a second.
pub async fn committed_transactions(url: &str) -> Result<f64, sqlx::Error> {
    let mut connection = PgConnection::connect_with(&url.parse::<PgConnectOptions>()?).await?;
    let count: i64 =
        sqlx::query_scalar("select xact_commit from pg_stat_database where datname = current_database()")
            .fetch_one(&mut connection)
            .await?;
    connection.close().await?;
    #[expect(clippy::cast_precision_loss, reason = "a figure")]
    Ok(count as f64)
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let names = std::mem::take(&mut *self.databases.lock().unwrap());
        // A server of our own goes as a whole.
        if !self.given || names.is_empty() {
            return;
        }
        let server = self.server.clone();
        // The runtime of the test may be ending; a thread with one of its own is sure to run.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                for name in names {
                    execute(&server, &format!("drop database if exists {name} with (force)")).await;
                }
            });
        });
        let dropped = dropping.join().is_ok();
        assert!(dropped || std::thread::panicking(), "the databases of this test could not be dropped");
    }
}

async fn start_shared() -> PostgresServer {
    let directory = tempfile::Builder::new().prefix("tabularium-test-pg-").tempdir_in("/tmp").unwrap().keep();
    PostgresServer::start(&directory, Durability::ThrowAway).await.unwrap_or_else(|error| panic!("{error}"))
}

async fn execute(server: &str, statement: &str) {
    let options: PgConnectOptions = server.parse().expect("a Postgres URL");
    let mut connection = PgConnection::connect_with(&options).await.expect("Postgres answers");
    sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await.expect(statement);
    connection.close().await.expect("Postgres answers");
}

/// The URL with another database in its path.
fn with_database(url: &str, database: &str) -> String {
    let (base, query) = url.split_once('?').map_or((url, None), |(base, query)| (base, Some(query)));
    let start = base.find("://").map_or(0, |at| at + 3);
    let end = base[start..].find('/').map_or(base.len(), |at| start + at);
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    format!("{}/{database}{query}", &base[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_of_a_url_is_replaced() {
        for (url, expected) in [
            ("postgres://u@localhost/postgres?host=/tmp/x", "postgres://u@localhost/d?host=/tmp/x"),
            ("postgres://u:p@h:5432/a", "postgres://u:p@h:5432/d"),
            ("postgres://h", "postgres://h/d"),
        ] {
            assert_eq!(with_database(url, "d"), expected);
        }
    }
}
