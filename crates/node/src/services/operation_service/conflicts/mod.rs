//! ConflictsService: what keeps two commits from being merged is shown to people, who say what is to become of it.

mod list;
mod markers;
mod resolve;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    ListConflictFilesRequest, ListConflictFilesResponse, ResolveConflictsRequest, ResolveConflictsResponse,
    conflicts_service_server::ConflictsService,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    error::GitError,
    git::{catfile::CatFile, command::MAX_CAPTURED_BYTES},
    node::Node,
    peer::Peers,
    services::{listing, streams::ResponseStream},
    votes::Voter,
};

/// The service.
pub(crate) struct ConflictsServer(Arc<Node>);

impl ConflictsServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

#[tonic::async_trait]
impl ConflictsService for ConflictsServer {
    async fn list_conflict_files(
        &self,
        request: Request<ListConflictFilesRequest>,
    ) -> Result<Response<ResponseStream<ListConflictFilesResponse>>, Status> {
        let request = request.into_inner();
        let repository = self.0.storages.open(request.repository.as_ref())?;
        list::check(&request)?;
        let node = Arc::clone(&self.0);
        Ok(listing::stream(&self.0.tasks, "ListConflictFiles", |messages| {
            list::list(node, repository, request, messages)
        }))
    }

    async fn resolve_conflicts(
        &self,
        request: Request<Streaming<ResolveConflictsRequest>>,
    ) -> Result<Response<ResolveConflictsResponse>, Status> {
        let voter = Voter::of(request.metadata(), request.extensions())?;
        let (metadata, extensions, requests) = request.into_parts();
        resolve::resolve(&self.0, requests, &Peers::of(metadata, extensions), &voter).await
    }
}

/// The whole content of the object at a path below a tree; `None` if there is none.
async fn content(objects: &mut CatFile, tree: &str, path: &[u8]) -> Result<Option<Vec<u8>>, GitError> {
    let revision = [tree.as_bytes(), b":", path].concat();
    if objects.open(&revision).await?.is_none() {
        return Ok(None);
    }
    let mut content = Vec::new();
    while let Some(piece) = objects.chunk().await? {
        content.extend_from_slice(&piece);
        if content.len() > MAX_CAPTURED_BYTES {
            return Err(GitError::TooMuchOutput { subcommand: "cat-file", limit: MAX_CAPTURED_BYTES });
        }
    }
    Ok(Some(content))
}

/// Git's markers name commits; clients know markers that name files.
fn name_files(content: &[u8], ours: (&str, &[u8]), theirs: (&str, &[u8])) -> Vec<u8> {
    let content = replace(content, ours.0.as_bytes(), ours.1);
    replace(&content, theirs.0.as_bytes(), theirs.1)
}

fn replace(content: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(content.len());
    let mut rest = content;
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        replaced.extend_from_slice(rest.get(..at).unwrap_or_default());
        replaced.extend_from_slice(to);
        rest = rest.get(at + from.len()..).unwrap_or_default();
    }
    replaced.extend_from_slice(rest);
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_name_files() {
        let (ours, theirs) = ("aaaa", "bbbb");
        let content = b"<<<<<<< aaaa\n1\n=======\n2\n>>>>>>> bbbb\n";
        let named = name_files(content, (ours, b"old"), (theirs, b"a longer name"));
        assert_eq!(named, b"<<<<<<< old\n1\n=======\n2\n>>>>>>> a longer name\n");
        assert_eq!(replace(b"aaaaaaaa.", b"aaaa", b""), b".");
    }
}
