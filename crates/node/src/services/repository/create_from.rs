//! CreateRepositoryFromURL and CreateRepositoryFromBundle: what git clones.

use tabularium_proto::gitaly::{
    CreateRepositoryFromBundleRequest, CreateRepositoryFromBundleResponse, CreateRepositoryFromUrlError,
    CreateRepositoryFromUrlRequest, CreateRepositoryFromUrlResponse, RemoteNotFoundError,
    create_repository_from_url_error::Error,
};
use tokio::io::AsyncWriteExt as _;
use tonic::{Code, Status, Streaming};

use super::bundle::require_signature;
use crate::{
    error::{internal_io, with_detail},
    git::{GitCommand, Output},
    node::Node,
    place::Building,
    remote_url::RemoteUrl,
    ssh_keys::SshKeys,
    votes::Voter,
};

pub(super) async fn url(
    node: &Node,
    request: &CreateRepositoryFromUrlRequest,
    voter: &Voter,
) -> Result<CreateRepositoryFromUrlResponse, Status> {
    let target = node.storages.locate(request.repository.as_ref())?;
    if request.url.is_empty() {
        return Err(Status::invalid_argument("empty Url"));
    }
    let url = RemoteUrl::parse(&request.url)?;
    let building = Building::prepare(node, &target)?;
    let command = node.git.bare_command("clone");
    let command = url.configure(command, &request.http_authorization_header, &request.resolved_address)?;
    let keys = SshKeys::write(node, &target, "", "")?;
    let command = keys.apply(command, url.host_key_alias(&request.resolved_address));
    let kind = if request.mirror { "--mirror" } else { "--bare" };
    let cloned = clone(command.arg(kind), &url.address(&request.resolved_address)?, &building).await?;
    if !cloned.exit.success() {
        let stderr = String::from_utf8_lossy(&cloned.stderr);
        let gone = |line: &str| line.starts_with("fatal: repository '") && line.ends_with("' not found");
        if stderr.lines().any(gone) {
            let error = Error::RemoteNotFound(RemoteNotFoundError {});
            let detail = CreateRepositoryFromUrlError { error: Some(error) };
            let text = "creating repository: cloning repository: repository at given URL not found";
            return Err(with_detail(Code::NotFound, text, "CreateRepositoryFromURLError", &detail));
        }
        tracing::info!(%stderr, "a repository could not be cloned");
        let text = format!("creating repository: cloning repository: {}", cloned.exit);
        return Err(Status::internal(text));
    }
    forget_origin(node, &building).await?;
    building.publish_agreed(node, voter).await?;
    Ok(CreateRepositoryFromUrlResponse {})
}

pub(super) async fn bundle(
    node: &Node,
    mut messages: Streaming<CreateRepositoryFromBundleRequest>,
    voter: &Voter,
) -> Result<CreateRepositoryFromBundleResponse, Status> {
    let first = messages.message().await?;
    let first = first.ok_or_else(|| Status::internal("first request failed: EOF"))?;
    let target = node.storages.locate(first.repository.as_ref())?;
    let building = Building::prepare(node, &target)?;
    let path = building.scratch().join("bundle");
    let keeping = || internal_io("keeping the bundle");
    let mut file = tokio::fs::File::create(&path).await.map_err(keeping())?;
    let mut data = first.data;
    loop {
        file.write_all(&data).await.map_err(keeping())?;
        match messages.message().await? {
            Some(message) => data = message.data,
            None => break,
        }
    }
    file.flush().await.map_err(keeping())?;
    drop(file);
    let failed = |why: &str| Status::internal(format!("creating repository: cloning bundle: {why}"));
    require_signature(&path).await.map_err(|_| failed("not a git bundle"))?;
    // The bundle lies where only the node writes, so the file transport reaches nothing else.
    let command = node.git.bare_command("clone").env("GIT_ALLOW_PROTOCOL", "file").arg("--mirror");
    let cloned = clone(command, &path.to_string_lossy(), &building).await?;
    if !cloned.exit.success() {
        let stderr = String::from_utf8_lossy(&cloned.stderr);
        return Err(failed(&format!("{}, stderr: {stderr:?}", cloned.exit)));
    }
    forget_origin(node, &building).await?;
    building.publish_agreed(node, voter).await?;
    Ok(CreateRepositoryFromBundleResponse {})
}

async fn clone(command: GitCommand, from: &str, building: &Building) -> Result<Output, Status> {
    // What HEAD names where the other side does not say, whichever git this is.
    let command = command.config("init.defaultBranch=main").config("fetch.recurseSubmodules=false");
    let command = command.args(["--quiet", "--template=", "--", from]);
    Ok(command.arg(&building.repository().path).output().await?)
}

/// Nobody fetches from there by name.
async fn forget_origin(node: &Node, building: &Building) -> Result<(), Status> {
    let command = node.git.command(building.repository(), "config");
    command.args(["--remove-section", "remote.origin"]).checked().await?;
    Ok(())
}
