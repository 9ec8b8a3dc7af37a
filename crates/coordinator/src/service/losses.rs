//! Replicas that are behind, lost, different, unknown, too many or too few, as operators ask for it.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures::StreamExt as _;
use tabularium_common::ids::{Generation, ReplicaPath, RepositoryId, StorageName, VirtualStorageName};
use tabularium_proto::{
    coordinator::{self as wire, get_replicas_request, repair_service_server::RepairService},
    gitaly::{
        Repository as GitalyRepository, RepositoryExistsRequest, WalkReposRequest,
        internal_gitaly_client::InternalGitalyClient, repository_service_client::RepositoryServiceClient,
    },
};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, codegen::BoxStream};

use super::{argument, key, operator::timestamp};
use crate::{
    app::Shared,
    db::{
        assignments, checks, copies, is_duplicate,
        losses::{self, LossQuery, Placed},
        outbox, repositories, storages, verifications,
    },
    error::{NameError, WriteError},
    movement,
    quorum::QuorumPolicy,
    records::{self, Vouched},
    repair,
    repository::{RepositoryKey, RevokedRoute},
    topology::KnownStorage,
};

/// Repositories on one page, and the most a caller gets.
const PAGE_SIZE: u32 = 100;
const MAX_PAGE_SIZE: u32 = 1000;
/// Of a repository that is taken in as it is.
const FIRST_GENERATION: Generation = Generation(1);
/// Copies owed in one statement.
const OWED: u32 = 1000;
/// Replicas marked in one statement.
const MARKED: u32 = 10_000;
/// Paths looked up at once, and answers that may wait for the client.
const PATHS: usize = 500;

/// How often copies are kept away from the truth to be, when another one has begun before it is.
const FENCES: u32 = 3;
/// How often a node is asked to note that its replica is the truth.
const NOTE_ATTEMPTS: u32 = 5;

pub(crate) struct Repair(pub(crate) Arc<Shared>);

/// What became of an operator's word about which replica is the truth.
enum Accepted {
    /// The route that is to be revoked, and the row that says so.
    Yes(RevokedRoute, i64),
    /// Somebody is writing, or the repository has changed its places.
    Written,
    /// A copy has begun onto that replica.
    CopyBegun,
}

impl Repair {
    fn check_virtual_storage(&self, name: &VirtualStorageName) -> Result<(), Status> {
        match self.0.topology.get().virtual_storage(name) {
            Some(_) => Ok(()),
            None => Err(NameError::UnknownVirtualStorage.into()),
        }
    }

    fn key(&self, name: Option<&wire::RepositoryName>) -> Result<RepositoryKey, Status> {
        let key = key(name)?;
        self.check_virtual_storage(&key.virtual_storage)?;
        Ok(key)
    }

    fn storage(&self, virtual_storage: &VirtualStorageName, text: &str) -> Result<KnownStorage, Status> {
        let name: StorageName = argument("storage", text)?;
        let known = self.0.topology.get().storage(virtual_storage, &name).cloned();
        known.ok_or_else(|| Status::not_found(format!("there is no storage `{name}` in {virtual_storage}")))
    }

    fn healthy(&self, virtual_storage: &VirtualStorageName) -> Vec<StorageName> {
        let topology = self.0.topology.get();
        let known = topology.virtual_storage(virtual_storage);
        known
            .into_iter()
            .flat_map(|known| &known.storages)
            .map(|storage| storage.name.clone())
            .filter(|storage| self.0.health.is_healthy(virtual_storage, storage))
            .collect()
    }

