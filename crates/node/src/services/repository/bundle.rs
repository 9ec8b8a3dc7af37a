//! Bundles, made and fetched, and the export in git's other form.

use std::{io, path::Path};

use bytes::Bytes;
use tabularium_proto::gitaly::{
    CreateBundleFromRefListRequest, CreateBundleFromRefListResponse, CreateBundleRequest,
    CreateBundleResponse, FastExportRequest, FastExportResponse, FetchBundleRequest, FetchBundleResponse,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Status, Streaming};

use super::write_ref::set_head_agreed;
use crate::{
    contents,
    error::internal_io,
    git::Exit,
    hooks,
    node::Node,
    peer::fetch_atomically,
    place::Temporary,
    services::streams::{self, ResponseStream},
    storage::RepositoryPath,
    votes::{Voter, ballot},
};

/// What bundles start with.
const SIGNATURES: [&[u8; 16]; 2] = [b"# v2 git bundle\n", b"# v3 git bundle\n"];

pub(super) async fn create(
    node: &Node,
    request: &CreateBundleRequest,
) -> Result<ResponseStream<CreateBundleResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let command = node.git.command(&repository, "bundle").reads().args(["create", "--quiet", "-", "--all"]);
    let process = command.spawn(false).await?;
    let ended = |exit, stderr: Vec<u8>| created(exit, &stderr);
    Ok(streams::relay(Vec::new(), process, None, |data: Bytes| CreateBundleResponse { data }, ended))
}

/// How making a bundle ended.
fn created<T>(exit: Exit, stderr: &[u8]) -> Result<Vec<T>, Status> {
    if exit.success() {
        return Ok(Vec::new());
    }
    let stderr = String::from_utf8_lossy(stderr);
    if stderr.starts_with("fatal: Refusing to create empty bundle.") {
        return Err(Status::failed_precondition("create bundle: refusing to create empty bundle"));
    }
    Err(Status::internal(format!("create bundle: {exit}: stderr: {stderr:?}")))
}

/// Of what the patterns name, which are in the form that `git rev-list` reads.
pub(super) async fn create_from_list(
    node: &Node,
    mut requests: Streaming<CreateBundleFromRefListRequest>,
) -> Result<ResponseStream<CreateBundleFromRefListResponse>, Status> {
    let Some(first) = requests.message().await? else {
        return Err(Status::internal("EOF"));
    };
    let repository = node.storages.open(first.repository.as_ref())?;
    let command = node.git.command(&repository, "bundle").reads();
    let command = command.args(["create", "--quiet", "-", "--ignore-missing", "--stdin"]);
    let mut process = command.spawn(true).await?;
    let lines = |request: CreateBundleFromRefListRequest| {
        let mut lines = request.patterns.join(&b'\n');
        lines.push(b'\n');
        Bytes::from(lines)
    };
    let first = lines(first);
    let pump = process.take_stdin().map(|stdin| {
        let fed = streams::feed(requests, first, lines, stdin);
        node.tasks.spawn("patterns of a bundle", fed).into()
    });
    let ended = |exit, stderr: Vec<u8>| created(exit, &stderr);
    let wrap = |data: Bytes| CreateBundleFromRefListResponse { data: data.to_vec() };
    Ok(streams::relay(Vec::new(), process, pump, wrap, ended))
}

/// Everything, in the form of `git fast-import`.
pub(super) async fn fast_export(
    node: &Node,
    request: &FastExportRequest,
) -> Result<ResponseStream<FastExportResponse>, Status> {
    if request.repository.is_none() {
        return Err(Status::invalid_argument("repository is not set"));
    }
    let repository = node.storages.open(request.repository.as_ref())?;
    let process = node.git.command(&repository, "fast-export").reads().arg("--all").spawn(false).await?;
    let ended = |exit: Exit, stderr: Vec<u8>| {
        if exit.success() {
            return Ok(Vec::new());
        }
        let stderr = String::from_utf8_lossy(&stderr);
        Err(Status::internal(format!("fast-export: {exit}, stderr: {stderr:?}")))
    };
    let wrap = |data: Bytes| FastExportResponse { data: data.to_vec() };
    Ok(streams::relay(Vec::new(), process, None, wrap, ended))
}

