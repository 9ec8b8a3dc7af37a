//! Which references lead to an object: FindRefsByOID, ListBranchNamesContainingCommit, ListTagNamesContainingCommit.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    FindRefsByOidRequest, FindRefsByOidResponse, ListBranchNamesContainingCommitRequest,
    ListBranchNamesContainingCommitResponse, ListTagNamesContainingCommitRequest,
    ListTagNamesContainingCommitResponse, Repository,
};
use tonic::{Response, Status};

use super::list::SUBCOMMAND;
use crate::{
    git::{lines::Lines, revision, revision::ObjectHash},
    node::Node,
    services::{
        listing::{self, Batch},
        streams::ResponseStream,
    },
};

/// What git says when it is called wrongly.
const USAGE: i32 = 129;

pub(super) async fn find_refs_by_oid(
    node: &Node,
    request: FindRefsByOidRequest,
) -> Result<Response<FindRefsByOidResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.oid.is_empty() {
        return Err(Status::invalid_argument("empty Oid"));
    }
    let mut command = node.git.command(&repository, SUBCOMMAND).arg("--format=%(refname)");
    if !request.sort_field.is_empty() {
        command = command.arg(format!("--sort={}", request.sort_field));
    }
    command = command.arg(format!("--points-at={}", request.oid));
    if request.limit > 0 {
        command = command.arg(format!("--count={}", request.limit));
    }
    for pattern in &request.ref_patterns {
        revision::check_argument(pattern.as_bytes()).map_err(|error| Status::internal(error.to_string()))?;
    }
    command = if request.ref_patterns.is_empty() {
        command.args(["--", "refs/tags/", "refs/heads/"])
    } else {
        command.arg("--").args(&request.ref_patterns)
    };
    let output = command.reads().output().await?;
    if !output.exit.success() {
        let text = format!("for-each-ref pipeline command: {}", output.exit);
        let usage = output.exit.code == Some(USAGE);
        return Err(if usage { Status::invalid_argument(text) } else { Status::internal(text) });
    }
    let refs = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    Ok(Response::new(FindRefsByOidResponse { refs }))
}

pub(super) async fn branches_containing(
    node: &Arc<Node>,
    request: ListBranchNamesContainingCommitRequest,
) -> Result<Response<ResponseStream<ListBranchNamesContainingCommitResponse>>, Status> {
    let ListBranchNamesContainingCommitRequest { repository, commit_id, limit } = request;
    let asked = Asked { repository, commit_id, limit, prefix: "refs/heads/" };
    let wrap = |branch_names| ListBranchNamesContainingCommitResponse { branch_names };
    containing(node, asked, "ListBranchNamesContainingCommit", wrap).await
}

pub(super) async fn tags_containing(
    node: &Arc<Node>,
    request: ListTagNamesContainingCommitRequest,
) -> Result<Response<ResponseStream<ListTagNamesContainingCommitResponse>>, Status> {
    let ListTagNamesContainingCommitRequest { repository, commit_id, limit } = request;
    let asked = Asked { repository, commit_id, limit, prefix: "refs/tags/" };
    let wrap = |tag_names| ListTagNamesContainingCommitResponse { tag_names };
    containing(node, asked, "ListTagNamesContainingCommit", wrap).await
}

struct Asked {
    repository: Option<Repository>,
    commit_id: String,
    /// 0 is none.
    limit: u32,
    /// Left out of the names.
    prefix: &'static str,
}

async fn containing<T: Send + 'static>(
    node: &Arc<Node>,
    asked: Asked,
    name: &'static str,
    wrap: fn(Vec<Vec<u8>>) -> T,
) -> Result<Response<ResponseStream<T>>, Status> {
    let repository = node.storages.open(asked.repository.as_ref())?;
    let hash = ObjectHash::of(&repository).await?;
    let id = hash.parse(asked.commit_id.as_bytes());
    let id = id.map_err(|error| Status::invalid_argument(error.to_string()))?;
    let node = Arc::clone(node);
    Ok(listing::stream(&node.tasks.clone(), name, move |messages| async move {
        let mut command = node.git.command(&repository, SUBCOMMAND);
        command = command.arg("--format=%(refname)").arg(format!("--contains={id}"));
        if asked.limit > 0 {
            command = command.arg(format!("--count={}", asked.limit));
        }
        let mut lines = Lines::start(command.args(["--", asked.prefix]), SUBCOMMAND, b'\n').await?;
        let mut batch: Batch<Vec<u8>> = Batch::default();
        while let Some(line) = lines.next().await? {
            let name = line.strip_prefix(asked.prefix.as_bytes()).unwrap_or(&line).to_vec();
            if let Some(names) = batch.push(name) {
                messages.send(wrap(names)).await?;
            }
        }
        let (exit, _) = lines.finish().await?;
        if !exit.success() {
            return Err(Status::internal(exit.to_string()));
        }
        match batch.rest() {
            Some(names) => messages.send(wrap(names)).await,
            None => Ok(()),
        }
    }))
}
