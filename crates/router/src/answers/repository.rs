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

/// Nothing can be kept under such a name. Praefect looks into its records and nowhere else, so for it a virtual storage that
/// there is not, and a path that none can have, are names like any other.
fn is_impossible(shared: &Shared, virtual_storage: &str, relative_path: &str) -> Result<bool, Refusal> {
    let directory = shared.nodes.directory();
    match directory.storages(virtual_storage) {
        Some(_) => Ok(relative_path.parse::<RelativePath>().is_err()),
        None if directory.known() => Ok(true),
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
    if is_impossible(shared, named.virtual_storage, named.relative_path)? {
        return Ok(answered(&RepositoryExistsResponse { exists: false }));
    }
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
    let removed = if is_impossible(shared, named.virtual_storage, named.relative_path)? {
        false
    } else {
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
            Ok(_) => true,
            Err(status) if status.code() == Code::NotFound => false,
            Err(status) => return Err(Refusal::Status(status)),
        }
    };
    if removed || !must_exist {
        Ok(answered(&RemoveRepositoryResponse {}))
    } else {
        Err(Refusal::NothingToRemove)
    }
}
