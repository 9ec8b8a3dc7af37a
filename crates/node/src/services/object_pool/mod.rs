//! ObjectPoolService: objects that many repositories share are kept once, in a *pool*, a repository that nobody works in. Its
//! *members* borrow its objects ([`alternates`]).
//!
//! No object ever leaves a pool, for nobody knows who borrows it. What brings objects in sees to it that references hold all of
//! them ([`fetch`]), so a copy of a pool lacks nothing; upkeep keeps the rest as well. A pool that goes gives its members what
//! they have borrowed first ([`disconnect`]).

pub(crate) mod alternates;
mod create;
mod disconnect;
mod fetch;
mod get;
mod link;
mod members;

use std::{ffi::OsString, sync::Arc};

use tabularium_proto::gitaly::{
    CreateObjectPoolRequest, CreateObjectPoolResponse, DisconnectGitAlternatesRequest,
    DisconnectGitAlternatesResponse, FetchIntoObjectPoolRequest, FetchIntoObjectPoolResponse,
    GetObjectPoolRequest, GetObjectPoolResponse, LinkRepositoryToObjectPoolRequest,
    LinkRepositoryToObjectPoolResponse, ObjectPool, Repository,
    object_pool_service_server::ObjectPoolService,
};
use tonic::{Request, Response, Status};

use crate::{git::GitCommand, node::Node, storage::RepositoryPath, votes::Voter};

pub(crate) use disconnect::release_members;

/// The service.
pub(crate) struct ObjectPoolServer(Arc<Node>);

impl ObjectPoolServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl ObjectPoolService for ObjectPoolServer {
    async fn create_object_pool(
        &self,
        request: Request<CreateObjectPoolRequest>,
    ) -> Result<Response<CreateObjectPoolResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        create::create(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn link_repository_to_object_pool(
        &self,
        request: Request<LinkRepositoryToObjectPoolRequest>,
    ) -> Result<Response<LinkRepositoryToObjectPoolResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        link::link(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn disconnect_git_alternates(
        &self,
        request: Request<DisconnectGitAlternatesRequest>,
    ) -> Result<Response<DisconnectGitAlternatesResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        disconnect::disconnect(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn fetch_into_object_pool(
        &self,
        request: Request<FetchIntoObjectPoolRequest>,
    ) -> Result<Response<FetchIntoObjectPoolResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        fetch::fetch(&self.0, &request.into_inner(), &voter).await.map(Response::new)
    }

    async fn get_object_pool(
        &self,
        request: Request<GetObjectPoolRequest>,
    ) -> Result<Response<GetObjectPoolResponse>, Status> {
        get::get(&self.0, &request.into_inner()).map(Response::new)
    }
}

/// Whether pools may be at a path: as GitLab names them, or as they are named among replicas.
pub(crate) fn is_pool_path(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    let hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    match parts[..] {
        [.., top, "pools", one, two, id] if top.ends_with("@cluster") => {
            hex(one, 2) && hex(two, 2) && !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit())
        }
        [.., top, one, two, name] if top.ends_with("@pools") => {
            let digest = name.strip_suffix(".git").unwrap_or_default();
            hex(one, 2) && hex(two, 2) && hex(digest, 64) && digest.starts_with(&format!("{one}{two}"))
        }
        _ => false,
    }
}

fn no_pool() -> Status {
    Status::invalid_argument("no object pool repository")
}

fn no_pool_path() -> Status {
    Status::invalid_argument("invalid object pool directory")
}

/// Where a pool is or would be, as a request says.
fn locate<'a>(node: &Node, pool: Option<&'a ObjectPool>) -> Result<(RepositoryPath, &'a Repository), Status> {
    let sent = pool.and_then(|pool| pool.repository.as_ref()).ok_or_else(no_pool)?;
    if !is_pool_path(&sent.relative_path) {
        return Err(no_pool_path());
    }
    Ok((node.storages.locate(Some(sent))?, sent))
}

/// `git fetch` from another repository of the same storage.
pub(crate) fn fetch_beside(node: &Node, fetch: GitCommand) -> GitCommand {
    // Git takes away every setting from the one that serves the other side, also the one that says whose directories count.
    let mut option = OsString::from("--upload-pack='");
    option.push(node.git.binary().to_string_lossy().replace('\'', r"'\''"));
    option.push("' -c 'safe.directory=*' upload-pack");
    fetch.env("GIT_ALLOW_PROTOCOL", "file").config("fetch.recurseSubmodules=false").arg(option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_known_by_their_paths() {
        let digest = format!("ab12{}", "0".repeat(60));
        for pool in [format!("@pools/ab/12/{digest}.git"), "@cluster/pools/6b/86/17".to_owned()] {
            assert!(is_pool_path(&pool), "{pool}");
        }
        for other in [
            format!("@pools/ab/13/{digest}.git"),
            format!("@pools/ab/12/{digest}"),
            format!("@hashed/ab/12/{digest}.git"),
            "@cluster/pools/6b/86/x".to_owned(),
            "@cluster/repositories/6b/86/17".to_owned(),
            "pools/6b/86/17".to_owned(),
            String::new(),
        ] {
            assert!(!is_pool_path(&other), "{other}");
        }
    }
}
