//! WriteRef.

use tabularium_proto::gitaly::{ReferenceNotFoundError, WriteRefRequest, WriteRefResponse};
use tonic::{Code, Status};

use crate::{
    error::with_detail,
    git::{
        Git, references,
        revision::{self, RevisionError},
        update_ref::{Expected, Transaction, UpdateRefError},
    },
    node::Node,
    place,
    storage::RepositoryPath,
    votes::{Voter, agreed, ballot},
};

pub(super) async fn write(
    node: &Node,
    request: WriteRefRequest,
    voter: &Voter,
) -> Result<WriteRefResponse, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    let invalid =
        |what| move |error: RevisionError| Status::invalid_argument(format!("invalid {what}: {error}"));
    revision::check(&request.r#ref).map_err(invalid("ref"))?;
    revision::check(&request.revision).map_err(invalid("revision"))?;
    revision::check_or_empty(&request.old_revision).map_err(invalid("OldRevision"))?;
    if request.r#ref == b"HEAD" {
        set_head_agreed(node, &repository, &request.revision, voter).await?;
    } else {
        if !request.r#ref.starts_with(b"refs/") {
            return Err(Status::invalid_argument("ref has to be a full reference"));
        }
        update(node, &repository, &request, voter).await?;
    }
    Ok(WriteRefResponse {})
}

/// Points HEAD at a ref, which need not exist, if the replicas agree.
pub(super) async fn set_head_agreed(
    node: &Node,
    repository: &RepositoryPath,
    target: &[u8],
    voter: &Voter,
) -> Result<(), Status> {
    check_head(target)?;
    let ballot = ballot(&[b"ref: ", target, b"\n"].concat());
    let setting = set_head(&node.git, repository, target);
    agreed(&node.sections, voter, &repository.path, ballot.into(), setting).await
}

fn check_head(target: &[u8]) -> Result<&str, Status> {
    if revision::check_reference(target).is_err() {
        return Err(Status::invalid_argument("invalid default branch: not a full reference name"));
    }
    std::str::from_utf8(target).map_err(|_| Status::invalid_argument("invalid default branch: not UTF-8"))
}

/// Points HEAD at a ref, which need not exist.
pub(super) async fn set_head(git: &Git, repository: &RepositoryPath, target: &[u8]) -> Result<(), Status> {
    let target = check_head(target)?;
    let output = git.command(repository, "symbolic-ref").args(["HEAD", target]).output().await?;
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

async fn update(
    node: &Node,
    repository: &RepositoryPath,
    request: &WriteRefRequest,
    voter: &Voter,
) -> Result<(), Status> {
    let new = resolve(&node.git, repository, &request.revision, "new").await?;
    let expected = match request.old_revision.as_slice() {
        [] => Expected::Any,
        old => Expected::Value(resolve(&node.git, repository, old, "old").await?),
    };
    if revision::check_reference(&request.r#ref).is_err() {
        return Err(Status::invalid_argument("invalid reference name"));
    }
    move_reference(node, repository, (&request.r#ref, &new, &expected), voter).await.map_err(failed)
}

/// Makes one reference (its name, what it is to point to, what it has to point to) point elsewhere. No hook is asked.
pub(super) async fn move_reference(
    node: &Node,
    repository: &RepositoryPath,
    (reference, new, expected): (&[u8], &str, &Expected),
    voter: &Voter,
) -> Result<(), UpdateRefError> {
    let mut transaction = Transaction::start(&node.git, repository, true).await?;
    transaction.update(reference, new, expected).await?;
    transaction.commit(node, voter).await
}

fn failed(error: UpdateRefError) -> Status {
    match error {
        UpdateRefError::Locked { .. } => Status::aborted("reference is locked already"),
        UpdateRefError::Mismatch { .. } => {
            Status::failed_precondition("reference does not point to expected object")
        }
        UpdateRefError::Invalid { .. } => Status::invalid_argument("invalid reference name"),
        UpdateRefError::Vote(error) => error.into(),
        UpdateRefError::Git(error) => error.into(),
        error @ (UpdateRefError::MissingObject { .. }
        | UpdateRefError::NotACommit { .. }
        | UpdateRefError::Conflict { .. }
        | UpdateRefError::Repeated { .. }) => Status::internal(error.to_string()),
    }
}

/// The object id a revision stands for. All zeros stay as they are: they mean "no object".
async fn resolve(
    git: &Git,
    repository: &RepositoryPath,
    revision: &[u8],
    which: &str,
) -> Result<String, Status> {
    if matches!(revision.len(), 40 | 64) && revision.iter().all(|byte| *byte == b'0') {
        return Ok("0".repeat(revision.len()));
    }
    let peeled = [revision, b"^{object}"].concat();
    if let Some(id) = references::resolve(git, repository, &peeled).await? {
        return Ok(id);
    }
    let detail = ReferenceNotFoundError { reference_name: revision.to_vec() };
    let text = format!("resolving {which} revision: reference not found");
    Err(with_detail(Code::NotFound, &text, "ReferenceNotFoundError", &detail))
}
