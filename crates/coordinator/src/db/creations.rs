//! Creations: a name that is reserved, invisibly, until the repository that gets it is there.

use sqlx::{PgExecutor, PgPool};
use tabularium_common::ids::{SiteName, StorageName};
use uuid::Uuid;

use super::{
    milliseconds,
    writes::{Intent, OpenWrite, texts},
};
use crate::repository::{Repository, RepositoryKey};

/// The unique index of names lets one of several creators through.
const CREATION_BEGIN: &str = "
    WITH r AS (
        INSERT INTO repositories (id, virtual_storage, relative_path, replica_path, state, primary_storage, home_site)
        VALUES ($1, $2, $3, $4, 'creating', $5, $6)
        ON CONFLICT (virtual_storage, relative_path) DO NOTHING
        RETURNING id, epoch
    ), copies AS (
        INSERT INTO replicas (repository_id, storage, generation, behind)
        SELECT r.id, storage, -1, true FROM r, unnest($7::text[]) AS storage
    ), intent AS (
        INSERT INTO writes (id, repository_id, kind, epoch, primary_storage, router_id, method, correlation_id,
                            participants, expires_at)
        SELECT $8, r.id, 'create', r.epoch, $5, $9, $10, $11, $12, now() + $13 * interval '1 millisecond' FROM r
        RETURNING id
    )
    SELECT EXISTS (SELECT FROM intent)";

/// Who has a name.
const CREATION_FIND_NAME: &str = "
    SELECT r.state = 'ready' AS ready, w.id AS creation, w.router_id = $3 AND w.correlation_id = $4 AS same_request,
           w.expires_at < now() AS expired
    FROM repositories r LEFT JOIN writes w ON w.repository_id = r.id AND w.kind = 'create'
    WHERE r.virtual_storage = $1 AND r.relative_path = $2";

const CREATION_CANCEL: &str = "
    WITH gone AS (
        DELETE FROM repositories WHERE id = $1 AND state = 'creating'
        RETURNING id, virtual_storage, replica_path
    )
    INSERT INTO duties (kind, repository_id, virtual_storage, replica_path, target, correlation_id)
    SELECT 'cleanup', gone.id, gone.virtual_storage, gone.replica_path, target, $3
    FROM gone, unnest($2::text[]) AS target
    ON CONFLICT DO NOTHING";

/// A repository that is to be created, with its intent.
#[derive(Debug, Clone)]
pub(crate) struct Creation {
    pub(crate) repository: Repository,
    pub(crate) participants: Vec<StorageName>,
    pub(crate) intent: Intent,
}

/// Who has a name that was to be given to a new repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct NameHolder {
    pub(crate) ready: bool,
    /// The write that creates it.
    pub(crate) creation: Option<Uuid>,
    /// Which was begun for the very same request, whose answer must have been lost.
    pub(crate) same_request: Option<bool>,
    /// Nobody renews it.
    pub(crate) expired: Option<bool>,
}

/// Reserves a name, invisibly, with the intent to create it. False: the name is taken.
pub(crate) async fn creation_begin(pool: &PgPool, creation: &Creation) -> Result<bool, sqlx::Error> {
    let Creation { repository, participants, intent } = creation;
    sqlx::query_scalar(CREATION_BEGIN)
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
        .bind(texts(participants))
        .bind(milliseconds(intent.lease))
        .fetch_one(pool)
        .await
}

/// Who has a name, as the writer of `intent` sees it.
pub(crate) async fn creation_find_name(
    pool: &PgPool,
    key: &RepositoryKey,
    intent: &Intent,
) -> Result<Option<NameHolder>, sqlx::Error> {
    sqlx::query_as(CREATION_FIND_NAME)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(&intent.router_id)
        .bind(&intent.correlation_id)
        .fetch_optional(pool)
        .await
}

/// Gives the name of an unfinished creation back, with its intent, and owes the removal of what its storages may have.
pub(crate) async fn creation_cancel(
    executor: impl PgExecutor<'_>,
    creation: &OpenWrite,
) -> Result<(), sqlx::Error> {
    sqlx::query(CREATION_CANCEL)
        .bind(creation.repository_id.0)
        .bind(texts(&creation.participants))
        .bind(&creation.correlation_id)
        .execute(executor)
        .await
        .map(drop)
}
