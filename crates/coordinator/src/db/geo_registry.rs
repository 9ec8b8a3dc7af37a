//! The registry of mirrors: for each repository whose home is another site, whether it is to be fetched, is being
//! fetched, or was. Every change is a compare-and-set; a claim that is not finished in time falls to the next comer.

use std::time::Duration;

use sqlx::PgPool;
use tabularium_common::ids::{RelativePath, SiteName, VirtualStorageName};
use uuid::Uuid;

use super::{milliseconds, parsed};
use crate::repository::RepositoryKey;

/// Answers the site that the name belongs to, and whether the claim was given. When somebody else holds it, they are
/// told to look again.
const MIRROR_CLAIM: &str = "
    INSERT INTO mirrors AS m (virtual_storage, relative_path, home_site, state, claim_id, claim_expires_at, worker_id)
    VALUES ($1, $2, $3, 'started', $4, now() + $5 * interval '1 millisecond', $6)
    ON CONFLICT (virtual_storage, relative_path) DO UPDATE SET
        state = CASE WHEN m.home_site <> $3 THEN m.state ELSE 'started' END,
        look_again = CASE WHEN m.home_site <> $3 THEN m.look_again
                          ELSE m.state = 'started' AND m.claim_expires_at > now() END,
        claim_id = CASE WHEN m.home_site <> $3 OR (m.state = 'started' AND m.claim_expires_at > now())
                        THEN m.claim_id ELSE $4 END,
        claim_expires_at = CASE WHEN m.home_site <> $3 OR (m.state = 'started' AND m.claim_expires_at > now())
                                THEN m.claim_expires_at ELSE now() + $5 * interval '1 millisecond' END,
        worker_id = CASE WHEN m.home_site <> $3 OR (m.state = 'started' AND m.claim_expires_at > now())
                         THEN m.worker_id ELSE $6 END,
        changed_at = now()
    RETURNING m.home_site, m.claim_id = $4 AS claimed";

const MIRROR_LOCK_CLAIM: &str = "
    SELECT virtual_storage, relative_path, failures, look_again FROM mirrors
    WHERE claim_id = $1 AND state = 'started' FOR UPDATE";

const MIRROR_SYNCED: &str = "
    UPDATE mirrors SET state = CASE WHEN look_again THEN 'pending' ELSE 'synced' END, look_again = false, claim_id = NULL,
           claim_expires_at = NULL, failures = 0, last_error = '', synced_at = now(), changed_at = now()
    WHERE claim_id = $1 AND state = 'started'";

const MIRROR_FAILED: &str = "
    UPDATE mirrors SET state = 'failed', look_again = false, claim_id = NULL, claim_expires_at = NULL,
           failures = failures + 1, last_error = $2, changed_at = now()
    WHERE claim_id = $1 AND state = 'started'";

const MIRROR_PENDING: &str = "
    UPDATE mirrors SET state = 'pending', look_again = false, claim_id = NULL, claim_expires_at = NULL, changed_at = now()
    WHERE claim_id = $1 AND state = 'started'";

const MIRROR_GONE: &str = "DELETE FROM mirrors WHERE claim_id = $1 AND state = 'started'";

/// Mirrors that wait for an event which does not come: asked for again, at most once per `$1`.
const MIRROR_LIST_FORGOTTEN: &str = "
    UPDATE mirrors SET changed_at = now()
    WHERE (virtual_storage, relative_path) IN (
        SELECT virtual_storage, relative_path FROM mirrors
        WHERE state <> 'synced' AND changed_at < now() - $1 * interval '1 millisecond'
          AND (claim_expires_at IS NULL OR claim_expires_at < now())
        ORDER BY changed_at LIMIT $2 FOR UPDATE SKIP LOCKED)
    RETURNING virtual_storage, relative_path, home_site";

const MIRROR_COUNT: &str = "
    SELECT home_site, count(*) AS mirrors, count(*) FILTER (WHERE state = 'synced') AS synced,
           count(*) FILTER (WHERE state = 'failed') AS failed
    FROM mirrors GROUP BY home_site ORDER BY home_site";

