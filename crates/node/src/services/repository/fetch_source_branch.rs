//! FetchSourceBranch: a reference is made to point to what a branch of another repository points to.

use std::sync::Arc;

use tabularium_proto::gitaly::{FetchSourceBranchRequest, FetchSourceBranchResponse};
use tonic::Status;

use super::write_ref::move_reference;
use crate::{
    error::internal_io,
    git::{
        quarantine::Quarantine,
        revision::{self, RevisionError},
        update_ref::{Expected, UpdateRefError},
    },
    node::Node,
    peer::Peers,
    services::operation_service::start::Start,
    votes::{Voter, ballot},
};

/// What is voted on when there is no such branch: every replica has looked in vain.
const NOTHING: &[u8] = b"nothing fetched";

pub(super) async fn fetch(
    node: &Arc<Node>,
    request: FetchSourceBranchRequest,
    peers: &Peers,
    voter: &Voter,
) -> Result<FetchSourceBranchResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let invalid = |error: RevisionError| Status::invalid_argument(error.to_string());
    revision::check(&request.source_branch).map_err(invalid)?;
    revision::check(&request.target_ref).map_err(invalid)?;
    if revision::check_reference(&request.target_ref).is_err() {
        return Err(Status::invalid_argument("invalid reference name"));
    }
    if request.source_repository.is_none() {
        return Err(Status::invalid_argument("empty source repository"));
    }
    let quarantine = Quarantine::create(node, &repository)?;
    let source = Start {
        target: request.repository.as_ref(),
        repository: request.source_repository.as_ref(),
        branch: &request.source_branch,
    };
    let found = match source.find(node, &quarantine, peers).await? {
        Some(found) => match source.bring(node, &quarantine, peers, &found).await {
            Ok(()) => Some(found),
            Err(error) => {
                tracing::warn!(%error, "a source branch could not be fetched");
                None
            }
        },
        None => None,
    };
    let Some(found) = found else {
        voter.committed(&repository.path, ballot(NOTHING)).await?;
        return Ok(FetchSourceBranchResponse { result: false });
    };
    quarantine.migrate().await.map_err(internal_io("migrating quarantined objects"))?;
    let expected = match request.expected_target_old_oid.as_str() {
        "" => Expected::Any,
        expected => Expected::Value(expected.to_owned()),
    };
    move_reference(node, &repository, (&request.target_ref, &found, &expected), voter).await.map_err(
        |error| match error {
            UpdateRefError::Mismatch { .. } => {
                Status::failed_precondition("reference does not point to expected object")
            }
            UpdateRefError::Vote(error) => error.into(),
            other => Status::internal(other.to_string()),
        },
    )?;
    Ok(FetchSourceBranchResponse { result: true })
}
