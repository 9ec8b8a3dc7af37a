//! CreateRepository, RepositoryExists, RemoveRepository.

use tabularium_proto::gitaly::{
    CreateRepositoryRequest, CreateRepositoryResponse, ObjectFormat, RemoveRepositoryRequest,
    RemoveRepositoryResponse, RepositoryExistsRequest, RepositoryExistsResponse,
};
use tonic::Status;

use crate::{
    error::RepositoryError,
    git::revision::check_reference,
    node::Node,
    place::{self, Building},
    services::object_pool::release_members,
    storage::check_repository,
    votes::Voter,
};

/// The branch HEAD names when the caller does not say.
const DEFAULT_BRANCH: &str = "main";

pub(super) fn exists(
    node: &Node,
    request: &RepositoryExistsRequest,
) -> Result<RepositoryExistsResponse, Status> {
    let repository = node.storages.locate(request.repository.as_ref())?;
    if !repository.storage.root.is_dir() {
        return Err(RepositoryError::StorageMissing.into());
    }
    match check_repository(&repository.path) {
        Ok(()) => Ok(RepositoryExistsResponse { exists: true }),
        Err(RepositoryError::NotFound | RepositoryError::Invalid(_)) => {
            Ok(RepositoryExistsResponse { exists: false })
        }
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn create(
    node: &Node,
    request: CreateRepositoryRequest,
    voter: &Voter,
) -> Result<CreateRepositoryResponse, Status> {
    let target = node.storages.locate(request.repository.as_ref())?;
    let format = match ObjectFormat::try_from(request.object_format) {
        Ok(ObjectFormat::Unspecified | ObjectFormat::Sha1) => "sha1",
        Ok(ObjectFormat::Sha256) => "sha256",
        Err(_) => {
            let text = format!("unknown object format: \"{}\"", request.object_format);
            return Err(Status::invalid_argument(text));
        }
    };
    let branch = branch_name(&request.default_branch)?;
    let building = Building::begin(node, &target, branch, format).await?;
    building.publish_agreed(node, voter).await?;
    Ok(CreateRepositoryResponse {})
}

fn branch_name(given: &[u8]) -> Result<&str, Status> {
    if given.is_empty() {
        return Ok(DEFAULT_BRANCH);
    }
    let bad = || Status::invalid_argument("invalid default branch");
    let name = std::str::from_utf8(given).map_err(|_| bad())?;
    let full = format!("refs/heads/{name}");
    if name.starts_with('-') || check_reference(full.as_bytes()).is_err() {
        return Err(bad());
    }
    Ok(name)
}

pub(super) async fn remove(
    node: &Node,
    request: &RemoveRepositoryRequest,
    voter: &Voter,
) -> Result<RemoveRepositoryResponse, Status> {
    let target = node.storages.locate(request.repository.as_ref())?;
    release_members(node, &target).await?;
    place::remove_agreed(node, target, voter).await?;
    Ok(RemoveRepositoryResponse {})
}
