//! GetArchive.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use bytes::Bytes;
use tabularium_proto::gitaly::{GetArchiveRequest, GetArchiveResponse, get_archive_request::Format};
use tonic::Status;

use crate::{
    git::{Exit, revision},
    lfs_filter::Filter,
    node::Node,
    services::streams::{self, ResponseStream},
    storage::RepositoryPath,
};

pub(super) async fn get(
    node: &Node,
    request: GetArchiveRequest,
) -> Result<ResponseStream<GetArchiveResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(request.commit_id.as_bytes())
        .map_err(|error| Status::invalid_argument(format!("invalid commitId: {error}")))?;
    let format = match Format::try_from(request.format) {
        Ok(Format::Zip) => "zip",
        Ok(Format::Tar) => "tar",
        Ok(Format::TarGz) => "tar.gz",
        Ok(Format::TarBz2) => "tar.bz2",
        Err(_) => return Err(Status::invalid_argument("invalid format")),
    };
    let path = clean_path(&request.path)?;
    require(node, &repository, &request.commit_id, path, "path doesn't exist".to_owned()).await?;
    let mut excluded = Vec::new();
    for (index, exclude) in request.exclude.iter().enumerate() {
        let exclude = clean_path(exclude)?;
        require(node, &repository, &request.commit_id, exclude, format!("exclude[{index}] doesn't exist"))
            .await?;
        excluded.push(exclude);
    }
    if request.elide_path {
        // What is left out is named as before, although the paths in the archive begin behind it.
        for exclude in &excluded {
            if inside(path, exclude).is_none() {
                let (exclude, path) = (String::from_utf8_lossy(exclude), String::from_utf8_lossy(path));
                let text = format!("invalid exclude: {exclude:?} is not a subdirectory of {path:?}");
                return Err(Status::invalid_argument(text));
            }
        }
    }

    let mut command = node
        .git
        .command(&repository, "archive")
        .reads()
        .config("tar.tar.bz2.command=bzip2 -c")
        .arg(format!("--format={format}"))
        .env("GIT_LITERAL_PATHSPECS", "0");
    if !request.prefix.is_empty() {
        command = command.arg(format!("--prefix={}/", request.prefix.trim_end_matches('/')));
    }
    let mut pathspecs = Vec::new();
    if request.elide_path && path != b"." {
        let mut tree = request.commit_id.clone().into_bytes();
        tree.push(b':');
        tree.extend_from_slice(path);
        command = command.arg(OsStr::from_bytes(&tree));
        pathspecs.push(b".".to_vec());
        let inner = excluded.iter().filter_map(|exclude| inside(path, exclude));
        pathspecs.extend(inner.map(|exclude| [b":(exclude,literal)", exclude].concat()));
    } else {
        command = command.arg(&request.commit_id);
        pathspecs.push(if path == b"." { path.to_vec() } else { [b":(literal)", path].concat() });
        pathspecs.extend(excluded.iter().map(|exclude| [b":(exclude,literal)", *exclude].concat()));
    }
    // Without GitLab nobody has the files, and pointers stay what they are.
    let mut filter = None;
    if request.include_lfs_blobs && node.judges.access.asks() {
        let gl_repository = request.repository.map(|repository| repository.gl_repository).unwrap_or_default();
        let started = Filter::start(&node.tasks, &node.judges, gl_repository);
        let started =
            started.map_err(|error| Status::internal(format!("setting up smudge filter: {error}")))?;
        command = started.attach(command, &node.fetch_proxy);
        filter = Some(started);
    }
    command = command.arg("--").args(pathspecs.iter().map(|pathspec| OsStr::from_bytes(pathspec)));
    let process = command.spawn(false).await?;
    let ended = move |exit: Exit, stderr: Vec<u8>| {
        drop(filter);
        if exit.success() {
            return Ok(Vec::new());
        }
        let stderr = String::from_utf8_lossy(&stderr);
        Err(Status::internal(format!("git archive: {exit}, stderr: {stderr:?}")))
    };
    Ok(streams::relay(Vec::new(), process, None, |data: Bytes| GetArchiveResponse { data }, ended))
}

/// The rest of a path below a directory.
fn inside<'a>(directory: &[u8], path: &'a [u8]) -> Option<&'a [u8]> {
    path.strip_prefix(directory)?.strip_prefix(b"/")
}

/// Without slashes at the ends; `.` for the whole tree. Paths that leave the tree are refused.
fn clean_path(path: &[u8]) -> Result<&[u8], Status> {
    let mut path = path;
    while let Some(shorter) = path.strip_suffix(b"/") {
        path = shorter;
    }
    while let Some(shorter) = path.strip_prefix(b"./") {
        path = shorter;
    }
    if path.split(|byte| *byte == b'/').any(|part| part == b"..") || path.contains(&0) {
        return Err(Status::invalid_argument("relative path escapes root directory"));
    }
    if path.is_empty() { Ok(b".") } else { Ok(path) }
}

/// The path must name something in the commit; the whole tree must not be empty.
async fn require(
    node: &Node,
    repository: &RepositoryPath,
    commit: &str,
    path: &[u8],
    missing: String,
) -> Result<(), Status> {
    let mut command = node
        .git
        .command(repository, "ls-tree")
        .reads()
        .args(["-z", "--full-tree", "--end-of-options", commit])
        .env("GIT_LITERAL_PATHSPECS", "1");
    if path != b"." {
        command = command.arg("--").arg(OsStr::from_bytes(path));
    }
    let output = command.output().await?;
    if !output.exit.success() && path == b"." {
        return Err(Status::internal("object not found"));
    }
    if output.stdout.is_empty() { Err(Status::failed_precondition(missing)) } else { Ok(()) }
}
