//! WriteRef.

use bytes::{BufMut as _, BytesMut};
use tabularium_proto::gitaly::{ReferenceNotFoundError, WriteRefRequest, WriteRefResponse};
use tonic::{Code, Status};

use crate::{
    error::with_detail,
    git::{
        Git, references,
        revision::{self, RevisionError},
    },
    node::Node,
    place,
    storage::RepositoryPath,
};

pub(super) async fn write(node: &Node, request: WriteRefRequest) -> Result<WriteRefResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let invalid = |error: RevisionError| Status::invalid_argument(error.to_string());
    revision::check(&request.r#ref).map_err(invalid)?;
    revision::check(&request.revision).map_err(invalid)?;
    revision::check_or_empty(&request.old_revision).map_err(invalid)?;
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
    if revision::check_reference(target).is_err() {
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
    let peeled = [revision, b"^{object}"].concat();
    if let Some(id) = references::resolve(git, repository, &peeled).await? {
        return Ok(id.into_bytes());
    }
    let detail = ReferenceNotFoundError { reference_name: revision.to_vec() };
    let text = format!("resolving {which} revision: reference not found");
    Err(with_detail(Code::NotFound, &text, "ReferenceNotFoundError", &detail))
}
