//! DiffService: how commits, trees and blobs differ. What git prints is read in `git::diff`.

mod blobs;
mod changed_paths;
mod commits;
mod patches;
mod ranges;
mod stats;

use std::sync::Arc;

use tabularium_proto::gitaly::{
    CommitDeltaRequest, CommitDeltaResponse, CommitDiffRequest, CommitDiffResponse, DiffBlobsRequest,
    DiffBlobsResponse, DiffStatsRequest, DiffStatsResponse, FindChangedPathsRequest,
    FindChangedPathsResponse, GetPatchIdRequest, GetPatchIdResponse, RangeDiffRequest, RangeDiffResponse,
    RawDiffRequest, RawDiffResponse, RawPatchRequest, RawPatchResponse, RawRangeDiffRequest,
    RawRangeDiffResponse, diff_service_server::DiffService,
};
use tonic::{Request, Response, Status};

use super::streams::ResponseStream;
use crate::{
    git::{Exit, GitCommand, revision},
    node::Node,
    storage::RepositoryPath,
};

/// Patches are sent in pieces of this many bytes.
const PATCH_PIECE_BYTES: usize = 5 * 1024;

/// The service.
pub(crate) struct DiffServer(Arc<Node>);

impl DiffServer {
    /// On this node.
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self(node)
    }
}

/// Two revisions that git is to make sense of.
fn check_sides(left: &str, right: &str) -> Result<(), Status> {
    for (side, missing) in [(left, "empty LeftCommitId"), (right, "empty RightCommitId")] {
        if side.is_empty() {
            return Err(Status::invalid_argument(missing));
        }
    }
    Ok(())
}

/// Answered where Gitaly puts the command together.
fn check_arguments<'a>(doing: &str, arguments: impl IntoIterator<Item = &'a [u8]>) -> Result<(), Status> {
    arguments.into_iter().try_for_each(|argument| {
        revision::check_argument(argument).map_err(|error| Status::internal(format!("{doing}: {error}")))
    })
}

/// `git diff`. No setting of the repository makes it run anything else.
fn diff_command(node: &Node, repository: &RepositoryPath) -> GitCommand {
    node.git.command(repository, "diff").reads().args(["--no-ext-diff", "--no-textconv"])
}

/// A command that failed because of what it was asked.
fn refused(doing: &str, exit: Exit) -> Status {
    Status::failed_precondition(format!("{doing}{exit}"))
}

/// A patch in pieces, with the last of them marked. An empty one is one empty piece.
fn pieces(patch: &[u8]) -> impl Iterator<Item = (&[u8], bool)> {
    let count = patch.len().div_ceil(PATCH_PIECE_BYTES).max(1);
    (1..=count).map(move |number| {
        let (start, end) = ((number - 1) * PATCH_PIECE_BYTES, number * PATCH_PIECE_BYTES);
        (patch.get(start..end.min(patch.len())).unwrap_or_default(), number == count)
    })
}

#[tonic::async_trait]
impl DiffService for DiffServer {
    async fn commit_diff(
        &self,
        request: Request<CommitDiffRequest>,
    ) -> Result<Response<ResponseStream<CommitDiffResponse>>, Status> {
        commits::commit_diff(&self.0, request.into_inner())
    }

    async fn commit_delta(
        &self,
        request: Request<CommitDeltaRequest>,
    ) -> Result<Response<ResponseStream<CommitDeltaResponse>>, Status> {
        commits::commit_delta(&self.0, request.into_inner())
    }

    async fn diff_stats(
        &self,
        request: Request<DiffStatsRequest>,
    ) -> Result<Response<ResponseStream<DiffStatsResponse>>, Status> {
        stats::diff_stats(&self.0, request.into_inner())
    }

    async fn find_changed_paths(
        &self,
        request: Request<FindChangedPathsRequest>,
    ) -> Result<Response<ResponseStream<FindChangedPathsResponse>>, Status> {
        changed_paths::find(&self.0, request.into_inner())
    }

    async fn raw_diff(
        &self,
        request: Request<RawDiffRequest>,
    ) -> Result<Response<ResponseStream<RawDiffResponse>>, Status> {
        patches::raw_diff(&self.0, &request.into_inner()).await
    }

    async fn raw_patch(
        &self,
        request: Request<RawPatchRequest>,
    ) -> Result<Response<ResponseStream<RawPatchResponse>>, Status> {
        patches::raw_patch(&self.0, &request.into_inner()).await
    }

    async fn diff_blobs(
        &self,
        request: Request<DiffBlobsRequest>,
    ) -> Result<Response<ResponseStream<DiffBlobsResponse>>, Status> {
        blobs::diff_blobs(&self.0, request.into_inner())
    }

    async fn get_patch_id(
        &self,
        request: Request<GetPatchIdRequest>,
    ) -> Result<Response<GetPatchIdResponse>, Status> {
        patches::patch_id(&self.0, &request.into_inner()).await.map(Response::new)
    }

    async fn range_diff(
        &self,
        request: Request<RangeDiffRequest>,
    ) -> Result<Response<ResponseStream<RangeDiffResponse>>, Status> {
        ranges::range_diff(&self.0, request.into_inner())
    }

    async fn raw_range_diff(
        &self,
        request: Request<RawRangeDiffRequest>,
    ) -> Result<Response<ResponseStream<RawRangeDiffResponse>>, Status> {
        ranges::raw_range_diff(&self.0, request.into_inner()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_patches() {
        let lengths = |size: usize| -> Vec<(usize, bool)> {
            pieces(&vec![b'x'; size]).map(|(piece, last)| (piece.len(), last)).collect()
        };
        assert_eq!(lengths(0), [(0, true)]);
        assert_eq!(lengths(5120), [(5120, true)]);
        assert_eq!(lengths(5121), [(5120, false), (1, true)]);
    }
}
