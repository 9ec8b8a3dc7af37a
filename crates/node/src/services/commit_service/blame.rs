//! RawBlame: who wrote which line.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use tabularium_proto::gitaly::{
    PathNotFoundError, RawBlameError, RawBlameRequest, RawBlameResponse,
    raw_blame_error::{Error, InvalidIgnoreRevsFormatError, OutOfRangeError, ResolveIgnoreRevsError},
};
use tokio::io::AsyncWriteExt as _;
use tonic::{Code, Response, Status};

use super::{invalid, last_commits::is_local};
use crate::{
    error::{internal_io, with_detail},
    git::{
        Exit,
        catfile::{CatFile, ObjectKind},
        revision,
    },
    node::Node,
    place::Temporary,
    services::streams::{self, ResponseStream},
    storage::RepositoryPath,
};

const IGNORED: &str = "ignore-revs";

/// `12,40`.
fn is_range(range: &[u8]) -> bool {
    let mut numbers = range.split(|byte| *byte == b',');
    let mut number =
        || numbers.next().is_some_and(|text| !text.is_empty() && text.iter().all(u8::is_ascii_digit));
    number() && number() && numbers.next().is_none()
}

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "RawBlameError", &RawBlameError { error: Some(error) })
}

pub(super) async fn raw_blame(
    node: &Node,
    request: RawBlameRequest,
) -> Result<Response<ResponseStream<RawBlameResponse>>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    revision::check(&request.revision).map_err(invalid)?;
    if request.path.is_empty() {
        return Err(Status::invalid_argument("empty Path"));
    }
    if !is_local(&request.path) {
        return Err(Status::invalid_argument("path escapes repository root"));
    }
    if !request.range.is_empty() && !is_range(&request.range) {
        return Err(Status::invalid_argument("invalid Range"));
    }
    let slot = node.git.slot().await?;
    let mut command = node.git.command(&repository, "blame").reads().slot(&slot).arg("-p");
    if !request.range.is_empty() {
        command = command.arg("-L").arg(OsStr::from_bytes(&request.range));
    }
    let mut ignored = None;
    if !request.ignore_revisions_blob.is_empty() {
        let mut objects = CatFile::start_in(&node.git, &repository, &slot).await?;
        let place = keep_ignored(node, &repository, &mut objects, &request.ignore_revisions_blob).await?;
        objects.close().await?;
        command = command.arg("--ignore-revs-file").arg(place.path().join(IGNORED));
        ignored = Some(place);
    }
    // It takes revisions up to the dashes, and no option begins like one that has been checked.
    let command =
        command.arg(OsStr::from_bytes(&request.revision)).arg("--").arg(OsStr::from_bytes(&request.path));
    let process = command.spawn(false).await?;
    let path = request.path;
    let ended = move |exit: Exit, stderr: Vec<u8>| {
        drop(ignored);
        if exit.success() { Ok(Vec::new()) } else { Err(failure(exit, &stderr, path)) }
    };
    let wrap = |data: bytes::Bytes| RawBlameResponse { data: data.to_vec() };
    Ok(Response::new(streams::relay(Vec::new(), process, None, wrap, ended)))
}

/// Git wants the list of commits to look through in a file.
async fn keep_ignored(
    node: &Node,
    repository: &RepositoryPath,
    objects: &mut CatFile,
    blob: &[u8],
) -> Result<Temporary, Status> {
    let refuse = |code, text: &str| {
        let ignore_revisions_blob = blob.to_vec();
        detailed(code, text, Error::ResolveIgnoreRevs(ResolveIgnoreRevsError { ignore_revisions_blob }))
    };
    let info = objects.open(blob).await?;
    let info = info.ok_or_else(|| refuse(Code::NotFound, "cannot resolve ignore-revs blob"))?;
    if info.kind != ObjectKind::Blob {
        return Err(refuse(Code::InvalidArgument, "ignore revision is not a blob"));
    }
    let place = Temporary::new(node, &repository.storage, "blame-")?;
    let mut file =
        tokio::fs::File::create(place.path().join(IGNORED)).await.map_err(internal_io("copying blob"))?;
    while let Some(piece) = objects.chunk().await? {
        file.write_all(&piece).await.map_err(internal_io("copying blob"))?;
    }
    file.flush().await.map_err(internal_io("copying blob"))?;
    Ok(place)
}

/// What git complains of.
fn failure(exit: Exit, stderr: &[u8], path: Vec<u8>) -> Status {
    let text = String::from_utf8_lossy(stderr);
    if text.starts_with("fatal: no such path ") {
        let error = Error::PathNotFound(PathNotFoundError { path });
        return detailed(Code::NotFound, "path not found in revision", error);
    }
    if let Some(content) = stderr.strip_prefix(b"fatal: invalid object name: ") {
        let error =
            Error::InvalidIgnoreRevsFormat(InvalidIgnoreRevsFormatError { content: content.to_vec() });
        return detailed(Code::NotFound, "invalid object name", error);
    }
    if let Some(actual_lines) = line_count(&text) {
        let error = Error::OutOfRange(OutOfRangeError { actual_lines });
        return detailed(Code::InvalidArgument, "range is outside of the file length", error);
    }
    Status::internal(format!("blaming file: {exit}"))
}

/// `fatal: file a has only 3 lines`.
fn line_count(text: &str) -> Option<u64> {
    let rest = text.strip_prefix("fatal: file ")?.strip_suffix('\n')?;
    let (_, rest) = rest.rsplit_once(" has only ")?;
    let (count, unit) = rest.split_once(' ')?;
    matches!(unit, "line" | "lines").then(|| count.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for good in ["1,2", "10,3"] {
            assert!(is_range(good.as_bytes()), "{good}");
        }
        for bad in ["", "1", "1,", ",2", "1,2,3", "1,+2", "/x/,2", "-1,2", "1,2\n"] {
            assert!(!is_range(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn complaints() {
        assert_eq!(line_count("fatal: file a has only 1 line\n"), Some(1));
        assert_eq!(line_count("fatal: file x has only y has only 30 lines\n"), Some(30));
        assert_eq!(line_count("fatal: file a has only x lines\n"), None);
        let status = failure(Exit { code: Some(128) }, b"fatal: bad revision 'x'\n", Vec::new());
        assert_eq!((status.code(), status.message()), (Code::Internal, "blaming file: exit status 128"));
    }
}
