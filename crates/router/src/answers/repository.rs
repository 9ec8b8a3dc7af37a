//! Whether a repository exists, and its removal: the coordinator's word, never a node's.

use http::{HeaderValue, Response};
use hyper::body::Incoming;
use tabularium_common::ids::RelativePath;
use tabularium_proto::{
    coordinator::{RemoveRepositoryRequest, RepositoryName},
    gitaly::{RemoveRepositoryResponse, RepositoryExistsResponse},
};
use tonic::Code;

use crate::{
    body::Reply,
    first_message,
    limits::COMMIT_CALL_TIMEOUT,
    refusal::Refusal,
    relay::{Shared, answered, repository},
    routes::is_unknown,
};

fn check_virtual_storage(shared: &Shared, virtual_storage: &str) -> Result<(), Refusal> {
    let directory = shared.nodes.directory();
    match directory.storages(virtual_storage) {
        Some(_) => Ok(()),
        None if directory.known() => Err(Refusal::StorageNotFound),
        None => Err(Refusal::NoTopology),
    }
}

/// `RepositoryExists`.
pub(crate) async fn exists(
    shared: &Shared,
    correlation: &HeaderValue,
    mut body: Incoming,
) -> Result<Response<Reply>, Refusal> {
    let first = first_message::read(&mut body).await?;
    let named = repository(&first.message, &[1])?;
    check_virtual_storage(shared, named.virtual_storage)?;
    match shared.confirmations.route(named.virtual_storage, named.relative_path, Some(correlation)).await {
        Ok(_) => Ok(answered(&RepositoryExistsResponse { exists: true })),
        Err(refusal) if is_unknown(&refusal) => Ok(answered(&RepositoryExistsResponse { exists: false })),
        Err(refusal) => Err(refusal),
    }
}

/// `RemoveRepository` and `DeleteObjectPool`, whose answers are both empty.
pub(crate) async fn remove(
    shared: &Shared,
    correlation: &HeaderValue,
    mut body: Incoming,
    target: &[u32],
    must_exist: bool,
) -> Result<Response<Reply>, Refusal> {
    let first = first_message::read(&mut body).await?;
    let named = repository(&first.message, target)?;
    check_virtual_storage(shared, named.virtual_storage)?;
    let path: RelativePath = named.relative_path.parse().map_err(Refusal::Path)?;
    let request = RemoveRepositoryRequest {
        name: Some(RepositoryName {
            virtual_storage: named.virtual_storage.to_owned(),
            relative_path: path.into(),
        }),
    };
    let removed = shared
        .coordinators
        .call(Some(correlation), COMMIT_CALL_TIMEOUT, request, |mut client, request| async move {
            client.remove_repository(request).await
        })
        .await;
    match removed {
        Err(status) if status.code() != Code::NotFound => Err(Refusal::Status(status)),
        Err(_) if must_exist => Err(Refusal::NothingToRemove),
        Ok(_) | Err(_) => Ok(answered(&RemoveRepositoryResponse {})),
    }
}