/// What a claim came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Claimed {
    Yes,
    UnderWay,
    /// The name is a mirror of this other site.
    OtherSite(SiteName),
}

/// A mirror under a claim. Locked.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct ClaimedMirror {
    pub(crate) virtual_storage: String,
    pub(crate) relative_path: String,
    pub(crate) failures: i32,
    pub(crate) look_again: bool,
}

/// How a claimed sync ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SyncEnd {
    Synced,
    Failed(String),
    /// To be done again from the start.
    Pending,
    Gone,
}

/// Mirrors of one site.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct MirrorCounts {
    pub(crate) home_site: String,
    pub(crate) mirrors: i64,
    pub(crate) synced: i64,
    pub(crate) failed: i64,
}

/// A mirror that is to be fetched and of which the bus knows nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForgottenMirror {
    pub(crate) key: RepositoryKey,
    pub(crate) home_site: SiteName,
}

/// Claims the sync of a mirror for a worker.
pub(crate) async fn mirror_claim(
    pool: &PgPool,
    key: &RepositoryKey,
    home_site: &SiteName,
    claim_id: Uuid,
    lease: Duration,
    worker_id: &str,
) -> Result<Claimed, sqlx::Error> {
    let (site, claimed): (String, Option<bool>) = sqlx::query_as(MIRROR_CLAIM)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .bind(home_site.as_str())
        .bind(claim_id)
        .bind(milliseconds(lease))
        .bind(worker_id)
        .fetch_one(pool)
        .await?;
    Ok(if claimed == Some(true) {
        Claimed::Yes
    } else if site == home_site.as_str() {
        Claimed::UnderWay
    } else {
        Claimed::OtherSite(parsed(&site)?)
    })
}

/// Locks the mirror that a claim holds.
pub(crate) async fn mirror_lock_claim(
    connection: &mut sqlx::PgConnection,
    claim_id: Uuid,
) -> Result<Option<ClaimedMirror>, sqlx::Error> {
    sqlx::query_as(MIRROR_LOCK_CLAIM).bind(claim_id).fetch_optional(connection).await
}

/// Ends a claim. The caller holds the mirror's lock.
pub(crate) async fn mirror_end_in_txn(
    connection: &mut sqlx::PgConnection,
    claim_id: Uuid,
    end: &SyncEnd,
) -> Result<(), sqlx::Error> {
    let query = match end {
        SyncEnd::Synced => sqlx::query(MIRROR_SYNCED).bind(claim_id),
        SyncEnd::Failed(error) => sqlx::query(MIRROR_FAILED).bind(claim_id).bind(error),
        SyncEnd::Pending => sqlx::query(MIRROR_PENDING).bind(claim_id),
        SyncEnd::Gone => sqlx::query(MIRROR_GONE).bind(claim_id),
    };
    query.execute(connection).await.map(drop)
}

/// Takes mirrors that have waited longer than `age`, to ask for them again.
pub(crate) async fn mirror_list_forgotten(
    pool: &PgPool,
    age: Duration,
    limit: u32,
) -> Result<Vec<ForgottenMirror>, sqlx::Error> {
    let rows: Vec<(String, String, String)> = sqlx::query_as(MIRROR_LIST_FORGOTTEN)
        .bind(milliseconds(age))
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    rows.into_iter()
        .map(|(virtual_storage, relative_path, home_site)| {
            Ok(ForgottenMirror {
                key: RepositoryKey {
                    virtual_storage: parsed::<VirtualStorageName>(&virtual_storage)?,
                    relative_path: parsed::<RelativePath>(&relative_path)?,
                },
                home_site: parsed(&home_site)?,
            })
        })
        .collect()
}

/// How many mirrors of each site there are.
pub(crate) async fn mirror_count(pool: &PgPool) -> Result<Vec<MirrorCounts>, sqlx::Error> {
    sqlx::query_as(MIRROR_COUNT).fetch_all(pool).await
}
