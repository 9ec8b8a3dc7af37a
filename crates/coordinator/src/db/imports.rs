//! What an import knows of a repository beside what any rebuilt one has, and how one is let go of.

use sqlx::{PgConnection, PgPool};
use tabularium_common::ids::{Generation, RepositoryId};

use crate::{
    import::Imported,
    repository::{RepositoryKey, RevokedRoute},
};

const FACTORS: &str = "
    UPDATE repositories r SET replication_factor = f.factor
    FROM unnest($1::bigint[], $2::integer[]) AS f (id, factor) WHERE r.id = f.id";

/// What was never made does not count towards the write quorum; what is on no assigned storage goes as soon as the others
/// are up to date.
const REPLICAS: &str = "
    UPDATE replicas p SET joining = p.generation = -1, leaving = f.leaving
    FROM unnest($1::bigint[], $2::text[], $3::boolean[]) AS f (id, storage, leaving)
    WHERE p.repository_id = f.id AND p.storage = f.storage AND (p.generation = -1 OR f.leaving)";

/// As a removal, but that nothing is owed to the storages.
const FORGET: &str = "
    WITH gone AS (
        DELETE FROM repositories WHERE virtual_storage = $1 AND relative_path = $2 AND state = 'ready'
        RETURNING id, virtual_storage, relative_path, generation, home_site
    ), forgotten AS (
        DELETE FROM mirrors m USING gone
        WHERE m.virtual_storage = gone.virtual_storage AND m.relative_path = gone.relative_path
          AND m.state <> 'started'
    ), told AS (
        INSERT INTO geo_log (kind, repository_id, virtual_storage, relative_path, generation)
        SELECT 'deleted', id, virtual_storage, relative_path, generation FROM gone WHERE home_site IS NULL
    ), pointless AS (
        UPDATE duties d SET state = 'done', finished_at = now(), last_error = 'the repository is not known any more'
        FROM gone WHERE d.repository_id = gone.id AND d.kind IN ('replicate', 'cleanup')
          AND d.state IN ('pending', 'published', 'started', 'parked')
    ), owed AS (
        INSERT INTO revocations (repository_id, virtual_storage, relative_path, generation)
        SELECT id, virtual_storage, relative_path, generation + 1 FROM gone RETURNING id
    )
    SELECT gone.id, gone.generation + 1, owed.id FROM gone, owed";

/// Completes repositories that have just been written, in the same transaction.
pub(crate) async fn import_complete_in_txn(
    connection: &mut PgConnection,
    imported: &[&Imported],
) -> Result<(), sqlx::Error> {
    let with_factor = imported.iter().filter_map(|one| Some((one.rebuilt.id.0, i32::from(one.factor?))));
    let (ids, factors): (Vec<i64>, Vec<i32>) = with_factor.unzip();
    sqlx::query(FACTORS).bind(ids).bind(factors).execute(&mut *connection).await?;
    let (mut ids, mut storages, mut leaving) = (Vec::new(), Vec::new(), Vec::new());
    for one in imported {
        for replica in &one.rebuilt.replicas {
            ids.push(one.rebuilt.id.0);
            storages.push(replica.storage.to_string());
            leaving.push(one.leaving.contains(&replica.storage));
        }
    }
    sqlx::query(REPLICAS).bind(ids).bind(storages).bind(leaving).execute(connection).await?;
    Ok(())
}

/// Takes a repository out of the records. `None`: there is none. Else the route that is to be revoked, and the row that
/// owes it.
pub(crate) async fn repository_forget(
    pool: &PgPool,
    key: &RepositoryKey,
) -> Result<Option<(RevokedRoute, i64)>, sqlx::Error> {
    let gone: Option<(i64, i64, i64)> = sqlx::query_as(FORGET)
        .bind(key.virtual_storage.as_str())
        .bind(key.relative_path.as_str())
        .fetch_optional(pool)
        .await?;
    Ok(gone.map(|(id, generation, row)| {
        let (id, generation) = (RepositoryId(id), Generation(generation));
        (RevokedRoute { key: key.clone(), id, generation }, row)
    }))
}
