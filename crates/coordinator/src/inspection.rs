//! Asking storages what they hold of a repository, when it is not known how far a write got there.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use tabularium_common::{
    auth::{NodeTokens, SendToken},
    grpc::{Address, channel},
    ids::StorageName,
    records::{EXPECTED_REPLICA, expectation},
};
use tabularium_proto::{
    gitaly::{
        self, CalculateChecksumRequest, FindDefaultBranchNameRequest, ref_service_client::RefServiceClient,
        repository_service_client::RepositoryServiceClient,
    },
    node::{ExpectedReplica, QuiesceRequest, replica_service_client::ReplicaServiceClient},
};
use tokio::time::timeout;
use tonic::{Code, Request, Status, service::interceptor::InterceptedService, transport::Channel};

use crate::{repository::Repository, settlement::Held, topology::Snapshot};

/// What storages answered; one that did not is not among them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inspection {
    pub(crate) answers: BTreeMap<StorageName, Held>,
    /// They answered that they cannot read the replica, and why.
    pub(crate) broken: BTreeMap<StorageName, String>,
    /// Nothing is being changed there any more. Otherwise a node could not say so, and is to be looked at again.
    pub(crate) quiet: bool,
}

/// Connections to nodes for questions about replicas.
pub(crate) struct Inspector {
    tokens: NodeTokens,
    channels: Mutex<HashMap<Address, Channel>>,
}

/// A channel to a node, signed.
pub(crate) type NodeChannel = InterceptedService<Channel, SendToken>;

enum Answer {
    Held(Held),
    /// The node is not one of ours.
    Unimplemented,
    /// The node is well and the replica cannot be read, or git could not be run; in its words.
    Broken(String),
    None,
}

impl Inspector {
    pub(crate) fn new(tokens: NodeTokens) -> Self {
        Self { tokens, channels: Mutex::default() }
    }

    /// To the node at that address.
    pub(crate) fn channel(&self, address: &Address) -> NodeChannel {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = channels.entry(address.clone()).or_insert_with(|| channel(address)).clone();
        InterceptedService::new(channel, self.tokens.to_send(address))
    }

    /// Asks all at once; whoever has not answered within `patience` has not answered. When one of them cannot say that
    /// nothing is being changed there, all are asked in Gitaly's words, so that their answers can be compared. What
    /// is older by its own record than the database knows does not count.
    pub(crate) async fn inspect(
        &self,
        topology: &Snapshot,
        repository: &Repository,
        storages: &[StorageName],
        patience: Duration,
    ) -> Inspection {
        let virtual_storage = &repository.key.virtual_storage;
        let nodes: Vec<(&StorageName, NodeChannel)> = storages
            .iter()
            .filter_map(|storage| Some((storage, self.channel(topology.address(virtual_storage, storage)?))))
            .collect();
        let asked = |storage: &StorageName| gitaly::Repository {
            storage_name: storage.to_string(),
            relative_path: repository.replica_path.to_string(),
            ..gitaly::Repository::default()
        };
        let quiesced = join_all(nodes.iter().map(|(storage, channel)| async {
            let expected = ExpectedReplica {
                node_instance: None,
                storage_name: storage.to_string(),
                relative_path: repository.replica_path.to_string(),
                repository_id: repository.id.0,
                generation: repository.replica(storage).map_or(0, |replica| replica.generation.0),
            };
            let asking = quiesce(channel.clone(), asked(storage), &expected, patience);
            (*storage, timeout(patience, asking).await.unwrap_or(Answer::None))
        }))
        .await;
        if !quiesced.iter().any(|(_, answer)| matches!(answer, Answer::Unimplemented)) {
            return inspection(quiesced, true);
        }
        let compared = join_all(nodes.iter().map(|(storage, channel)| async {
            let asking = checksum(channel.clone(), asked(storage));
            (*storage, timeout(patience, asking).await.unwrap_or(Answer::None))
        }))
        .await;
        inspection(compared, false)
    }
}

fn inspection(said: Vec<(&StorageName, Answer)>, quiet: bool) -> Inspection {
    let mut inspection = Inspection { quiet, ..Inspection::default() };
    for (storage, answer) in said {
        match answer {
            Answer::Held(held) => {
                inspection.answers.insert(storage.clone(), held);
            }
            Answer::Broken(why) => {
                inspection.broken.insert(storage.clone(), why);
            }
            Answer::Unimplemented | Answer::None => {}
        }
    }
    inspection
}

async fn quiesce(
    channel: NodeChannel,
    repository: gitaly::Repository,
    expected: &ExpectedReplica,
    patience: Duration,
) -> Answer {
    let storage = repository.storage_name.clone();
    // The node is to answer that it cannot before we stop listening.
    let patience = patience.saturating_sub(patience / 5);
    let mut request = Request::new(QuiesceRequest {
        repository: Some(repository),
        patience_milliseconds: u32::try_from(patience.as_millis()).unwrap_or(u32::MAX),
    });
    request.metadata_mut().insert_bin(EXPECTED_REPLICA, expectation(expected));
    match ReplicaServiceClient::new(channel).quiesce(request).await.map(tonic::Response::into_inner) {
        Ok(answer) if answer.exists => Answer::Held(Held::Digest(answer.digest.to_vec())),
        Ok(_) => Answer::Held(Held::Nothing),
        Err(status) if status.code() == Code::Unimplemented => Answer::Unimplemented,
        Err(status) if is_no_repository(&status) => Answer::Held(Held::Nothing),
        Err(status) => unanswered(&storage, &status),
    }
}

/// A directory that is none of git's any more (wire reference, section h.2).
fn is_no_repository(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && status.message().starts_with("repository not valid: ")
}

/// All that Gitaly says of a repository's content: a checksum of its references, and where HEAD points.
async fn checksum(channel: NodeChannel, repository: gitaly::Repository) -> Answer {
    let storage = repository.storage_name.clone();
    let asking = async {
        let request = CalculateChecksumRequest { repository: Some(repository.clone()) };
        let checksum = RepositoryServiceClient::new(channel.clone()).calculate_checksum(request).await?;
        let request = FindDefaultBranchNameRequest {
            repository: Some(repository),
            ..FindDefaultBranchNameRequest::default()
        };
        let head = RefServiceClient::new(channel).find_default_branch_name(request).await?;
        let mut digest = checksum.into_inner().checksum.into_bytes();
        digest.push(0);
        digest.extend(head.into_inner().name);
        Ok::<_, Status>(digest)
    };
    match asking.await {
        Ok(digest) => Answer::Held(Held::Digest(digest)),
        Err(status) if status.code() == Code::NotFound || is_no_repository(&status) => {
            Answer::Held(Held::Nothing)
        }
        Err(status) => unanswered(&storage, &status),
    }
}

fn unanswered(storage: &str, status: &Status) -> Answer {
    tracing::info!(storage, code = %status.code(), message = status.message(), "a replica does not say what it holds");
    match status.code() {
        Code::Internal | Code::DataLoss => Answer::Broken(status.message().to_owned()),
        _ => Answer::None,
    }
}
