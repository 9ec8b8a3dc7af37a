//! Brings one replica up to date with another.
//!
//! Acts on the target's replica and on nothing else. Success is claimed only for what was seen: after the copy the
//! target answers for its refs, and they are those of the source, or the source itself has moved on since. What is
//! recorded is the generation the source had before the work started, which the copy holds at the least.

use std::time::Duration;

use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::{
    coordinator::{ReplicateWork, StorageAddress},
    gitaly::ReplicateRepositoryRequest,
};

use crate::{
    calls::{attempt, request},
    failure::Failure,
    nodes::{GITALY_SERVERS, Nodes, replica},
};

/// Copies and checks; answers the generation that the target has now.
pub(crate) async fn replicate(
    nodes: &Nodes,
    work: &ReplicateWork,
    deadline: Duration,
    correlation_id: &CorrelationId,
) -> Result<i64, Failure> {
    let source = named(work.source.as_ref(), "source")?;
    let target = named(work.target.as_ref(), "target")?;
    let before = nodes.checksum(source, &work.replica_path, correlation_id).await?;

    let body = ReplicateRepositoryRequest {
        repository: Some(replica(target, &work.replica_path)),
        source: Some(replica(source, &work.replica_path)),
        ..ReplicateRepositoryRequest::default()
    };
    let mut copy = request(body, correlation_id, deadline);
    copy.metadata_mut().insert(GITALY_SERVERS, nodes.introduction(source)?);
    let doing = format!("copying from {} to {}", source.storage, target.storage);
    let mut client = nodes.repositories(target)?;
    attempt(&doing, deadline, client.replicate_repository(copy)).await?;

    let copied = nodes.checksum(target, &work.replica_path, correlation_id).await?;
    if copied != before {
        let after = nodes.checksum(source, &work.replica_path, correlation_id).await?;
        judge(&before, &copied, &after, source, target)?;
    }
    Ok(work.generation)
}

/// Whether a copy whose checksum is not the one its source had before can be right.
fn judge(
    before: &str,
    copied: &str,
    after: &str,
    source: &StorageAddress,
    target: &StorageAddress,
) -> Result<(), Failure> {
    if copied == after || before != after {
        return Ok(());
    }
    Err(Failure::refused(format!(
        "after the copy {} has checksum {copied} and {} has {after}",
        target.storage, source.storage
    )))
}

pub(crate) fn named<'a>(
    storage: Option<&'a StorageAddress>,
    role: &str,
) -> Result<&'a StorageAddress, Failure> {
    storage.ok_or_else(|| Failure::refused(format!("the duty names no {role}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_differs_from_a_source_at_rest_is_wrong() {
        let storage = |name: &str| StorageAddress { storage: name.into(), address: String::new() };
        let judge = |before, copied, after| judge(before, copied, after, &storage("a"), &storage("b"));
        assert!(judge("1", "2", "2").is_ok(), "the source moved on before the copy");
        assert!(judge("1", "2", "3").is_ok(), "the source moved on before and after the copy");
        assert!(judge("1", "2", "1").is_err());
        assert!(!judge("1", "2", "1").unwrap_err().unreachable);
    }
}
