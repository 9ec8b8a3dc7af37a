//! `tabularium.node.v1.ReplicaService`: what a replica holds, for whoever settles a write that nobody ended; the records
//! of replicas, for when the database is not there; and what is found corrupt, and kept of it.

use std::{sync::Arc, time::Duration};

use tabularium_proto::node::{
    CheckObjectsRequest, CheckObjectsResponse, FenceCopiesRequest, FenceCopiesResponse, ListKeptRequest,
    ListKeptResponse, ListRecordsRequest, ListRecordsResponse, MarkCorruptRequest, MarkCorruptResponse,
    QuiesceRequest, QuiesceResponse, ReadRecordRequest, ReadRecordResponse, RemoveKeptRequest,
    RemoveKeptResponse, WriteRecordRequest, WriteRecordResponse, replica_service_server::ReplicaService,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{internal, repository, streams::ResponseStream};
use crate::{
    contents,
    copy_attempts::CopyAttempt,
    corruption::{self, Corruption},
    error::{RepositoryError, internal_io},
    kept,
    node::Node,
    place::blocking,
    records::{self, Kept},
    soundness,
    storage::check_repository,
};

/// Longest wait for a change that is under way, whatever the caller says: new ones wait as well meanwhile.
const MAX_PATIENCE: Duration = Duration::from_secs(60);
/// How long reading what the replica holds may take.
const READING_DEADLINE: Duration = Duration::from_secs(60);
/// Longest look through a replica, whatever the caller says.
const MAX_LOOK: Duration = Duration::from_secs(24 * 3600);
/// Records read ahead of who lists them.
const LISTED_AHEAD: usize = 64;

pub(crate) struct ReplicaServer(Arc<Node>);

impl ReplicaServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl ReplicaService for ReplicaServer {
    async fn quiesce(&self, request: Request<QuiesceRequest>) -> Result<Response<QuiesceResponse>, Status> {
        let request = request.into_inner();
        let mut replica = self.0.storages.locate(request.repository.as_ref())?;
        // What a push has not brought in yet is no part of it.
        replica.quarantine = None;
        if !replica.storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing.into());
        }
        let patience = Duration::from_millis(request.patience_milliseconds.into()).min(MAX_PATIENCE);
        let still = timeout(patience, self.0.sections.still(&replica.path));
        let _still = still.await.map_err(|_| Status::deadline_exceeded("a change is still under way"))?;
        match check_repository(&replica.path) {
            Ok(()) => {}
            Err(RepositoryError::NotFound) => return Ok(Response::new(QuiesceResponse::default())),
            Err(error) => return Err(error.into()),
        }
        let reading = timeout(READING_DEADLINE, contents::digest(&self.0.git, &replica)).await;
        let digest =
            reading.map_err(|_| Status::deadline_exceeded("reading the replica takes too long"))??;
        Ok(Response::new(QuiesceResponse { exists: true, digest: digest.to_vec().into() }))
    }

    async fn read_record(
        &self,
        request: Request<ReadRecordRequest>,
    ) -> Result<Response<ReadRecordResponse>, Status> {
        let replica = self.0.storages.locate(request.into_inner().repository.as_ref())?;
        if !replica.storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing.into());
        }
        match check_repository(&replica.path) {
            Ok(()) => {}
            Err(RepositoryError::NotFound) => return Ok(Response::new(ReadRecordResponse::default())),
            Err(error) => return Err(error.into()),
        }
        let reading = internal_io("reading the replica's record");
        let record = blocking(move || records::read(&replica.path).map_err(reading)).await?;
        Ok(Response::new(ReadRecordResponse { exists: true, record }))
    }

    async fn write_record(
        &self,
        request: Request<WriteRecordRequest>,
    ) -> Result<Response<WriteRecordResponse>, Status> {
        let request = request.into_inner();
        let replica = self.0.storages.open(request.repository.as_ref())?;
        let record = request.record.ok_or_else(|| Status::invalid_argument("record is not set"))?;
        let copy = (request.copy_attempt > 0).then(|| CopyAttempt::numbered(request.copy_attempt));
        let writing = internal_io("writing the replica's record");
        match blocking(move || records::write(&replica.path, record, copy).map_err(writing)).await? {
            Kept::Written => Ok(Response::new(WriteRecordResponse {})),
            Kept::Overtaken => Err(Status::failed_precondition("the replica has a newer record")),
            Kept::OtherCopy => Err(Status::failed_precondition("another copy has begun since")),
            Kept::Gone => Err(RepositoryError::NotFound.into()),
        }
    }

    async fn fence_copies(
        &self,
        request: Request<FenceCopiesRequest>,
    ) -> Result<Response<FenceCopiesResponse>, Status> {
        let request = request.into_inner();
        let replica = self.0.storages.open(request.repository.as_ref())?;
        if request.copy_attempt <= 0 {
            return Err(Status::invalid_argument("copy_attempt is not a positive number"));
        }
        repository::fence(&self.0, &replica, CopyAttempt::numbered(request.copy_attempt)).await?;
        Ok(Response::new(FenceCopiesResponse {}))
    }

    async fn list_records(
        &self,
        request: Request<ListRecordsRequest>,
    ) -> Result<Response<ResponseStream<ListRecordsResponse>>, Status> {
        let name = request.into_inner().storage_name;
        let storage = self.0.storages.get(&name).ok_or(RepositoryError::UnknownStorage)?;
        if !storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing.into());
        }
        let root = storage.root.clone();
        let (listed, receiver) = mpsc::channel(LISTED_AHEAD);
        tokio::task::spawn_blocking(move || {
            let walked = internal::walk(&root, &mut |replica, replica_path| {
                let record = records::read(replica).unwrap_or_else(|error| {
                    tracing::warn!(%error, path = %replica.display(), "a record cannot be read");
                    None
                });
                let response = ListRecordsResponse { replica_path: replica_path.to_owned(), record };
                Ok(listed.blocking_send(Ok(response)).is_ok())
            });
            if let Err(error) = walked {
                let _ = listed.blocking_send(Err(Status::internal(format!("walking the storage: {error}"))));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn check_objects(
        &self,
        request: Request<CheckObjectsRequest>,
    ) -> Result<Response<CheckObjectsResponse>, Status> {
        let request = request.into_inner();
        let mut replica = self.0.storages.locate(request.repository.as_ref())?;
        replica.quarantine = None;
        if !replica.storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing.into());
        }
        let unsound = |findings| Response::new(CheckObjectsResponse { exists: true, sound: false, findings });
        match check_repository(&replica.path) {
            Ok(()) => {}
            Err(RepositoryError::NotFound) => return Ok(Response::new(CheckObjectsResponse::default())),
            Err(error @ RepositoryError::Invalid(_)) => return Ok(unsound(error.to_string())),
            Err(error) => return Err(error.into()),
        }
        let turn = timeout(milliseconds(request.patience_milliseconds), self.0.checking.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(Status::resource_exhausted("another replica is being looked through"));
        };
        let limit = milliseconds(request.limit_milliseconds).min(MAX_LOOK);
        let looking = timeout(limit, soundness::examine(&self.0.git, &self.0.upkeep, &replica));
        let looked = tokio::select! {
            looked = looking => looked,
            () = self.0.shutdown.cancelled() => return Err(Status::unavailable("the node is stopping")),
        };
        let found =
            looked.map_err(|_| Status::deadline_exceeded("looking through the replica takes too long"))??;
        if let Some(findings) = found {
            return Ok(unsound(findings));
        }
        // Somebody mended it, or it was never more than a suspicion.
        corruption::clear_rebuild(&replica).await?;
        let sound = CheckObjectsResponse { exists: true, sound: true, findings: String::new() };
        Ok(Response::new(sound))
    }

    async fn mark_corrupt(
        &self,
        request: Request<MarkCorruptRequest>,
    ) -> Result<Response<MarkCorruptResponse>, Status> {
        let request = request.into_inner();
        let replica = self.0.storages.locate(request.repository.as_ref())?;
        if !replica.storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing.into());
        }
        // Of what is not there nothing is to be kept.
        if request.reason.is_empty() {
            corruption::clear(&replica).await?;
        } else if replica.path.is_dir() {
            corruption::mark(&replica, Corruption::now(&request.reason, request.rebuild)).await?;
        }
        Ok(Response::new(MarkCorruptResponse {}))
    }

    async fn list_kept(
        &self,
        request: Request<ListKeptRequest>,
    ) -> Result<Response<ListKeptResponse>, Status> {
        let name = request.into_inner().storage_name;
        let storage = self.0.storages.get(&name).ok_or(RepositoryError::UnknownStorage)?;
        if !storage.root.is_dir() {
            return Err(RepositoryError::StorageMissing.into());
        }
        Ok(Response::new(ListKeptResponse { kept: kept::list(storage).await? }))
    }

    async fn remove_kept(
        &self,
        request: Request<RemoveKeptRequest>,
    ) -> Result<Response<RemoveKeptResponse>, Status> {
        let request = request.into_inner();
        let storage = self.0.storages.get(&request.storage_name).ok_or(RepositoryError::UnknownStorage)?;
        kept::remove(&self.0, storage, &request.kept_id)?;
        Ok(Response::new(RemoveKeptResponse {}))
    }
}

fn milliseconds(count: u32) -> Duration {
    Duration::from_millis(count.into())
}
