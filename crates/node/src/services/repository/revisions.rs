//! Where histories meet, and how much space what revisions lead to takes.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use tabularium_proto::gitaly::{
    FindMergeBaseRequest, FindMergeBaseResponse, ObjectsSizeRequest, ObjectsSizeResponse,
};
use tokio::io::AsyncWriteExt as _;
use tonic::{Status, Streaming};

use crate::{git::revision, node::Node};

pub(super) async fn merge_base(
    node: &Node,
    request: FindMergeBaseRequest,
) -> Result<FindMergeBaseResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.revisions.len() < 2 {
        return Err(Status::invalid_argument("at least 2 revisions are required"));
    }
    for name in &request.revisions {
        revision::check_argument(name).map_err(|error| Status::internal(format!("cmd: {error}")))?;
    }
    let command = node.git.command(&repository, "merge-base").reads().arg("--end-of-options");
    let names = request.revisions.iter().map(|name| OsStr::from_bytes(name));
    let output = command.args(names).output().await?;
    // Revisions that do not exist have nothing in common.
    let base = if output.exit.success() { output.stdout } else { Vec::new() };
    Ok(FindMergeBaseResponse { base: String::from_utf8_lossy(base.trim_ascii_end()).into_owned() })
}

pub(super) async fn objects_size(
    node: &Node,
    mut requests: Streaming<ObjectsSizeRequest>,
) -> Result<ObjectsSizeResponse, Status> {
    let Some(mut request) = requests.message().await? else {
        return Err(Status::internal("receiving initial request: EOF"));
    };
    let repository = node.storages.open(request.repository.take().as_ref())?;
    let command = node.git.command(&repository, "rev-list").reads();
    let mut process = command.args(["--disk-usage", "--objects", "--stdin"]).spawn(true).await?;
    let mut stdin = process.take_stdin();
    loop {
        if request.repository.is_some() {
            return Err(Status::invalid_argument("subsequent requests must not contain repository"));
        }
        if request.revisions.is_empty() {
            return Err(Status::invalid_argument("no revisions specified"));
        }
        for name in request.revisions {
            revision::check_pseudo(&name)
                .map_err(|error| Status::invalid_argument(format!("validating revision: {error}")))?;
            if let Some(input) = &mut stdin {
                // Git ends as soon as it meets a revision that does not exist, and says so.
                if input.write_all(&[name.as_slice(), b"\n"].concat()).await.is_err() {
                    stdin = None;
                }
            }
        }
        match requests.message().await? {
            Some(next) => request = next,
            None => break,
        }
    }
    drop(stdin);
    let mut printed = Vec::new();
    while let Some(chunk) = process.read_chunk().await? {
        // It is one number.
        if printed.is_empty() {
            printed.extend_from_slice(&chunk);
        }
    }
    let (exit, stderr) = process.finish().await?;
    if !exit.success() {
        if stderr.starts_with(b"fatal: bad revision '") {
            return Err(Status::not_found("revision not found"));
        }
        let code = exit.code.unwrap_or(-1);
        return Err(Status::internal(format!("rev-list failed with error code {code}")));
    }
    let text = String::from_utf8_lossy(printed.trim_ascii()).into_owned();
    let size = text.parse();
    let size = size.map_err(|_| Status::internal(format!("parsing object size: {text:?}")))?;
    Ok(ObjectsSizeResponse { size })
}