    fn replicas(&self, placed: Placed) -> wire::RepositoryReplicas {
        let Placed { repository, written_at, factor, mut conditions } = placed;
        let virtual_storage = &repository.key.virtual_storage;
        let healthy = |storage: &StorageName| self.0.health.is_healthy(virtual_storage, storage);
        let readable = |storage: &&StorageName| {
            !conditions.get(storage.as_str()).is_some_and(|condition| condition.unreadable)
        };
        let unavailable = !repository.up_to_date().filter(readable).any(healthy);
        let replicas: Vec<_> = repository
            .replicas
            .iter()
            .map(|replica| {
                let condition = conditions.remove(replica.storage.as_str()).unwrap_or_default();
                wire::ReplicaDetails {
                    storage: replica.storage.to_string(),
                    generation: replica.generation.0,
                    up_to_date: replica.generation == repository.generation,
                    primary: replica.storage == repository.primary,
                    healthy: healthy(&replica.storage),
                    assigned: !condition.leaving,
                    behind_since: condition.behind_since.map(timestamp),
                    verified_at: condition.verified_at.map(timestamp),
                    checked_at: condition.checked_at.map(timestamp),
                    damage: condition.damage,
                }
            })
            .collect();
        wire::RepositoryReplicas {
            name: Some((&repository.key).into()),
            repository_id: repository.id.0,
            replica_path: repository.replica_path.to_string(),
            primary: repository.primary.to_string(),
            generation: repository.generation.0,
            epoch: repository.epoch.0,
            replication_factor: factor.into(),
            write_quorum_policy: repository.write_quorum.as_str().to_owned(),
            write_quorum: u32::try_from(repository.quorum()).unwrap_or(u32::MAX),
            unavailable,
            replicas,
            written_at: Some(timestamp(written_at)),
        }
    }

    async fn placement(&self, key: &RepositoryKey) -> Result<Option<wire::RepositoryReplicas>, Status> {
        let db = &self.0.db;
        let found = db.retrying(|| losses::placement_of_name(db.pool(), key)).await?;
        Ok(Some(self.replicas(found.ok_or(WriteError::NotFound)?)))
    }

    /// Asks the node itself whether it has the repository: a record may be wrong, and here a human decides by it.
    async fn check_exists(
        &self,
        virtual_storage: &VirtualStorageName,
        known: &KnownStorage,
        replica_path: &ReplicaPath,
    ) -> Result<(), Status> {
        if !self.0.health.is_healthy(virtual_storage, &known.name) {
            let problem = self.0.health.opinion(virtual_storage, &known.name).problem;
            return Err(Status::unavailable(format!("storage `{}` is not healthy: {problem}", known.name)));
        }
        let repository = GitalyRepository {
            storage_name: known.name.to_string(),
            relative_path: replica_path.to_string(),
            ..GitalyRepository::default()
        };
        let mut node = RepositoryServiceClient::new(self.0.health.signed(&known.address));
        let mut request = Request::new(RepositoryExistsRequest { repository: Some(repository) });
        request.set_timeout(self.0.config.timing.max_retry_delay.0);
        if node.repository_exists(request).await?.into_inner().exists {
            return Ok(());
        }
        let name = &known.name;
        Err(Status::failed_precondition(format!("there is no repository at {replica_path} on `{name}`")))
    }

    /// Has the node that holds the truth write so beside its replica. Until it has, it refuses the replica as older than it
    /// must be.
    async fn note_truth(
        &self,
        id: RepositoryId,
        storage: &StorageName,
        generation: Generation,
    ) -> Result<(), Status> {
        let db = &self.0.db;
        let found = db.retrying(|| repositories::repository_find(db.pool(), id)).await?;
        let Some(repository) = found else { return Ok(()) };
        let vouched = Vouched { repository, target: storage.clone(), generation, attempt: 0 };
        let mut noted = records::vouch(&self.0, &vouched).await;
        for _ in 1..NOTE_ATTEMPTS {
            if noted.is_ok() {
                break;
            }
            noted = records::vouch(&self.0, &vouched).await;
        }
        noted.map_err(|status| {
            let problem = status.message();
            Status::unavailable(format!(
                "accepted, but `{storage}` could not note that: {problem}; accept it again"
            ))
        })
    }

