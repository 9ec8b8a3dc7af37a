//! `tabularium.node.v1.ReplicaService`: what a replica holds, for whoever settles a write that nobody ended.

use std::{sync::Arc, time::Duration};

use tabularium_proto::node::{QuiesceRequest, QuiesceResponse, replica_service_server::ReplicaService};
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use crate::{contents, error::RepositoryError, node::Node, storage::check_repository};

/// Longest wait for a change that is under way, whatever the caller says: new ones wait as well meanwhile.
const MAX_PATIENCE: Duration = Duration::from_secs(60);
/// How long reading what the replica holds may take.
const READING_DEADLINE: Duration = Duration::from_secs(60);

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
}
