//! One round of a copy: brings one replica up to date with another.
//!
//! Acts on the target's replica and on nothing else. The source is looked at first: it must answer for its refs, and hold
//! what another replica of the same age holds. Success is claimed only for what was seen: after the copy the target answers
//! for its refs, and they are those of the source, or the source itself has moved on since. What is recorded is the
//! generation the source had before the work started, which the copy holds at the least.

use std::time::Duration;

use tabularium_common::telemetry::CorrelationId;
use tabularium_proto::{
    coordinator::{ReplicateWork, StorageAddress},
    gitaly::ReplicateRepositoryRequest,
};
use tokio::time::sleep;

use crate::{
    calls::{attempt, request},
    failure::Failure,
    lease::Lease,
    nodes::{GITALY_SERVERS, Nodes, replica},
};

/// Metadata key under which a node is told the number of a copy; it refuses lower ones than it has seen.
const COPY_ATTEMPT: &str = "tabularium-copy-attempt";
/// How often source and witness are compared before they are taken to differ, and the pause after the first look; every
/// further one is longer by as much. Together longer than a replica lags behind in a write.
const LOOKS: u32 = 9;
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// Copies and checks; answers the generation that the target has now.
pub(crate) async fn replicate(
    nodes: &Nodes,
    work: &ReplicateWork,
    deadline: Duration,
    lease: &Lease,
    correlation_id: &CorrelationId,
) -> Result<i64, Failure> {
    let source = named(work.source.as_ref(), "source")?;
    let target = named(work.target.as_ref(), "target")?;
    let path = work.replica_path.as_str();
    let before = match &work.witness {
        // Time is short, and it was looked at in the round before.
        Some(witness) if !work.under_ticket => {
            checked_source(nodes, source, witness, path, correlation_id).await?
        }
        _ => nodes.source_checksum(source, path, correlation_id).await?,
    };

    let body = ReplicateRepositoryRequest {
        repository: Some(replica(target, path)),
        source: Some(replica(source, path)),
        ..ReplicateRepositoryRequest::default()
    };
    let mut copy = request(body, correlation_id, deadline);
    copy.metadata_mut().insert(GITALY_SERVERS, nodes.introduction(source)?);
    if work.attempt != 0 {
        copy.metadata_mut().insert(COPY_ATTEMPT, work.attempt.into());
    }
    let doing = format!("copying from {} to {}", source.storage, target.storage);
    let mut client = nodes.repositories(target)?;
    if !lease.is_held() {
        return Err(Failure::unreachable("the lease is over"));
    }
    if let Err(failure) = attempt(&doing, deadline, client.replicate_repository(copy)).await {
        let broken = !failure.unreachable && nodes.is_broken(source, path, correlation_id).await;
        return Err(Failure { bad_source: broken, ..failure });
    }

    let copied = nodes.checksum(target, path, correlation_id).await?;
    if copied != before {
        let after = nodes.checksum(source, path, correlation_id).await?;
        judge(&before, &copied, &after, source, target)?;
    }
    Ok(work.generation)
}

/// The checksum of a source that holds what the witness holds, or is being written to like it. A source that stands still
/// and differs is not what it is taken for: an old snapshot, or one that has lost its refs.
async fn checked_source(
    nodes: &Nodes,
    source: &StorageAddress,
    witness: &StorageAddress,
    path: &str,
    correlation_id: &CorrelationId,
) -> Result<String, Failure> {
    let mut first = None;
    for look in 1..=LOOKS {
        let (found, expected) = tokio::join!(
            nodes.source_checksum(source, path, correlation_id),
            nodes.checksum(witness, path, correlation_id)
        );
        let found = found?;
        // A witness that says nothing proves nothing.
        let Ok(expected) = expected else { return Ok(found) };
        if found == expected || *first.get_or_insert_with(|| found.clone()) != found {
            return Ok(found);
        }
        if look < LOOKS {
            sleep(LOOK_PAUSE * look).await;
        }
    }
    Err(Failure::bad_source(format!(
        "{} is not copied from: it does not hold what {} holds",
        source.storage, witness.storage
    )))
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
