//! Removes what is left of a deleted repository on one node. Acts on that replica path and on nothing else; one that is
//! gone already is done.

use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::{coordinator::CleanupWork, gitaly::RemoveRepositoryRequest};
use tonic::Code;

use crate::{
    calls::{request, within},
    failure::Failure,
    nodes::{Nodes, replica},
    replication::named,
};

/// How long a removal may take.
const REMOVAL_DEADLINE: std::time::Duration = std::time::Duration::from_secs(120);

/// Removes the replica.
pub(crate) async fn clean_up(
    nodes: &Nodes,
    work: &CleanupWork,
    correlation_id: &CorrelationId,
) -> Result<(), Failure> {
    let target = named(work.target.as_ref(), "target")?;
    let body = RemoveRepositoryRequest { repository: Some(replica(target, &work.replica_path)) };
    let mut client = nodes.repositories(target)?;
    let call = client.remove_repository(request(body, correlation_id, REMOVAL_DEADLINE));
    match within(REMOVAL_DEADLINE, call).await {
        Ok(_) => Ok(()),
        Err(status) if status.code() == Code::NotFound => Ok(()),
        Err(status) => Err(Failure::of_call(&format!("removing from {}", target.storage), &status)),
    }
}
