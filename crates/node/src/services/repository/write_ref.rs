//! WriteRef, and which texts are refs and revisions (wire reference, section h.5).

use bytes::{BufMut as _, BytesMut};
use tabularium_proto::gitaly::{ReferenceNotFoundError, WriteRefRequest, WriteRefResponse};
use tonic::{Code, Status};

use crate::{error::with_detail, git::Git, node::Node, place, storage::RepositoryPath};

pub(super) async fn write(node: &Node, request: WriteRefRequest) -> Result<WriteRefResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check_revision(&request.r#ref)?;
    check_revision(&request.revision)?;
    if !request.old_revision.is_empty() {
        check_revision(&request.old_revision)?;
    }
    if request.r#ref == b"HEAD" {
        set_head(node, &repository, &request.revision).await?;
    } else {
        if !request.r#ref.starts_with(b"refs/") {
            return Err(Status::invalid_argument("ref has to be a full reference"));
        }
        update(&node.git, &repository, &request).await?;
    }
    Ok(WriteRefResponse {})
}

/// Points HEAD at a ref, which need not exist.
pub(super) async fn set_head(node: &Node, repository: &RepositoryPath, target: &[u8]) -> Result<(), Status> {
    if !is_full_reference(target) {
        return Err(Status::invalid_argument("invalid default branch: not a full reference name"));
    }
    let target = std::str::from_utf8(target)
        .map_err(|_| Status::invalid_argument("invalid default branch: not UTF-8"))?;
    let output = node.git.command(repository, "symbolic-ref").args(["HEAD", target]).output().await?;
    if !output.exit.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(if stderr.contains("File exists") {
            Status::aborted("reference is locked already")
        } else if stderr.contains("outside of refs/") {
            Status::invalid_argument(stderr.trim_end().to_owned())
        } else {
            output.into_error().into()
        });
    }
    // Git does not sync HEAD when it makes it point elsewhere.
    let head = repository.path.join("HEAD");
    place::blocking(move || {
        std::fs::File::open(&head)
            .and_then(|file| file.sync_all())
            .and_then(|()| place::sync_parent(&head))
            .map_err(crate::error::internal_io("syncing HEAD"))
    })
    .await
}

async fn update(git: &Git, repository: &RepositoryPath, request: &WriteRefRequest) -> Result<(), Status> {
    let new = resolve(git, repository, &request.revision, "new").await?;
    let old = match request.old_revision.as_slice() {
        [] => Vec::new(),
        old => resolve(git, repository, old, "old").await?,
    };
    let mut input = BytesMut::new();
    input.put_slice(b"update ");
    for part in [&request.r#ref, &new, &old] {
        input.put_slice(part);
        input.put_u8(0);
    }
    let output =
        git.command(repository, "update-ref").args(["--stdin", "-z"]).output_with(input.freeze()).await?;
    if output.exit.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(if stderr.contains("File exists") || stderr.contains("Unable to create") {
        Status::aborted("reference is locked already")
    } else if stderr.contains("but expected") || stderr.contains("reference already exists") {
        Status::failed_precondition("reference does not point to expected object")
    } else if stderr.contains("invalid ref format") {
        Status::invalid_argument("invalid reference name")
    } else {
        output.into_error().into()
    })
}

/// The object id a revision stands for. All zeros stay as they are: they mean "no object".
async fn resolve(
    git: &Git,
    repository: &RepositoryPath,
    revision: &[u8],
    which: &str,
) -> Result<Vec<u8>, Status> {
    if matches!(revision.len(), 40 | 64) && revision.iter().all(|byte| *byte == b'0') {
        return Ok(revision.to_vec());
    }
    let mut peeled = revision.to_vec();
    peeled.extend_from_slice(b"^{object}");
    let output = git
        .command(repository, "rev-parse")
        .reads()
        .args(["--verify", "--quiet", "--end-of-options"])
        .arg(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&peeled))
        .output()
        .await?;
    if output.exit.success() {
        return Ok(output.stdout.trim_ascii().to_vec());
    }
    let detail = ReferenceNotFoundError { reference_name: revision.to_vec() };
    let text = format!("resolving {which} revision: reference not found");
    Err(with_detail(Code::NotFound, &text, "ReferenceNotFoundError", &detail))
}

/// The generic check of a revision; git decides the rest.
pub(super) fn check_revision(revision: &[u8]) -> Result<(), Status> {
    let fault = if revision.is_empty() {
        "empty revision"
    } else if revision[0] == b'-' {
        "revision can't start with '-'"
    } else if revision.contains(&0) {
        "revision can't contain NUL"
    } else if revision.iter().any(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n')) {
        "revision can't contain whitespace"
    } else if revision.contains(&b':') {
        "revision can't contain ':'"
    } else if revision.contains(&b'\\') {
        "revision can't contain '\\'"
    } else {
        return Ok(());
    };
    Err(Status::invalid_argument(fault))
}

/// Whether the text is a full reference name, `refs/...`, by git's rules.
pub(super) fn is_full_reference(name: &[u8]) -> bool {
    let Some(rest) = name.strip_prefix(b"refs/") else { return false };
    !rest.is_empty()
        && !name.ends_with(b".")
        && !name.windows(2).any(|pair| pair == b"@{" || pair == b"..")
        && !name.iter().any(|byte| {
            *byte <= b' ' || *byte == 0x7f || matches!(byte, b':' | b'?' | b'[' | b'\\' | b'^' | b'~' | b'*')
        })
        && rest
            .split(|byte| *byte == b'/')
            .all(|part| !part.is_empty() && !part.starts_with(b".") && !part.ends_with(b".lock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_references() {
        for name in ["refs/heads/main", "refs/heads/a/b-c", "refs/heads/\u{fc}", "refs/x"] {
            assert!(is_full_reference(name.as_bytes()), "{name}");
        }
        for name in [
            "HEAD",
            "refs/",
            "refs",
            "heads/a",
            "refs/heads/",
            "refs/a..b",
            "refs/a@{1}",
            "refs/.a",
            "refs/a.lock",
            "refs/a.lock/b",
            "refs/a b",
            "refs/a\u{7f}",
            "refs/a.",
            "refs//a",
            "refs/a~1",
            "refs/a\n",
        ] {
            assert!(!is_full_reference(name.as_bytes()), "{name:?}");
        }
    }
}
