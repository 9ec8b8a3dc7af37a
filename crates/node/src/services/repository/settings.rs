//! SetFullPath, FullPath and ApplyGitattributes, which only older clients call.

use std::io;

use tabularium_proto::gitaly::{
    ApplyGitattributesRequest, ApplyGitattributesResponse, FullPathRequest, FullPathResponse,
    SetFullPathRequest, SetFullPathResponse,
};
use tonic::Status;

use super::files;
use crate::{
    error::internal_io,
    git::{
        catfile::{CatFile, ObjectKind},
        references, revision,
    },
    node::Node,
    place::{self, Temporary, blocking, replace_file},
    votes::{Ballot, Voter, agreed, ballot},
};

/// The setting that says by which name people know the repository.
const FULL_PATH: &str = "gitlab.fullpath";
/// Below a repository.
const ATTRIBUTES: &str = "info/attributes";
/// What is voted on when attributes go.
const GONE: Ballot = [0; 20];
/// Largest file of attributes; git reads no larger one.
const MAX_ATTRIBUTES_BYTES: usize = 100 * 1024 * 1024;

pub(super) async fn set_full_path(
    node: &Node,
    request: &SetFullPathRequest,
    voter: &Voter,
) -> Result<SetFullPathResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.path.is_empty() {
        return Err(Status::invalid_argument("no path provided"));
    }
    if request.path.contains('\0') {
        return Err(Status::invalid_argument("path contains NUL byte"));
    }
    let scratch = Temporary::new(node, &repository.storage, "config-")?;
    let draft = scratch.path().join("config");
    let setting = internal_io("setting config");
    tokio::fs::copy(repository.path.join("config"), &draft).await.map_err(setting)?;
    let command = node.git.bare_command("config").arg("--file").arg(&draft);
    command.args(["--replace-all", FULL_PATH, &request.path]).checked().await?;
    let config = tokio::fs::read(&draft).await.map_err(internal_io("setting config"))?;
    let ballot = ballot(&config);
    let replacing = files::replace_config(repository.clone(), config);
    agreed(&node.sections, voter, &repository.path, ballot.into(), replacing).await?;
    Ok(SetFullPathResponse {})
}

pub(super) async fn full_path(node: &Node, request: &FullPathRequest) -> Result<FullPathResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let output = node.git.command(&repository, "config").reads().arg(FULL_PATH).output().await?;
    if !output.exit.success() {
        return Err(Status::internal(format!("fetch config: {}", output.exit)));
    }
    let path = String::from_utf8_lossy(&output.stdout);
    Ok(FullPathResponse { path: path.strip_suffix('\n').unwrap_or(&path).to_owned() })
}

pub(super) async fn apply_attributes(
    node: &Node,
    request: &ApplyGitattributesRequest,
    voter: &Voter,
) -> Result<ApplyGitattributesResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(&request.revision)
        .map_err(|error| Status::invalid_argument(format!("revision: {error}")))?;
    let commit = [request.revision.as_slice(), b"^{commit}"].concat();
    let commit = references::resolve(&node.git, &repository, &commit).await?;
    let commit = commit.ok_or_else(|| Status::invalid_argument("revision does not exist"))?;
    let path = repository.path.clone();
    if let Some(content) = attributes(node, &repository, &commit).await? {
        let ballot = ballot(&content);
        let writing = blocking(move || {
            make_directory(&repository.path.join("info"))
                .and_then(|()| replace_file(&repository, ATTRIBUTES, &content))
                .map_err(internal_io("committing gitattributes"))
        });
        agreed(&node.sections, voter, &path, ballot.into(), writing).await?;
    } else {
        let file = path.join(ATTRIBUTES);
        let removing = blocking(move || remove(&file).map_err(internal_io("removing gitattributes")));
        agreed(&node.sections, voter, &path, GONE.into(), removing).await?;
    }
    Ok(ApplyGitattributesResponse {})
}

/// The attributes of a commit's files, if it has any.
async fn attributes(
    node: &Node,
    repository: &crate::storage::RepositoryPath,
    commit: &str,
) -> Result<Option<Vec<u8>>, Status> {
    let mut objects = CatFile::start(&node.git, repository).await?;
    let found = objects.open(format!("{commit}:.gitattributes").as_bytes()).await?;
    let mut content = None;
    if found.is_some_and(|found| found.kind == ObjectKind::Blob) {
        let mut read = Vec::new();
        while let Some(piece) = objects.chunk().await? {
            read.extend_from_slice(&piece);
            if read.len() > MAX_ATTRIBUTES_BYTES {
                return Err(Status::failed_precondition("the file of attributes is too large"));
            }
        }
        content = Some(read);
    }
    objects.close().await?;
    Ok(content)
}

fn make_directory(path: &std::path::Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => place::sync_parent(path),
    }
}

fn remove(file: &std::path::Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| place::sync_parent(file)),
    }
}
