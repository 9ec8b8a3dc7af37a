//! What operators ask about corrupt replicas: to have objects looked through now, and what nodes kept aside.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use tabularium_common::ids::{StorageName, VirtualStorageName};
use tabularium_proto::{
    coordinator::{self as wire, check_objects_response::Found},
    node::{self, replica_service_client::ReplicaServiceClient},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Response, Status, codegen::BoxStream};

use crate::{
    app::Shared,
    db::repositories,
    error::WriteError,
    repository::{Repository, RepositoryKey},
    soundness::Looked,
    tasks::check,
    topology::KnownStorage,
};

/// Repositories looked through at once because somebody waits for it.
pub(crate) const CHECKS_AT_ONCE: usize = 4;
/// How long a node may take to list what it kept. The caller is to hear of the others before it gives up.
const LISTING: Duration = Duration::from_secs(10);

fn replica(storage: &StorageName, looked: &Looked) -> wire::CheckObjectsResponse {
    let (state, findings) = match looked {
        Looked::Whole => ("whole", ""),
        Looked::Damaged(damage) => ("damaged", damage.as_str()),
        Looked::Unknown(reason) => ("unknown", reason.as_str()),
    };
    let check = wire::ReplicaCheck {
        storage: storage.to_string(),
        state: state.to_owned(),
        findings: findings.to_owned(),
    };
    wire::CheckObjectsResponse { found: Some(Found::Replica(check)) }
}

/// Answers of one look: no more than a repository has replicas, and one.
type Answers = mpsc::UnboundedSender<Result<wire::CheckObjectsResponse, Status>>;

pub(super) async fn check_objects(
    shared: &Arc<Shared>,
    key: &RepositoryKey,
) -> Result<Response<BoxStream<wire::CheckObjectsResponse>>, Status> {
    let db = &shared.db;
    let found = db.retrying(|| repositories::repository_resolve(db.pool(), key)).await?;
    let repository = found.ok_or(WriteError::NotFound)?;
    let place = Arc::clone(&shared.checks).try_acquire_owned();
    let place =
        place.map_err(|_| Status::resource_exhausted("other repositories are being looked through"))?;
    let (answers, receiver) = mpsc::unbounded_channel();
    let (task, stopping) = (Arc::clone(shared), shared.tasks.stopping());
    shared.tasks.spawn("check-on-demand", async move {
        let _place = place;
        tokio::select! {
            // Dropping it ends what runs on the nodes.
            () = answers.closed() => {}
            () = stopping.cancelled() => {}
            () = answer(&task, &repository, &answers) => {}
        }
    });
    Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
}

async fn answer(shared: &Arc<Shared>, repository: &Repository, answers: &Answers) {
    let looking = async {
        let storages = check::serving(shared, repository);
        for absent in repository.replicas.iter().filter(|replica| !storages.contains(&replica.storage)) {
            let reason = if absent.generation == repository.generation {
                "its storage is not healthy"
            } else {
                "it is behind, and nobody reads it"
            };
            // Nobody listens any more when it cannot be told; then this is dropped.
            let _ = answers.send(Ok(replica(&absent.storage, &Looked::Unknown(reason.to_owned()))));
        }
        let turn = shared.config.fsck.limit.0;
        let found = check::look(shared, repository, &storages, turn, |storage, looked| {
            let _ = answers.send(Ok(replica(storage, looked)));
        })
        .await?;
        check::act(shared, repository, &found).await
    };
    let outcome = looking.await.map(|storages| {
        let made_again = storages.iter().map(ToString::to_string).collect();
        wire::CheckObjectsResponse { found: Some(Found::Outcome(wire::CheckOutcome { made_again })) }
    });
    let _ = answers.send(outcome);
}

fn kept(
    virtual_storage: &VirtualStorageName,
    known: &KnownStorage,
    kept: node::KeptReplica,
) -> wire::KeptReplica {
    let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    wire::KeptReplica {
        storage: Some(wire::StorageName {
            virtual_storage: virtual_storage.to_string(),
            storage: known.name.to_string(),
        }),
        kept_id: kept.kept_id,
        replica_path: kept.replica_path,
        repository_id: kept.repository_id,
        relative_path: kept.relative_path,
        reason: kept.reason,
        found_at: at(kept.found_at),
        kept_at: at(kept.kept_at),
        path: kept.path,
        bytes: kept.bytes,
    }
}

pub(super) async fn list_kept(
    shared: &Shared,
    virtual_storage: &VirtualStorageName,
    storages: Vec<KnownStorage>,
) -> wire::ListKeptResponse {
    let asked = join_all(storages.into_iter().map(|known| async move {
        let mut client = ReplicaServiceClient::new(shared.inspector.channel(&known.address));
        let request = node::ListKeptRequest { storage_name: known.name.to_string() };
        let answer = timeout(LISTING, client.list_kept(request)).await;
        (known, answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("the node did not answer in time"))))
    }))
    .await;
    let mut listed = wire::ListKeptResponse::default();
    for (known, answer) in asked {
        match answer {
            Ok(answer) => {
                let found = answer.into_inner().kept.into_iter();
                listed.kept.extend(found.map(|one| kept(virtual_storage, &known, one)));
            }
            // One of Gitaly's keeps nothing.
            Err(status) if status.code() == Code::Unimplemented => {}
            Err(status) => listed.unread.push(wire::UnreadStorage {
                storage: known.name.to_string(),
                problem: status.message().to_owned(),
            }),
        }
    }
    listed
}

pub(super) async fn remove_kept(
    shared: &Shared,
    known: &KnownStorage,
    kept_id: String,
) -> Result<(), Status> {
    let mut client = ReplicaServiceClient::new(shared.inspector.channel(&known.address));
    let request = node::RemoveKeptRequest { storage_name: known.name.to_string(), kept_id };
    let answer = timeout(LISTING, client.remove_kept(request)).await;
    let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("the node did not answer in time")));
    answer.map(drop)
}