    /// Moves the truth to a replica from which copies with lower numbers than `fence` are kept away.
    async fn accept(
        &self,
        id: RepositoryId,
        storage: &StorageName,
        fence: i64,
    ) -> Result<Accepted, sqlx::Error> {
        let mut transaction = self.0.db.begin().await?;
        let repository = repositories::repository_lock_id(&mut transaction, id).await?;
        let assignment = assignments::assignment_read_in_txn(&mut transaction, id).await?;
        let (Some(repository), Some(assignment)) = (repository, assignment) else {
            return Ok(Accepted::Written);
        };
        if assignment.being_written || repository.replica(storage).is_none() {
            return Ok(Accepted::Written);
        }
        let (generation, row) = losses::truth_accept_in_txn(&mut transaction, id, storage).await?;
        // Its duties are ended above: whoever was giving it another number has done so, and nobody else will.
        if copies::copy_last_number_in_txn(&mut transaction, id, storage).await? != Some(fence) {
            return Ok(Accepted::CopyBegun);
        }
        for replica in repository.replicas.iter().filter(|replica| replica.storage != *storage) {
            outbox::duty_owe_copy(&mut *transaction, &repository, &replica.storage, "").await?;
        }
        transaction.commit().await?;
        Ok(Accepted::Yes(RevokedRoute { key: repository.key, id, generation }, row))
    }

