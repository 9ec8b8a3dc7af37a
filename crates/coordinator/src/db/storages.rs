//! Virtual storages and storages. Written from each coordinator's configuration when it starts; nothing is removed.

use sqlx::PgPool;
use tabularium_common::{
    grpc::Address,
    ids::{StorageName, VirtualStorageName},
};

use super::parsed;

const VIRTUAL_STORAGE_UPSERT: &str = "
    INSERT INTO virtual_storages (name, default_replication_factor) VALUES ($1, $2)
    ON CONFLICT (name) DO UPDATE SET default_replication_factor = excluded.default_replication_factor";

const STORAGE_UPSERT: &str = "
    INSERT INTO storages (virtual_storage, name, address) VALUES ($1, $2, $3)
    ON CONFLICT (virtual_storage, name) DO UPDATE SET address = excluded.address";

const STORAGE_LIST: &str =
    "SELECT virtual_storage, name, address FROM storages ORDER BY virtual_storage, name";

const STORAGE_COUNT_REPLICAS: &str = "
    SELECT r.virtual_storage, p.storage, count(*) AS replicas, count(*) FILTER (WHERE p.behind) AS behind,
           count(*) FILTER (WHERE r.primary_storage = p.storage) AS primaries
    FROM replicas p JOIN repositories r ON r.id = p.repository_id
    WHERE r.state = 'ready'
    GROUP BY r.virtual_storage, p.storage";

/// A storage as it is in the database.
#[expect(clippy::struct_field_names, reason = "that is what it is called everywhere")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Storage {
    pub(crate) virtual_storage: VirtualStorageName,
    pub(crate) name: StorageName,
    pub(crate) address: Address,
}

/// What one storage holds.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct StorageCounts {
    pub(crate) virtual_storage: String,
    pub(crate) storage: String,
    pub(crate) replicas: i64,
    pub(crate) behind: i64,
    pub(crate) primaries: i64,
}

/// Adds a virtual storage, or changes its default replication factor.
pub(crate) async fn virtual_storage_upsert(
    pool: &PgPool,
    name: &VirtualStorageName,
    default_replication_factor: u16,
) -> Result<(), sqlx::Error> {
    sqlx::query(VIRTUAL_STORAGE_UPSERT)
        .bind(name.as_str())
        .bind(i32::from(default_replication_factor))
        .execute(pool)
        .await
        .map(drop)
}

/// Adds a storage, or changes its address.
pub(crate) async fn storage_upsert(pool: &PgPool, storage: &Storage) -> Result<(), sqlx::Error> {
    sqlx::query(STORAGE_UPSERT)
        .bind(storage.virtual_storage.as_str())
        .bind(storage.name.as_str())
        .bind(storage.address.to_string())
        .execute(pool)
        .await
        .map(drop)
}

/// All storages, by name.
pub(crate) async fn storage_list(pool: &PgPool) -> Result<Vec<Storage>, sqlx::Error> {
    let rows: Vec<(String, String, String)> = sqlx::query_as(STORAGE_LIST).fetch_all(pool).await?;
    rows.into_iter()
        .map(|(virtual_storage, name, address)| {
            Ok(Storage {
                virtual_storage: parsed(&virtual_storage)?,
                name: parsed(&name)?,
                address: parsed(&address)?,
            })
        })
        .collect()
}

/// How many replicas every storage holds. Reads all replicas: for people and gauges, not for requests of clients.
pub(crate) async fn storage_count_replicas(pool: &PgPool) -> Result<Vec<StorageCounts>, sqlx::Error> {
    sqlx::query_as(STORAGE_COUNT_REPLICAS).fetch_all(pool).await
}
