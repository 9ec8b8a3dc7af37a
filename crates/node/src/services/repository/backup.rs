//! BackupRepository and RestoreRepository: what the node keeps elsewhere, see [`crate::backup`].

use prost::Message;
use tabularium_proto::gitaly::{
    BackupRepositoryRequest, BackupRepositoryResponse, RestoreRepositoryRequest, RestoreRepositoryResponse,
    backup_repository_response, restore_repository_response,
};
use tonic::{Code, Status};

use crate::{
    backup::{self, BackupError, BackupId, Backups, Basis, Place, Wanted},
    error::{RepositoryError, with_detail},
    node::Node,
    votes::Voter,
};

pub(super) async fn back_up(
    node: &Node,
    request: &BackupRepositoryRequest,
) -> Result<BackupRepositoryResponse, Status> {
    const DOING: &str = "backup repository";
    let backups = configured(node, DOING)?;
    let id = named(&request.backup_id)?.ok_or_else(|| Status::invalid_argument("empty BackupId"))?;
    let repository = node.storages.open(request.repository.as_ref())?;
    let place = Place::of(request.vanity_repository.as_ref())?;
    let basis = match named(&request.latest_backup_id)? {
        _ if !request.incremental => Basis::Nothing,
        Some(id) => Basis::Of(id),
        None => Basis::Latest,
    };
    let taken = backup::take(node, backups, &repository, (&place, &id), basis).await;
    let detail = backup_repository_response::SkippedError {};
    taken.map_err(|error| told(DOING, error, "BackupRepositoryResponse.SkippedError", &detail))?;
    Ok(BackupRepositoryResponse {})
}

pub(super) async fn restore(
    node: &Node,
    request: &RestoreRepositoryRequest,
    voter: &Voter,
) -> Result<RestoreRepositoryResponse, Status> {
    const DOING: &str = "restore repository";
    let backups = configured(node, DOING)?;
    let invalid = |what: &str, error: RepositoryError| {
        let status = Status::from(error);
        Status::new(status.code(), format!("{DOING}: {what}: {}", status.message()))
    };
    let target = node.storages.locate(request.repository.as_ref());
    let target = target.map_err(|error| invalid("repository", error))?;
    let place = Place::of(request.vanity_repository.as_ref());
    let place = place.map_err(|error| invalid("vanity repository", error))?;
    let id = named(&request.backup_id)?;
    let wanted = Wanted { id, or_latest: request.use_latest, always_create: request.always_create };
    let restored = backup::restore(node, backups, &target, &place, wanted, voter).await;
    let detail = restore_repository_response::SkippedError {};
    restored.map_err(|error| told(DOING, error, "RestoreRepositoryResponse.SkippedError", &detail))?;
    Ok(RestoreRepositoryResponse {})
}

fn configured<'a>(node: &'a Node, doing: &str) -> Result<&'a Backups, Status> {
    let text = || Status::failed_precondition(format!("{doing}: server-side backups are not configured"));
    node.backups.as_ref().ok_or_else(text)
}

/// The name of a backup, if one is given.
fn named(text: &str) -> Result<Option<BackupId>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    BackupId::parse(text).map(Some).ok_or_else(|| Status::invalid_argument("invalid BackupId"))
}

fn told(doing: &str, error: BackupError, name: &str, detail: &impl Message) -> Status {
    match error {
        BackupError::Skipped(why) => {
            with_detail(Code::FailedPrecondition, &format!("{doing}: {why}"), name, detail)
        }
        BackupError::Failed(status) if status.code() == Code::Internal => {
            Status::internal(format!("{doing}: {}", status.message()))
        }
        BackupError::Failed(status) => status,
    }
}
