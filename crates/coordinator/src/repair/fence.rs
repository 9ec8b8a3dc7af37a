//! Keeping copies away from a replica that is to be the truth: what one of them changed afterwards would be in no record, and
//! undo what was written since.

use std::time::Duration;

use tabularium_proto::{
    gitaly,
    node::{FenceCopiesRequest, replica_service_client::ReplicaServiceClient},
};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::{app::Shared, db::copies, repository::Repository, topology::KnownStorage};

/// How long a node may take to end the copies that run.
const PATIENCE: Duration = Duration::from_secs(5);

/// Has a node end the copies onto a replica, and refuse from then on all that have a number by now. Answers the number above
/// them. `None`: another copy has begun meanwhile.
pub(crate) async fn fence(
    shared: &Shared,
    repository: &Repository,
    storage: &KnownStorage,
) -> Result<Option<i64>, Status> {
    let db = &shared.db;
    let number = db.retrying(|| copies::copy_number(db.pool(), repository.id, &storage.name)).await?;
    let request = FenceCopiesRequest {
        repository: Some(gitaly::Repository {
            storage_name: storage.name.to_string(),
            relative_path: repository.replica_path.to_string(),
            ..gitaly::Repository::default()
        }),
        copy_attempt: number,
    };
    let mut client = ReplicaServiceClient::new(shared.inspector.channel(&storage.address));
    let fenced = timeout(PATIENCE, client.fence_copies(request)).await;
    match fenced.unwrap_or_else(|_| Err(Status::deadline_exceeded("the node did not end the copies in time")))
    {
        Ok(_) => Ok(Some(number)),
        Err(status) if status.code() == Code::Aborted => Ok(None),
        Err(status) if status.code() == Code::Unimplemented => {
            tracing::warn!(storage = %storage.name, "the node cannot keep late copies away from the replica");
            Ok(Some(number))
        }
        Err(status) => Err(status),
    }
}
