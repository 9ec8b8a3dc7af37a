//! Taking corrupt replicas out of reads, to be made again: what follows when replicas were compared, or looked through.
//!
//! First the node is told, so that the copy that follows keeps aside what is there. Then one transaction forgets what the
//! replicas have, owes them a copy, moves the primary if it is one of them, and owes the revocation of routes; when this
//! returns no router uses a route that shows them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tabularium_common::ids::StorageName;
use tabularium_proto::{
    gitaly,
    node::{MarkCorruptRequest, replica_service_client::ReplicaServiceClient},
};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::{
    app::Shared,
    db::{assignments, outbox, replicas, repositories},
    repository::{Repository, RevokedRoute},
    verification::Verdict,
};

/// How long a node may take to note what was found.
const PATIENCE: Duration = Duration::from_secs(5);
/// Tries to find a moment when nobody writes, and the pause between two.
const MOMENTS: usize = 200;
const BETWEEN_MOMENTS: Duration = Duration::from_millis(50);

/// What speaks against replicas.
#[derive(Debug, Clone)]
pub(crate) enum Grounds {
    /// They hold something else than the others did, or cannot be read. It means something only as long as nothing is written.
    Comparison,
    /// Their objects are damaged, in git's words; whatever is written meanwhile.
    Damage(BTreeMap<StorageName, String>),
}

impl Grounds {
    fn reason(&self, storage: &StorageName) -> String {
        match self {
            Self::Comparison => "it differs from what the other replicas hold, or cannot be read".to_owned(),
            Self::Damage(found) => found.get(storage).cloned().unwrap_or_default(),
        }
    }
}

/// Takes those that a verdict speaks against out of reads, and answers which went: none, when something is written all the
/// time, or when what was seen does not hold any more. `unreadable`: those of them that say nothing of what they hold.
pub(crate) async fn expel(
    shared: &Arc<Shared>,
    seen: &Repository,
    verdict: &Verdict,
    grounds: &Grounds,
    unreadable: &[StorageName],
) -> Result<Vec<StorageName>, Status> {
    let damaged = matches!(grounds, Grounds::Damage(_));
    for storage in &verdict.different {
        let rebuild = damaged || unreadable.contains(storage);
        let marked = mark(shared, seen, storage, &grounds.reason(storage), rebuild).await;
        match marked {
            Ok(()) => {}
            // Without the mark the copy would leave the damage where it is.
            Err(status) if damaged => return Err(status),
            Err(status) => {
                let error = status.message();
                tracing::warn!(repository = %seen.key, %storage, error, "a replica that differs will not be kept aside");
            }
        }
    }
    let db = &shared.db;
    let mut recorded = db.retrying(|| record(shared, seen, verdict, damaged)).await?;
    for _ in 1..if damaged { MOMENTS } else { 1 } {
        if !matches!(recorded, Recorded::Busy) {
            break;
        }
        tokio::time::sleep(BETWEEN_MOMENTS).await;
        recorded = db.retrying(|| record(shared, seen, verdict, damaged)).await?;
    }
    let (repository, different, row) = match recorded {
        Recorded::Done { repository, different, row } => (*repository, different, row),
        Recorded::Void | Recorded::Busy if damaged => return Ok(Vec::new()),
        Recorded::Void | Recorded::Busy => {
            let now = db.retrying(|| repositories::repository_find(db.pool(), seen.id)).await?;
            // Else a copy would keep aside, sooner or later, what is well. Where somebody else was sooner the mark is right.
            let serves = |storage: &&StorageName| {
                now.as_ref().is_some_and(|now| now.up_to_date().any(|other| other == *storage))
            };
            for storage in verdict.different.iter().filter(serves) {
                if let Err(status) = mark(shared, seen, storage, "", false).await {
                    tracing::debug!(repository = %seen.key, %storage, error = status.message(), "a mark stays");
                }
            }
            return Ok(Vec::new());
        }
    };
    let storages: Vec<&str> = different.iter().map(StorageName::as_str).collect();
    match grounds {
        Grounds::Comparison => {
            tracing::error!(repository = %seen.key, ?storages, "replicas differ from the others; they are made again");
            shared.metrics.replicas_different.inc_by(u64::try_from(storages.len()).unwrap_or(u64::MAX));
        }
        Grounds::Damage(found) => {
            tracing::error!(repository = %seen.key, ?found, "replicas are damaged; they are made again");
            shared.metrics.replicas_damaged.inc_by(u64::try_from(storages.len()).unwrap_or(u64::MAX));
        }
    }
    let generation = repository.generation.next();
    shared.revoke_now(RevokedRoute { key: repository.key, id: repository.id, generation }, row).await?;
    shared.bell.notify_one();
    Ok(different)
}

/// Tells a node what was found of its replica; nothing: that it was nothing.
async fn mark(
    shared: &Shared,
    repository: &Repository,
    storage: &StorageName,
    reason: &str,
    rebuild: bool,
) -> Result<(), Status> {
    let topology = shared.topology.get();
    let address = topology.address(&repository.key.virtual_storage, storage);
    let address = address.ok_or_else(|| Status::not_found("the storage has no address"))?;
    let request = MarkCorruptRequest {
        repository: Some(gitaly::Repository {
            storage_name: storage.to_string(),
            relative_path: repository.replica_path.to_string(),
            ..gitaly::Repository::default()
        }),
        reason: reason.to_owned(),
        rebuild,
    };
    let mut client = ReplicaServiceClient::new(shared.inspector.channel(address));
    match timeout(PATIENCE, client.mark_corrupt(request)).await {
        // One of Gitaly's keeps nothing.
        Ok(Err(status)) if status.code() == Code::Unimplemented => Ok(()),
        Ok(marked) => marked.map(drop),
        Err(_) => Err(Status::deadline_exceeded("the node did not answer in time")),
    }
}

/// What became of it in the database.
enum Recorded {
    Done {
        repository: Box<Repository>,
        different: Vec<StorageName>,
        row: i64,
    },
    /// Somebody writes.
    Busy,
    /// What was seen does not hold any more.
    Void,
}

async fn record(
    shared: &Shared,
    seen: &Repository,
    verdict: &Verdict,
    damaged: bool,
) -> Result<Recorded, sqlx::Error> {
    let mut transaction = shared.db.begin().await?;
    let repository = repositories::repository_lock_id(&mut transaction, seen.id).await?;
    let assignment = assignments::assignment_read_in_txn(&mut transaction, seen.id).await?;
    let (Some(repository), Some(assignment)) = (repository, assignment) else { return Ok(Recorded::Void) };
    if assignment.being_written {
        return Ok(Recorded::Busy);
    }
    let up_to_date = |storage: &&StorageName| repository.up_to_date().any(|other| other == *storage);
    // One that is behind by now is made again in any case.
    let different: Vec<StorageName> = verdict.different.iter().filter(up_to_date).cloned().collect();
    let heir = verdict.sound.iter().find(up_to_date);
    let stands = !different.is_empty() && (damaged || repository == *seen);
    let (Some(heir), true) = (heir, stands) else { return Ok(Recorded::Void) };
    for storage in &different {
        replicas::replica_forget_in_txn(&mut transaction, repository.id, storage).await?;
        outbox::duty_owe_copy(&mut *transaction, &repository, storage, "").await?;
    }
    if different.contains(&repository.primary) {
        repositories::repository_move_primary_in_txn(&mut transaction, repository.id, heir).await?;
    }
    let row = assignments::revocation_owe_in_txn(&mut transaction, repository.id).await?;
    transaction.commit().await?;
    Ok(Recorded::Done { repository: Box::new(repository), different, row })
}