pub(super) async fn fetch(
    node: &Node,
    mut messages: Streaming<FetchBundleRequest>,
    voter: &Voter,
) -> Result<FetchBundleResponse, Status> {
    let mut first = messages.message().await?.unwrap_or_default();
    let repository = node.storages.open(first.repository.as_ref())?;
    let temporary = Temporary::new(node, &repository.storage, "bundle-")?;
    let bundle = temporary.path().join("bundle");
    let mut file = tokio::fs::File::create(&bundle).await.map_err(internal_io("keeping the bundle"))?;
    let mut data = std::mem::take(&mut first.data);
    loop {
        file.write_all(&data).await.map_err(internal_io("keeping the bundle"))?;
        match messages.message().await? {
            Some(message) => data = message.data,
            None => break,
        }
    }
    file.flush().await.map_err(internal_io("keeping the bundle"))?;
    drop(file);
    require_signature(&bundle).await?;

    // The bundle lies where only the node writes, so the file transport reaches nothing else.
    let session = node.hooks.session(voter, &repository);
    let command = || {
        hooks::attend(session.as_ref(), node.git.command(&repository, "fetch"))
            .env("GIT_ALLOW_PROTOCOL", "file")
            .config("fetch.recurseSubmodules=false")
            .args(["--quiet", "--force", "--no-tags", "--no-write-fetch-head"])
    };
    let output = fetch_atomically(command, &bundle.to_string_lossy(), &["+refs/*:refs/*"]).await?;
    if !output.exit.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let otherwise = || Status::internal(format!("fetch bundle: {}, stderr: {stderr:?}", output.exit));
        return Err(hooks::failure(session.as_ref()).unwrap_or_else(otherwise));
    }
    if first.update_head {
        update_head(node, &repository, &bundle, voter).await?;
    }
    if voter.takes_part() {
        // Also when nothing was new: the replicas then still have the same.
        let references = contents::references(&node.git, &repository, "refs/").await?;
        voter.committed(&repository.path, ballot(&references)).await?;
    }
    Ok(FetchBundleResponse {})
}

/// Git takes a local file that is no bundle for a link to a repository (`gitdir: …`) and would fetch from whichever the
/// caller names.
pub(super) async fn require_signature(bundle: &Path) -> Result<(), Status> {
    let mut beginning = [0; SIGNATURES[0].len()];
    let read = async {
        let mut file = tokio::fs::File::open(bundle).await?;
        file.read_exact(&mut beginning).await
    };
    match read.await {
        Ok(_) if SIGNATURES.contains(&&beginning) => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(internal_io("reading the bundle")(error))
        }
        Ok(_) | Err(_) => Err(Status::internal("fetch bundle: not a git bundle")),
    }
}

/// A bundle says which commit HEAD is at, but not by which branch.
async fn update_head(
    node: &Node,
    repository: &RepositoryPath,
    bundle: &Path,
    voter: &Voter,
) -> Result<(), Status> {
    let command = node.git.command(repository, "bundle").reads().arg("list-heads").arg(bundle);
    let listed = command.checked().await?;
    let current =
        node.git.command(repository, "symbolic-ref").reads().args(["--quiet", "HEAD"]).output().await?.stdout;
    match guess_head(&listed, current.trim_ascii()) {
        Some(head) if head != current.trim_ascii() => set_head_agreed(node, repository, &head, voter).await,
        _ => Ok(()),
    }
}

/// The branch at HEAD's commit: the present one if it fits, then `main`, `master`, and the first.
fn guess_head(listed: &[u8], current: &[u8]) -> Option<Vec<u8>> {
    let heads: Vec<(&[u8], &[u8])> = listed
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let space = line.iter().position(|byte| *byte == b' ')?;
            Some((&line[..space], &line[space + 1..]))
        })
        .collect();
    let (id, _) = heads.iter().find(|(_, name)| *name == b"HEAD")?;
    let fits = |wanted: &[u8]| heads.iter().any(|(found, name)| found == id && *name == wanted);
    for wanted in [current, b"refs/heads/main", b"refs/heads/master"] {
        if fits(wanted) {
            return Some(wanted.to_vec());
        }
    }
    let first = heads.iter().find(|(found, name)| found == id && name.starts_with(b"refs/heads/"));
    first.map(|(_, name)| name.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_is_guessed_from_its_commit() {
        let listed = b"1 refs/heads/a\n2 refs/heads/main\n1 refs/heads/z\n1 HEAD\n";
        assert_eq!(guess_head(listed, b"refs/heads/z").unwrap(), b"refs/heads/z");
        assert_eq!(guess_head(listed, b"refs/heads/main").unwrap(), b"refs/heads/a");
        assert_eq!(guess_head(b"2 refs/heads/main\n2 HEAD\n", b"").unwrap(), b"refs/heads/main");
        assert_eq!(guess_head(b"2 refs/heads/main\n", b"refs/heads/main"), None);
    }
}
