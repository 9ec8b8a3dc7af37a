//! Patches as git writes them, and what tells equal ones.

use bytes::Bytes;
use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};
use tabularium_proto::gitaly::{
    GetPatchIdRequest, GetPatchIdResponse, RawDiffRequest, RawDiffResponse, RawPatchRequest, RawPatchResponse,
};

use tokio::io::AsyncWriteExt as _;
use tonic::{Response, Status};

use super::{check_arguments, check_sides, diff_command};
use crate::{
    git::{Exit, GitCommand, GitProcess},
    node::Node,
    services::streams::{self, ResponseStream},
};

pub(super) async fn raw_diff(
    node: &Node,
    request: &RawDiffRequest,
) -> Result<Response<ResponseStream<RawDiffResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let (left, right) = (request.left_commit_id.as_str(), request.right_commit_id.as_str());
    check_sides(left, right)?;
    check_arguments("cmd", [left.as_bytes(), right.as_bytes()])?;
    let command = diff_command(node, &repository);
    let command = command.args(["--full-index", "--end-of-options", left, right, "--"]);
    relay(command, |data| RawDiffResponse { data: data.to_vec() }).await
}

pub(super) async fn raw_patch(
    node: &Node,
    request: &RawPatchRequest,
) -> Result<Response<ResponseStream<RawPatchResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let (left, right) = (request.left_commit_id.as_str(), request.right_commit_id.as_str());
    check_sides(left, right)?;
    let range = format!("{left}..{right}");
    check_arguments("cmd", [range.as_bytes()])?;
    let command = node.git.command(&repository, "format-patch").reads();
    let command = command.args(["--no-ext-diff", "--no-textconv", "--stdout", "--signature=GitLab"]);
    let command = command.args(["--end-of-options", &range, "--"]);
    relay(command, |data| RawPatchResponse { data: data.to_vec() }).await
}

async fn relay<T: Send + 'static>(
    command: GitCommand,
    wrap: fn(Bytes) -> T,
) -> Result<Response<ResponseStream<T>>, Status> {
    let process = command.spawn(false).await?;
    let ended = |exit: Exit, _: Vec<u8>| {
        if exit.success() { Ok(Vec::new()) } else { Err(Status::internal(format!("cmd: {exit}"))) }
    };
    Ok(Response::new(streams::relay(Vec::new(), process, None, wrap, ended)))
}

pub(super) async fn patch_id(node: &Node, request: &GetPatchIdRequest) -> Result<GetPatchIdResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let (old, new) = (&request.old_revision, &request.new_revision);
    for (revision, missing) in [(old, "empty OldRevision"), (new, "empty NewRevision")] {
        if revision.is_empty() {
            return Err(Status::invalid_argument(missing));
        }
    }
    check_arguments("spawning diff", [old.as_slice(), new])?;
    let (differing, summing) = node.git.two_slots().await?;
    let mut command = diff_command(node, &repository).slot(&differing).arg("--full-index");
    if request.context_free {
        command = command.arg("-U0");
    }
    let command = command.arg("--end-of-options").args([OsStr::from_bytes(old), OsStr::from_bytes(new)]);
    let mut difference = command.arg("--").spawn(false).await?;
    let sum = node.git.bare_command("patch-id").reads().slot(&summing).arg("--verbatim");
    let sum = feed(&mut difference, sum.spawn(true).await?).await?;
    let (exit, _) = difference.finish().await?;
    if !exit.success() {
        return Err(Status::internal(format!("waiting for git-diff: {exit}")));
    }
    if sum.is_empty() {
        return Err(Status::failed_precondition("no difference between old and new revision"));
    }
    // The second word would be the commit, which a difference has not.
    let space = sum.iter().position(|byte| *byte == b' ');
    let id = space.and_then(|space| sum.get(..space));
    let id = id.ok_or_else(|| Status::failed_precondition("unexpected patch ID format"))?;
    Ok(GetPatchIdResponse { patch_id: String::from_utf8_lossy(id).into_owned() })
}

/// What the second process, which prints no more than a line, makes of what the first one prints.
async fn feed(source: &mut GitProcess, mut sink: GitProcess) -> Result<Vec<u8>, Status> {
    let unfed = |error| Status::internal(format!("waiting for patch-id: {error}"));
    if let Some(mut stdin) = sink.take_stdin() {
        while let Some(chunk) = source.read_chunk().await? {
            stdin.write_all(&chunk).await.map_err(unfed)?;
        }
        stdin.shutdown().await.map_err(unfed)?;
    }
    let mut printed = Vec::new();
    while let Some(chunk) = sink.read_chunk().await? {
        // The rest tells nothing.
        if printed.is_empty() {
            printed.extend_from_slice(&chunk);
        }
    }
    let (exit, _) = sink.finish().await?;
    if exit.success() { Ok(printed) } else { Err(Status::internal(format!("waiting for patch-id: {exit}"))) }
}