    /// What one storage holds that is in no record, sent to `found`.
    async fn untracked_on(
        &self,
        virtual_storage: &VirtualStorageName,
        known: &KnownStorage,
        not_after: OffsetDateTime,
        found: &mpsc::Sender<Result<wire::ListUntrackedResponse, Status>>,
    ) -> Result<(), Status> {
        let request = WalkReposRequest { storage_name: known.name.to_string() };
        let walked =
            InternalGitalyClient::new(self.0.health.signed(&known.address)).walk_repos(request).await?;
        let mut chunks = walked.into_inner().ready_chunks(PATHS);
        let db = &self.0.db;
        while let Some(chunk) = chunks.next().await {
            let walked: Vec<_> = chunk.into_iter().collect::<Result<_, _>>()?;
            let paths: Vec<String> =
                walked.iter().map(|repository| repository.relative_path.clone()).collect();
            let untracked = db
                .retrying(|| losses::path_list_untracked(db.pool(), virtual_storage, &known.name, &paths))
                .await?;
            for repository in walked {
                let modified_at = repository.modification_time;
                let old_enough = modified_at.is_none_or(|at| at.seconds <= not_after.unix_timestamp());
                if !old_enough || !untracked.contains(&repository.relative_path) {
                    continue;
                }
                let answer = wire::ListUntrackedResponse {
                    virtual_storage: virtual_storage.to_string(),
                    storage: known.name.to_string(),
                    replica_path: repository.relative_path,
                    modified_at,
                };
                if found.send(Ok(answer)).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl RepairService for Repair {
    async fn data_loss(
        &self,
        request: Request<wire::DataLossRequest>,
    ) -> Result<Response<wire::DataLossResponse>, Status> {
        let request = request.into_inner();
        let virtual_storage = super::virtual_storage(&request.virtual_storage)?;
        self.check_virtual_storage(&virtual_storage)?;
        let page_size = if request.page_size == 0 { PAGE_SIZE } else { request.page_size.min(MAX_PAGE_SIZE) };
        let after = URL_SAFE_NO_PAD
            .decode(&request.page_token)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .filter(|text| !text.contains('\0'))
            .ok_or_else(|| Status::invalid_argument("page_token is not one of ours"))?;
        let healthy = self.healthy(&virtual_storage);
        // One more than the page tells whether another page follows.
        let limit = page_size + 1;
        let query = LossQuery { virtual_storage, after, limit, only_unavailable: request.only_unavailable };
        let db = &self.0.db;
        let mut found = db.retrying(|| losses::loss_list(db.pool(), &query, &healthy)).await?;
        let more = found.len() > page_size as usize;
        found.truncate(page_size as usize);
        let next_page_token = match found.last() {
            Some(last) if more => URL_SAFE_NO_PAD.encode(last.repository.key.relative_path.as_str()),
            _ => String::new(),
        };
        let repositories = found.into_iter().map(|placed| self.replicas(placed)).collect();
        Ok(Response::new(wire::DataLossResponse { repositories, next_page_token }))
    }

    async fn accept_data_loss(
        &self,
        request: Request<wire::AcceptDataLossRequest>,
    ) -> Result<Response<wire::AcceptDataLossResponse>, Status> {
        let request = request.into_inner();
        let key = self.key(request.name.as_ref())?;
        let known = self.storage(&key.virtual_storage, &request.authoritative_storage)?;
        let db = &self.0.db;
        let repository = db
            .retrying(|| repositories::repository_resolve(db.pool(), &key))
            .await?
            .ok_or(WriteError::NotFound)?;
        if repository.replica(&known.name).is_none() {
            let name = &known.name;
            return Err(Status::failed_precondition(format!("`{name}` is not to hold a replica of {key}")));
        }
        self.check_exists(&key.virtual_storage, &known, &repository.replica_path).await?;
        let mut fences = 0;
        let (route, row) = loop {
            fences += 1;
            let accepted = match repair::fence(&self.0, &repository, &known).await? {
                Some(fence) => db.retrying(|| self.accept(repository.id, &known.name, fence)).await?,
                None => Accepted::CopyBegun,
            };
            match accepted {
                Accepted::Yes(route, row) => break (route, row),
                Accepted::CopyBegun if fences < FENCES => {}
                Accepted::CopyBegun => {
                    return Err(Status::aborted(format!(
                        "`{}` is being copied to just now; try again",
                        known.name
                    )));
                }
                Accepted::Written => {
                    return Err(Status::aborted("the repository is written to just now; try again"));
                }
            }
        };
        tracing::warn!(repository = %key, storage = %known.name, "this replica is the truth now, by an operator's word");
        self.0.bell.notify_one();
        let (id, generation) = (route.id, route.generation);
        self.0.revoke_now(route, row).await?;
        self.note_truth(id, &known.name, generation).await?;
        Ok(Response::new(wire::AcceptDataLossResponse { repository: self.placement(&key).await? }))
    }

    async fn get_replicas(
        &self,
        request: Request<wire::GetReplicasRequest>,
    ) -> Result<Response<wire::GetReplicasResponse>, Status> {
        let repository = match request.into_inner().repository {
            None => return Err(NameError::RepositoryNotSet.into()),
            Some(get_replicas_request::Repository::Name(name)) => {
                self.placement(&self.key(Some(&name))?).await?
            }
            Some(get_replicas_request::Repository::RepositoryId(id)) => {
                let db = &self.0.db;
                let found = db.retrying(|| losses::placement_of_id(db.pool(), RepositoryId(id))).await?;
                Some(self.replicas(found.ok_or(WriteError::NotFound)?))
            }
        };
        Ok(Response::new(wire::GetReplicasResponse { repository }))
    }

    async fn reconcile(
        &self,
        _request: Request<wire::ReconcileRequest>,
    ) -> Result<Response<wire::ReconcileResponse>, Status> {
        let db = &self.0.db;
        let mut owed = 0;
        loop {
            let more = db.retrying(|| outbox::duty_owe_behind(db.pool(), OWED)).await?;
            owed += more;
            if more < u64::from(OWED) {
                break;
            }
        }
        let names: Vec<_> =
            self.0.topology.get().virtual_storages.iter().map(|known| known.name.clone()).collect();
        for name in names {
            db.retrying(|| assignments::cursor_reset(db.pool(), &name)).await?;
        }
        self.0.bell.notify_one();
        Ok(Response::new(wire::ReconcileResponse { owed: i64::try_from(owed).unwrap_or(i64::MAX) }))
    }

    async fn mark_unverified(
        &self,
        request: Request<wire::MarkUnverifiedRequest>,
    ) -> Result<Response<wire::MarkUnverifiedResponse>, Status> {
        let request = request.into_inner();
        let db = &self.0.db;
        let marked = match (request.name, request.storage) {
            (Some(_), None) if request.objects => {
                return Err(Status::invalid_argument("CheckObjects looks through one repository, now"));
            }
            (Some(name), None) => {
                let key = self.key(Some(&name))?;
                let marked = db.retrying(|| verifications::unverify_repository(db.pool(), &key)).await?;
                if marked == 0 {
                    return Err(WriteError::NotFound.into());
                }
                marked
            }
            (None, Some(name)) => {
                let virtual_storage = super::virtual_storage(&name.virtual_storage)?;
                self.check_virtual_storage(&virtual_storage)?;
                let storage = match name.storage.as_str() {
                    "" => None,
                    text => Some(self.storage(&virtual_storage, text)?.name),
                };
                let mut marked = 0;
                loop {
                    let (pool, storage) = (db.pool(), storage.as_ref());
                    let more = if request.objects {
                        db.retrying(|| checks::check_demand(pool, &virtual_storage, storage, MARKED)).await?
                    } else {
                        db.retrying(|| {
                            verifications::unverify_storage(pool, &virtual_storage, storage, MARKED)
                        })
                        .await?
                    };
                    marked += more;
                    if more < u64::from(MARKED) {
                        break marked;
                    }
                }
            }
            _ => return Err(Status::invalid_argument("either a repository or a storage is to be named")),
        };
        let replicas = i64::try_from(marked).unwrap_or(i64::MAX);
        Ok(Response::new(wire::MarkUnverifiedResponse { replicas }))
    }

    async fn check_objects(
        &self,
        request: Request<wire::CheckObjectsRequest>,
    ) -> Result<Response<BoxStream<wire::CheckObjectsResponse>>, Status> {
        let key = self.key(request.into_inner().name.as_ref())?;
        super::corruption::check_objects(&self.0, &key).await
    }

    async fn list_kept(
        &self,
        request: Request<wire::ListKeptRequest>,
    ) -> Result<Response<wire::ListKeptResponse>, Status> {
        let request = request.into_inner();
        let virtual_storage = super::virtual_storage(&request.virtual_storage)?;
        self.check_virtual_storage(&virtual_storage)?;
        let storages = match request.storage.as_str() {
            "" => {
                let topology = self.0.topology.get();
                topology
                    .virtual_storage(&virtual_storage)
                    .map(|known| known.storages.clone())
                    .unwrap_or_default()
            }
            text => vec![self.storage(&virtual_storage, text)?],
        };
        let listed = super::corruption::list_kept(&self.0, &virtual_storage, storages).await;
        Ok(Response::new(listed))
    }

    async fn remove_kept(
        &self,
        request: Request<wire::RemoveKeptRequest>,
    ) -> Result<Response<wire::RemoveKeptResponse>, Status> {
        let request = request.into_inner();
        let name = request.storage.unwrap_or_default();
        let virtual_storage = super::virtual_storage(&name.virtual_storage)?;
        self.check_virtual_storage(&virtual_storage)?;
        let known = self.storage(&virtual_storage, &name.storage)?;
        super::corruption::remove_kept(&self.0, &known, request.kept_id).await?;
        Ok(Response::new(wire::RemoveKeptResponse {}))
    }

    async fn set_replication_factor(
        &self,
        request: Request<wire::SetReplicationFactorRequest>,
    ) -> Result<Response<wire::SetReplicationFactorResponse>, Status> {
        let request = request.into_inner();
        let key = self.key(request.name.as_ref())?;
        let factor = if request.default {
            None
        } else {
            let topology = self.0.topology.get();
            let known = topology.virtual_storage(&key.virtual_storage);
            let places =
                known.map_or(0, |known| known.storages.iter().filter(|storage| storage.configured).count());
            let factor = u16::try_from(request.replication_factor).unwrap_or(u16::MAX);
            if usize::from(factor) > places {
                return Err(Status::invalid_argument(format!(
                    "replication factor {factor} is more than there are storages that take replicas ({places})"
                )));
            }
            Some(factor)
        };
        let db = &self.0.db;
        let id = db
            .retrying(|| assignments::factor_set(db.pool(), &key, factor))
            .await?
            .ok_or(WriteError::NotFound)?;
        let counts = db.retrying(|| storages::storage_count_replicas(db.pool())).await?;
        movement::rearrange(&self.0, id, &counts).await?;
        Ok(Response::new(wire::SetReplicationFactorResponse { repository: self.placement(&key).await? }))
    }

    async fn set_write_quorum(
        &self,
        request: Request<wire::SetWriteQuorumRequest>,
    ) -> Result<Response<wire::SetWriteQuorumResponse>, Status> {
        let request = request.into_inner();
        let key = self.key(request.name.as_ref())?;
        let policy = match request.policy.as_str() {
            "default" => None,
            text => Some(argument::<QuorumPolicy>("policy", text)?),
        };
        let db = &self.0.db;
        if !db.retrying(|| repositories::repository_set_write_quorum(db.pool(), &key, policy)).await? {
            return Err(WriteError::NotFound.into());
        }
        let repository = db
            .retrying(|| repositories::repository_resolve(db.pool(), &key))
            .await?
            .ok_or(WriteError::NotFound)?;
        let generation = repository.generation.next();
        let route = RevokedRoute { key: key.clone(), id: repository.id, generation };
        self.0.revoker.revoke(&[route], Vec::new()).await?;
        Ok(Response::new(wire::SetWriteQuorumResponse { repository: self.placement(&key).await? }))
    }

    async fn track_repository(
        &self,
        request: Request<wire::TrackRepositoryRequest>,
    ) -> Result<Response<wire::TrackRepositoryResponse>, Status> {
        let request = request.into_inner();
        let key = self.key(request.name.as_ref())?;
        let known = self.storage(&key.virtual_storage, &request.authoritative_storage)?;
        let path: ReplicaPath = argument("replica_path", &request.replica_path)?;
        self.check_exists(&key.virtual_storage, &known, &path).await?;
        let db = &self.0.db;
        let id = self.0.repository_ids.next(&self.0).await?;
        let tracked = || async {
            let made = losses::repository_track(db.pool(), id, &key, path.as_str(), &known.name).await;
            match made {
                Err(error) if is_duplicate(&error) => Ok(Err("a repository of that name exists already")),
                Ok(false) => Ok(Err("a repository is tracked at that path already")),
                Ok(true) => Ok(Ok(())),
                Err(error) => Err(error),
            }
        };
        db.retrying(tracked).await?.map_err(Status::already_exists)?;
        let counts = db.retrying(|| storages::storage_count_replicas(db.pool())).await?;
        movement::rearrange(&self.0, id, &counts).await?;
        // Nothing that its node has noted of it before is about this repository, so nothing depends on it.
        if let Err(status) = self.note_truth(id, &known.name, FIRST_GENERATION).await {
            tracing::info!(repository_id = %id, error = status.message(), "a replica's record is not written");
        }
        Ok(Response::new(wire::TrackRepositoryResponse { repository: self.placement(&key).await? }))
    }

    async fn list_untracked(
        &self,
        request: Request<wire::ListUntrackedRequest>,
    ) -> Result<Response<BoxStream<wire::ListUntrackedResponse>>, Status> {
        let request = request.into_inner();
        let virtual_storage = super::virtual_storage(&request.virtual_storage)?;
        self.check_virtual_storage(&virtual_storage)?;
        let age = time::Duration::seconds(request.older_than_seconds.into());
        let not_after = OffsetDateTime::now_utc() - age;
        let topology = self.0.topology.get();
        let storages: Vec<KnownStorage> = topology
            .virtual_storage(&virtual_storage)
            .map(|known| known.storages.clone())
            .unwrap_or_default();
        let (found, receiver) = mpsc::channel(PATHS);
        let shared = Arc::clone(&self.0);
        let stopping = self.0.tasks.stopping();
        self.0.tasks.spawn("list-untracked", async move {
            let asking = async {
                let repair = Self(shared);
                for known in storages {
                    if let Err(status) =
                        repair.untracked_on(&virtual_storage, &known, not_after, &found).await
                    {
                        let text = format!("storage `{}`: {}", known.name, status.message());
                        // If it cannot be told, nobody listens any more.
                        let _ = found.send(Err(Status::new(status.code(), text))).await;
                        return;
                    }
                }
            };
            tokio::select! {
                () = asking => {}
                () = stopping.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
