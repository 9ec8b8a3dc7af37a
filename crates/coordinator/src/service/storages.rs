//! Storages that come and go, as operators ask for it.

use std::sync::Arc;

use tabularium_common::{
    grpc::Address,
    ids::{StorageName, VirtualStorageName},
};
use tabularium_proto::coordinator::{self as wire, storage_service_server::StorageService};
use tonic::{Request, Response, Status};

use super::argument;
use crate::{
    app::Shared,
    db::{
        DbError, assignments,
        storages::{self, Storage, StorageState},
    },
    error::NameError,
    tasks::probe,
    topology::KnownStorage,
};

/// Replicas forgotten, or given up, in one statement.
const BATCH: u32 = 500;

pub(crate) struct Storages(pub(crate) Arc<Shared>);

type Place = (VirtualStorageName, StorageName);

fn place(name: Option<&wire::StorageName>) -> Result<Place, Status> {
    let name = name.ok_or(NameError::StorageNotSet)?;
    if name.virtual_storage.is_empty() || name.storage.is_empty() {
        return Err(NameError::StorageNotSet.into());
    }
    Ok((super::virtual_storage(&name.virtual_storage)?, argument("storage", &name.storage)?))
}

impl Storages {
    fn known(&self, (virtual_storage, storage): &Place) -> Result<KnownStorage, Status> {
        let topology = self.0.topology.get();
        if topology.virtual_storage(virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        let known = topology.storage(virtual_storage, storage).cloned();
        known
            .ok_or_else(|| Status::not_found(format!("there is no storage `{storage}` in {virtual_storage}")))
    }

    async fn set_state(&self, place: &Place, from: StorageState, to: StorageState) -> Result<(), Status> {
        let db = &self.0.db;
        let (virtual_storage, storage) = place;
        let expected = [from];
        let changed = db
            .retrying(|| storages::storage_set_state(db.pool(), virtual_storage, storage, &expected, to))
            .await?;
        if !changed {
            return Err(Status::failed_precondition(format!("storage `{storage}` is not {}", from.as_str())));
        }
        probe::refresh(&self.0).await;
        db.retrying(|| assignments::cursor_reset(db.pool(), virtual_storage)).await?;
        Ok(())
    }

    async fn list(&self, wanted: Option<&VirtualStorageName>) -> Result<Vec<wire::StorageDetails>, DbError> {
        let db = &self.0.db;
        let counts = db.retrying(|| storages::storage_count_replicas(db.pool())).await?;
        let moves = db.retrying(|| assignments::moves_count(db.pool())).await?;
        let topology = self.0.topology.get();
        let storages = topology.storages().filter(|(name, _)| wanted.is_none_or(|wanted| wanted == *name));
        Ok(storages
            .map(|(virtual_storage, known)| {
                let opinion = self.0.health.opinion(virtual_storage, &known.name);
                let held = counts.iter().find(|held| {
                    held.virtual_storage == virtual_storage.as_str() && held.storage == known.name.as_str()
                });
                let moving = moves
                    .iter()
                    .find(|(name, storage, ..)| {
                        name == virtual_storage.as_str() && storage == known.name.as_str()
                    })
                    .map_or((0, 0), |(.., arriving, leaving)| (*arriving, *leaving));
                wire::StorageDetails {
                    virtual_storage: virtual_storage.to_string(),
                    name: known.name.to_string(),
                    address: known.address.to_string(),
                    state: known.state.as_str().to_owned(),
                    healthy: opinion.healthy,
                    problem: opinion.problem,
                    takes_replicas: known.configured,
                    replicas: held.map_or(0, |held| held.replicas),
                    replicas_behind: held.map_or(0, |held| held.behind),
                    primaries: held.map_or(0, |held| held.primaries),
                    arriving: moving.0,
                    leaving: moving.1,
                    filesystem_id: known.filesystem_id.clone().unwrap_or_default(),
                }
            })
            .collect())
    }

    async fn details(&self, (virtual_storage, storage): &Place) -> Result<wire::StorageDetails, Status> {
        let found = self.list(Some(virtual_storage)).await?;
        found
            .into_iter()
            .find(|details| details.name == storage.as_str())
            .ok_or_else(|| Status::aborted(format!("storage `{storage}` was removed meanwhile")))
    }

    /// Writes down that nothing is known of what the storage holds, and has every route to it revoked.
    async fn forget(&self, (virtual_storage, storage): &Place) -> Result<i64, Status> {
        let db = &self.0.db;
        let mut forgotten = 0;
        loop {
            let batch =
                db.retrying(|| storages::storage_forget(db.pool(), virtual_storage, storage, BATCH)).await?;
            if batch.is_empty() {
                return Ok(forgotten);
            }
            forgotten += i64::try_from(batch.len()).unwrap_or(i64::MAX);
            let (routes, rows): (Vec<_>, Vec<_>) =
                batch.into_iter().map(|forgotten| (forgotten.route, forgotten.revocation)).unzip();
            self.0.revoker.revoke(&routes, rows).await?;
        }
    }

    /// How many repositories lose their newest state with the storage; refuses unless that is wanted.
    async fn count_lost(&self, (virtual_storage, storage): &Place, force: bool) -> Result<i64, Status> {
        let db = &self.0.db;
        let lost =
            db.retrying(|| storages::storage_count_only_here(db.pool(), virtual_storage, storage)).await?;
        if lost > 0 && !force {
            return Err(Status::failed_precondition(format!(
                "{lost} repositories have their newest state on `{storage}` alone; bring its disk back, or give that up \
                 with --force-lost"
            )));
        }
        Ok(lost)
    }
}

#[tonic::async_trait]
impl StorageService for Storages {
    async fn list_storages(
        &self,
        request: Request<wire::ListStoragesRequest>,
    ) -> Result<Response<wire::ListStoragesResponse>, Status> {
        let wanted = match request.get_ref().virtual_storage.as_str() {
            "" => None,
            text => Some(super::virtual_storage(text)?),
        };
        if let Some(name) = &wanted
            && self.0.topology.get().virtual_storage(name).is_none()
        {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        let storages = self.list(wanted.as_ref()).await?;
        Ok(Response::new(wire::ListStoragesResponse { storages }))
    }

    async fn add_storage(
        &self,
        request: Request<wire::AddStorageRequest>,
    ) -> Result<Response<wire::AddStorageResponse>, Status> {
        let request = request.into_inner();
        let place = place(request.storage.as_ref())?;
        let address: Address = argument("address", &request.address)?;
        let (virtual_storage, name) = place.clone();
        let topology = self.0.topology.get();
        if topology.virtual_storage(&virtual_storage).is_none() {
            return Err(NameError::UnknownVirtualStorage.into());
        }
        let exists =
            || Status::already_exists(format!("storage `{name}` exists in {virtual_storage} already"));
        if topology.storage(&virtual_storage, &name).is_some() {
            return Err(exists());
        }
        let known = KnownStorage {
            name: name.clone(),
            address: address.clone(),
            configured: true,
            state: StorageState::Active,
            filesystem_id: None,
        };
        let dialled = self.0.health.dial(&virtual_storage, &known).await;
        if !dialled.storage_served {
            return Err(Status::unavailable(format!("`{name}` at {address}: {}", dialled.problem)));
        }
        let db = &self.0.db;
        let storage = Storage { virtual_storage: virtual_storage.clone(), name: name.clone(), address };
        if !db.retrying(|| storages::storage_add(db.pool(), &storage)).await? {
            return Err(exists());
        }
        if !dialled.filesystem_id.is_empty() {
            let id = &dialled.filesystem_id;
            db.retrying(|| storages::storage_note_filesystem(db.pool(), &virtual_storage, &name, id)).await?;
        }
        probe::refresh(&self.0).await;
        db.retrying(|| assignments::cursor_reset(db.pool(), &virtual_storage)).await?;
        tracing::info!(%virtual_storage, storage = %name, "storage was added");
        Ok(Response::new(wire::AddStorageResponse { storage: Some(self.details(&place).await?) }))
    }

    async fn drain_storage(
        &self,
        request: Request<wire::DrainStorageRequest>,
    ) -> Result<Response<wire::DrainStorageResponse>, Status> {
        let request = request.into_inner();
        let place = place(request.storage.as_ref())?;
        self.known(&place)?;
        let (virtual_storage, name) = &place;
        let topology = self.0.topology.get();
        let others = topology
            .storages()
            .filter(|(other, known)| *other == virtual_storage && known.configured && known.name != *name)
            .count();
        if others == 0 {
            return Err(Status::failed_precondition(format!(
                "there is no other storage than `{name}` to move to"
            )));
        }
        let db = &self.0.db;
        let factor = db.retrying(|| assignments::factor_largest(db.pool(), virtual_storage)).await?;
        if usize::from(factor) > others && !request.allow_fewer_replicas {
            return Err(Status::failed_precondition(format!(
                "repositories are to have {factor} replicas, and only {others} other storages could hold them; add a storage \
                 first, or allow fewer replicas with --allow-fewer-replicas"
            )));
        }
        self.set_state(&place, StorageState::Active, StorageState::Draining).await?;
        tracing::info!(%virtual_storage, storage = %name, "storage is drained");
        Ok(Response::new(wire::DrainStorageResponse { storage: Some(self.details(&place).await?) }))
    }

    async fn undrain_storage(
        &self,
        request: Request<wire::UndrainStorageRequest>,
    ) -> Result<Response<wire::UndrainStorageResponse>, Status> {
        let place = place(request.get_ref().storage.as_ref())?;
        self.known(&place)?;
        self.set_state(&place, StorageState::Draining, StorageState::Active).await?;
        tracing::info!(virtual_storage = %place.0, storage = %place.1, "storage is drained no more");
        Ok(Response::new(wire::UndrainStorageResponse { storage: Some(self.details(&place).await?) }))
    }

    async fn remove_storage(
        &self,
        request: Request<wire::RemoveStorageRequest>,
    ) -> Result<Response<wire::RemoveStorageResponse>, Status> {
        let request = request.into_inner();
        let place = place(request.storage.as_ref())?;
        self.known(&place)?;
        let details = self.details(&place).await?;
        let (virtual_storage, name) = &place;
        if details.replicas > 0 && !request.force_lost {
            return Err(Status::failed_precondition(format!(
                "{} replicas are on `{name}`; move them away with `tabularium storage drain {name}`, or give them up with \
                 --force-lost",
                details.replicas
            )));
        }
        let lost_repositories = self.count_lost(&place, request.force_lost).await?;
        let db = &self.0.db;
        // From here on no new replica comes.
        let from = [StorageState::Active, StorageState::Draining];
        let to = StorageState::Draining;
        db.retrying(|| storages::storage_set_state(db.pool(), virtual_storage, name, &from, to)).await?;
        probe::refresh(&self.0).await;
        let lost_replicas = self.forget(&place).await?;
        while db.retrying(|| storages::storage_give_up(db.pool(), virtual_storage, name, BATCH)).await? > 0 {}
        let to = StorageState::Removed;
        db.retrying(|| storages::storage_set_state(db.pool(), virtual_storage, name, &from, to)).await?;
        probe::refresh(&self.0).await;
        db.retrying(|| assignments::cursor_reset(db.pool(), virtual_storage)).await?;
        tracing::warn!(%virtual_storage, storage = %name, lost_replicas, lost_repositories, "storage was removed");
        Ok(Response::new(wire::RemoveStorageResponse { lost_replicas, lost_repositories }))
    }

    async fn accept_storage(
        &self,
        request: Request<wire::AcceptStorageRequest>,
    ) -> Result<Response<wire::AcceptStorageResponse>, Status> {
        let request = request.into_inner();
        let place = place(request.storage.as_ref())?;
        let known = self.known(&place)?;
        let (virtual_storage, name) = &place;
        let dialled = self.0.health.dial(virtual_storage, &known).await;
        let old = known.filesystem_id.unwrap_or_default();
        if dialled.filesystem_id.is_empty() {
            let problem = dialled.problem;
            return Err(Status::unavailable(format!(
                "`{name}` does not say which file system it has: {problem}"
            )));
        }
        if dialled.filesystem_id == old {
            return Err(Status::failed_precondition(format!(
                "`{name}` has the file system that is known already"
            )));
        }
        let lost_repositories = self.count_lost(&place, request.force_lost).await?;
        // First nobody uses what is known of the old file system any more, then the new one is used.
        let replicas = self.forget(&place).await?;
        let (db, id) = (&self.0.db, &dialled.filesystem_id);
        db.retrying(|| storages::storage_set_filesystem(db.pool(), virtual_storage, name, id)).await?;
        probe::refresh(&self.0).await;
        self.0.bell.notify_one();
        tracing::warn!(%virtual_storage, storage = %name, old, new = id, replicas, lost_repositories, "another file system was accepted");
        Ok(Response::new(wire::AcceptStorageResponse {
            old_filesystem_id: old,
            new_filesystem_id: dialled.filesystem_id,
            replicas,
            lost_repositories,
        }))
    }
}
