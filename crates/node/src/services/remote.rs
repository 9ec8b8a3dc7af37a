//! `gitaly.RemoteService`: questions to repositories outside the cluster (wire reference, section b.8).

use std::{sync::Arc, time::Duration};

use tabularium_proto::gitaly::{
    FindRemoteRepositoryRequest, FindRemoteRepositoryResponse, FindRemoteRootRefRequest,
    FindRemoteRootRefResponse, UpdateRemoteMirrorRequest, UpdateRemoteMirrorResponse,
    remote_service_server::RemoteService,
};
use tonic::{Request, Response, Status, Streaming};

use super::remote_mirror;
use crate::{
    node::Node,
    remote_url::{REMOTE, RemoteUrl},
};

/// How long a remote may take to list its refs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct RemoteServer(Arc<Node>);

impl RemoteServer {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

fn no_answer(_: tokio::time::error::Elapsed) -> Status {
    Status::deadline_exceeded("the remote does not answer")
}

#[tonic::async_trait]
impl RemoteService for RemoteServer {
    async fn find_remote_repository(
        &self,
        request: Request<FindRemoteRepositoryRequest>,
    ) -> Result<Response<FindRemoteRepositoryResponse>, Status> {
        let request = request.into_inner();
        if request.remote.is_empty() {
            return Err(Status::invalid_argument("empty remote can't be checked."));
        }
        let url = RemoteUrl::parse(&request.remote)?;
        let command = url.configure(self.0.git.bare_command("ls-remote"), "", "")?;
        let output = tokio::time::timeout(ANSWER_TIMEOUT, command.args([REMOTE, "HEAD"]).output())
            .await
            .map_err(no_answer)??;
        Ok(Response::new(FindRemoteRepositoryResponse { exists: output.exit.success() }))
    }

    async fn find_remote_root_ref(
        &self,
        request: Request<FindRemoteRootRefRequest>,
    ) -> Result<Response<FindRemoteRootRefResponse>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        if request.remote_url.is_empty() {
            return Err(Status::invalid_argument("missing remote URL"));
        }
        let url = RemoteUrl::parse(&request.remote_url)?;
        let command = self.0.git.command(&repository, "ls-remote").reads();
        let command =
            url.configure(command, &request.http_authorization_header, &request.resolved_address)?;
        let output =
            tokio::time::timeout(ANSWER_TIMEOUT, command.args(["--symref", REMOTE, "HEAD"]).output())
                .await
                .map_err(no_answer)??;
        if !output.exit.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let text = format!("couldn't query the remote HEAD: {}", stderr.trim_end());
            return Err(if is_absence(&stderr) { Status::not_found(text) } else { Status::internal(text) });
        }
        let name = root_branch(&output.stdout).ok_or_else(|| Status::not_found("no remote HEAD found"))?;
        Ok(Response::new(FindRemoteRootRefResponse { r#ref: name }))
    }

    async fn update_remote_mirror(
        &self,
        request: Request<Streaming<UpdateRemoteMirrorRequest>>,
    ) -> Result<Response<UpdateRemoteMirrorResponse>, Status> {
        remote_mirror::update(&self.0, request.into_inner()).await.map(Response::new)
    }
}

/// The remote answered that there is nothing, as opposed to not answering.
fn is_absence(stderr: &str) -> bool {
    stderr.contains("not found") || stderr.contains("does not appear to be a git repository")
}

/// The short name of the branch in the line `ref: refs/heads/main HEAD`, whose second gap is a tab.
fn root_branch(listed: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(listed);
    let line = text.lines().find_map(|line| line.strip_prefix("ref: ")?.strip_suffix("\tHEAD"));
    line?.strip_prefix("refs/heads/").filter(|name| *name != "(unknown)").map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_branch_is_where_head_points() {
        assert_eq!(root_branch(b"ref: refs/heads/a/b\tHEAD\n1234\tHEAD\n").as_deref(), Some("a/b"));
        assert_eq!(root_branch(b"1234\tHEAD\n"), None);
        assert_eq!(root_branch(b""), None);
    }
}
