//! CreateObjectPool: a pool that begins with what one repository has.

use tabularium_proto::gitaly::{CreateObjectPoolRequest, CreateObjectPoolResponse};
use tonic::{Code, Status};

use super::{fetch_beside, locate, no_pool};
use crate::{
    error::CreationError,
    git::{references, revision::ObjectHash},
    node::Node,
    place::Building,
    votes::Voter,
};

pub(super) async fn create(
    node: &Node,
    request: &CreateObjectPoolRequest,
    voter: &Voter,
) -> Result<CreateObjectPoolResponse, Status> {
    if request.origin.is_none() {
        return Err(Status::invalid_argument("no origin repository"));
    }
    if request.object_pool.as_ref().is_none_or(|pool| pool.repository.is_none()) {
        return Err(no_pool());
    }
    let (pool, _) = locate(node, request.object_pool.as_ref())?;
    let origin = node.storages.open(request.origin.as_ref()).map_err(|error| {
        let status = Status::from(error);
        let text = format!("creating object pool: getting source repository path: {}", status.message());
        Status::new(status.code(), text)
    })?;
    let hash = ObjectHash::of(&origin).await?;
    let head = references::head_target(&node.git, &origin).await?;
    let head = head.and_then(|head| head.strip_prefix(b"refs/heads/").map(<[u8]>::to_vec));
    let branch = head.and_then(|branch| String::from_utf8(branch).ok()).unwrap_or_else(|| "main".to_owned());
    let building = Building::begin(node, &pool, &branch, hash.name()).await.map_err(refusal)?;
    // Not a copy of files: of what no reference holds nothing comes along.
    let fetch = fetch_beside(node, node.git.command(building.repository(), "fetch"))
        .args(["--quiet", "--no-tags", "--no-write-fetch-head"])
        .arg(&origin.path)
        .args(["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"])
        .output()
        .await?;
    if !fetch.exit.success() {
        let stderr = String::from_utf8_lossy(&fetch.stderr);
        let text = format!("creating object pool: cloning to pool: {}, stderr: {stderr:?}", fetch.exit);
        return Err(Status::internal(text));
    }
    building.publish_agreed(node, voter).await.map_err(refusal)?;
    Ok(CreateObjectPoolResponse {})
}

fn refusal(error: CreationError) -> Status {
    match error {
        CreationError::Failed(status) if status.code() == Code::Aborted => status,
        error => {
            let status = error.while_doing("creating object pool");
            match status.code() {
                // GitLab knows a pool that is there by this code.
                Code::AlreadyExists => Status::failed_precondition(status.message()),
                _ => status,
            }
        }
    }
}
