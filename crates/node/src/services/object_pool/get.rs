//! GetObjectPool.

use tabularium_proto::gitaly::{GetObjectPoolRequest, GetObjectPoolResponse, ObjectPool, Repository};
use tonic::Status;

use super::{alternates, is_pool_path};
use crate::{error::internal_io, node::Node, storage::RepositoryPath};

pub(super) fn get(node: &Node, request: &GetObjectPoolRequest) -> Result<GetObjectPoolResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let lines = alternates::read(&repository.path).map_err(internal_io("reading alternates"))?;
    let Some(line) = lines.and_then(|lines| lines.into_iter().next()) else {
        return Ok(GetObjectPoolResponse::default());
    };
    let pool = pool(node, &repository, &line);
    if pool.is_none() {
        tracing::warn!(relative_path = repository.relative_path, line, "objects are borrowed from no pool");
    }
    let object_pool = pool.map(|pool| ObjectPool { repository: Some(pool) });
    Ok(GetObjectPoolResponse { object_pool })
}

/// The pool that a line means, if it is one.
fn pool(node: &Node, member: &RepositoryPath, line: &str) -> Option<Repository> {
    let objects = alternates::resolve(&member.path, line);
    let relative_path = objects.parent()?.strip_prefix(&member.storage.root).ok()?.to_str()?.to_owned();
    let storage_name = member.storage.name.clone();
    let pool = Repository { storage_name, relative_path, ..Repository::default() };
    let valid = objects.ends_with("objects")
        && is_pool_path(&pool.relative_path)
        && node.storages.open(Some(&pool)).is_ok();
    valid.then_some(pool)
}
