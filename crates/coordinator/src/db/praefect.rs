//! Praefect's own tables, in its own database or in a schema of ours. Only read.

use std::time::Duration;

use sqlx::{PgConnection, postgres::PgConnectOptions};

use super::{DatabaseSettings, DbError, connect, milliseconds, options};

/// How long one statement may take: Praefect's indexes are not made for this.
const PATIENCE: Duration = Duration::from_secs(60);

const COUNT: &str = "SELECT count(*) FROM repositories";

/// The last id that was ever given is the sequence's; ids are not given again.
const LAST_ID: &str = "
    SELECT greatest(coalesce(max(r.repository_id), 0),
                    coalesce((SELECT s.last_value FROM pg_sequences s
                              WHERE s.schemaname = current_schema()
                                AND quote_ident(s.schemaname) || '.' || quote_ident(s.sequencename)
                                    = pg_get_serial_sequence('repositories', 'repository_id')), 0))
    FROM repositories r";

/// Praefects that have said something a moment ago.
const AT_WORK: &str = "
    SELECT DISTINCT praefect_name FROM node_status
    WHERE last_contact_attempt_at > now() - interval '10 seconds' ORDER BY praefect_name";

const HAS_TABLE: &str = "SELECT to_regclass($1) IS NOT NULL";

/// Of the days when a whole virtual storage had one primary.
const SHARD_PRIMARIES: &str = "SELECT shard_name::text, node_name::text FROM shard_primaries";

const PAGE: &str = "
    SELECT r.repository_id, r.virtual_storage::text, r.relative_path::text, r.replica_path::text, r.generation,
           r.\"primary\"::text,
           ARRAY(SELECT s.storage::text FROM storage_repositories s
                 WHERE s.repository_id = r.repository_id ORDER BY s.storage) AS storages,
           ARRAY(SELECT s.generation FROM storage_repositories s
                 WHERE s.repository_id = r.repository_id ORDER BY s.storage) AS generations,
           ARRAY(SELECT a.storage::text FROM repository_assignments a
                 WHERE a.repository_id = r.repository_id ORDER BY a.storage) AS assigned
    FROM repositories r WHERE r.repository_id > $1 ORDER BY r.repository_id LIMIT $2";

/// A repository as Praefect has it. Nothing in it has been checked.
#[derive(Debug, Clone, Default, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct PraefectRepository {
    pub(crate) repository_id: i64,
    pub(crate) virtual_storage: String,
    pub(crate) relative_path: String,
    pub(crate) replica_path: Option<String>,
    pub(crate) generation: Option<i64>,
    pub(crate) primary: Option<String>,
    /// Storages that have a replica, and with which generation.
    pub(crate) storages: Vec<String>,
    pub(crate) generations: Vec<i64>,
    /// Empty: all storages.
    pub(crate) assigned: Vec<String>,
}

/// A connection to Praefect's tables.
pub(crate) struct Praefect(PgConnection);

impl Praefect {
    /// Connects to `url`, or to our own database, and looks at `schema` only.
    pub(crate) async fn connect(
        own: &DatabaseSettings,
        url: Option<&str>,
        schema: &str,
    ) -> Result<Self, DbError> {
        let options = match url {
            Some(url) => url.parse::<PgConnectOptions>()?.application_name("tabularium-coordinator"),
            None => options(own)?,
        };
        let options = options.options([
            ("search_path", schema),
            ("statement_timeout", &milliseconds(PATIENCE).to_string()),
            ("default_transaction_read_only", "on"),
        ]);
        Ok(Self(connect(options).await?))
    }

    async fn has_table(&mut self, name: &str) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar(HAS_TABLE).bind(name).fetch_one(&mut self.0).await
    }

    /// Whether its tables are there at all.
    pub(crate) async fn is_there(&mut self) -> Result<bool, sqlx::Error> {
        Ok(self.has_table("storage_repositories").await? && self.has_table("repository_assignments").await?)
    }

    /// The names of those that work with these tables now.
    pub(crate) async fn at_work(&mut self) -> Result<Vec<String>, sqlx::Error> {
        if !self.has_table("node_status").await? {
            return Ok(Vec::new());
        }
        sqlx::query_scalar(AT_WORK).fetch_all(&mut self.0).await
    }

    /// How many repositories there are.
    pub(crate) async fn count(&mut self) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar(COUNT).fetch_one(&mut self.0).await
    }

    /// The last id that was given.
    pub(crate) async fn last_id(&mut self) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar(LAST_ID).fetch_one(&mut self.0).await
    }

    /// Virtual storages with their primaries.
    pub(crate) async fn shard_primaries(&mut self) -> Result<Vec<(String, String)>, sqlx::Error> {
        if !self.has_table("shard_primaries").await? {
            return Ok(Vec::new());
        }
        sqlx::query_as(SHARD_PRIMARIES).fetch_all(&mut self.0).await
    }

    /// The repositories with the lowest ids above `after`.
    pub(crate) async fn page(
        &mut self,
        after: i64,
        limit: usize,
    ) -> Result<Vec<PraefectRepository>, sqlx::Error> {
        sqlx::query_as(PAGE)
            .bind(after)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(&mut self.0)
            .await
    }
}
