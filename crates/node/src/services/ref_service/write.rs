//! Moving and deleting references.

use tabularium_proto::gitaly::{
    DeleteRefsError, DeleteRefsRequest, DeleteRefsResponse, InvalidRefFormatError,
    ReferenceStateMismatchError, ReferencesLockedError, UpdateReferencesError, UpdateReferencesRequest,
    UpdateReferencesResponse, delete_refs_error, update_references_error,
};
use tonic::{Code, Response, Status, Streaming};

use crate::{
    error::with_detail,
    git::{
        lines::Lines,
        references,
        revision::{self, ObjectHash, is_zero},
        update_ref::{Expected, Transaction, UpdateRefError},
    },
    node::Node,
    votes::Voter,
};

pub(super) async fn delete_refs(
    node: &Node,
    request: DeleteRefsRequest,
    voter: &Voter,
) -> Result<Response<DeleteRefsResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    check_deletion(&request)?;
    let (changing, listing) = node.git.two_slots().await?;
    let mut transaction =
        Transaction::start_in(&node.git, &repository, false, &changing).await.map_err(deletion_failed)?;
    if request.refs.is_empty() {
        let command = node.git.command(&repository, "for-each-ref").slot(&listing);
        let command = command.args(["--format=%(refname)", "--", "refs/"]);
        let mut names = Lines::start(command, "for-each-ref", b'\n').await?;
        while let Some(name) = names.next().await? {
            if !request.except_with_prefix.iter().any(|prefix| name.starts_with(prefix)) {
                transaction.delete(&name).await.map_err(deletion_failed)?;
            }
        }
        names.checked().await?;
    }
    // The same name twice is one deletion; git would refuse it.
    let mut names: Vec<&[u8]> = request.refs.iter().map(Vec::as_slice).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        transaction.delete(name).await.map_err(deletion_failed)?;
    }
    transaction.commit(node, voter).await.map_err(deletion_failed)?;
    Ok(Response::new(DeleteRefsResponse { git_error: String::new() }))
}

fn check_deletion(request: &DeleteRefsRequest) -> Result<(), Status> {
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    match (request.except_with_prefix.is_empty(), request.refs.is_empty()) {
        (false, false) => return refuse("ExceptWithPrefix and Refs are mutually exclusive"),
        (true, true) => return refuse("empty ExceptWithPrefix and Refs"),
        _ => {}
    }
    if request.except_with_prefix.iter().any(Vec::is_empty) {
        return refuse("empty prefix for exclusion");
    }
    if request.refs.iter().any(Vec::is_empty) {
        return refuse("empty ref");
    }
    // Gitaly looks at the characters only; `HEAD` and the like would then be deleted as files.
    let invalid: Vec<Vec<u8>> =
        request.refs.iter().filter(|name| revision::check_reference(name).is_err()).cloned().collect();
    if invalid.is_empty() {
        return Ok(());
    }
    let detail = DeleteRefsError {
        error: Some(delete_refs_error::Error::InvalidFormat(InvalidRefFormatError { refs: invalid })),
    };
    Err(with_detail(Code::InvalidArgument, "invalid references", "DeleteRefsError", &detail))
}

fn deletion_failed(error: UpdateRefError) -> Status {
    match error {
        UpdateRefError::Locked { reference } => {
            let detail = DeleteRefsError {
                error: Some(delete_refs_error::Error::ReferencesLocked(ReferencesLockedError {
                    refs: vec![reference.into_bytes()],
                })),
            };
            with_detail(Code::Aborted, "cannot lock references", "DeleteRefsError", &detail)
        }
        UpdateRefError::Git(error) => error.into(),
        UpdateRefError::Vote(error) => error.into(),
        error @ (UpdateRefError::Mismatch { .. }
        | UpdateRefError::MissingObject { .. }
        | UpdateRefError::NotACommit { .. }
        | UpdateRefError::Conflict { .. }
        | UpdateRefError::Repeated { .. }
        | UpdateRefError::Invalid { .. }) => Status::internal(format!("unable to commit: {error}")),
    }
}

pub(super) async fn update_references(
    node: &Node,
    mut requests: Streaming<UpdateReferencesRequest>,
    voter: &Voter,
) -> Result<Response<UpdateReferencesResponse>, Status> {
    let Some(mut request) = requests.message().await? else {
        return Err(Status::internal("receiving initial request: EOF"));
    };
    let repository = node.storages.open(request.repository.take().as_ref())?;
    let hash = ObjectHash::of(&repository).await?;
    let mut transaction = Transaction::start(&node.git, &repository, true).await.map_err(update_failed)?;
    loop {
        if request.repository.is_some() {
            return Err(Status::invalid_argument("repository set in subsequent request"));
        }
        if request.updates.is_empty() {
            return Err(Status::invalid_argument("no updates specified"));
        }
        for update in &request.updates {
            if let Err(error) = revision::check_reference(&update.reference) {
                return Err(invalid_format(&format!("validating reference: {error}"), &update.reference));
            }
            let expected = if update.old_object_id.is_empty() {
                Expected::Any
            } else {
                let old = hash.parse(&update.old_object_id);
                Expected::Value(old.map_err(|error| {
                    Status::invalid_argument(format!("validating old object ID: {error}"))
                })?)
            };
            let new = hash
                .parse(&update.new_object_id)
                .map_err(|error| Status::invalid_argument(format!("validating new object ID: {error}")))?;
            transaction.update(&update.reference, &new, &expected).await.map_err(update_failed)?;
        }
        match requests.message().await? {
            Some(next) => request = next,
            None => break,
        }
    }
    match transaction.commit(node, voter).await {
        Ok(()) => Ok(Response::new(UpdateReferencesResponse {})),
        Err(UpdateRefError::Mismatch { reference, expected, actual }) if actual.is_empty() => {
            // Git names the value only when both sides have one; the reference tells the other cases.
            let found = references::read(&node.git, &repository, reference.as_bytes()).await?;
            let actual = found.unwrap_or_else(|| hash.zero());
            let expected = if expected.is_empty() && !is_zero(&actual) { hash.zero() } else { expected };
            Err(update_failed(UpdateRefError::Mismatch { reference, expected, actual }))
        }
        Err(error) => Err(update_failed(error)),
    }
}

fn invalid_format(text: &str, reference: &[u8]) -> Status {
    let error = update_references_error::Error::InvalidFormat(InvalidRefFormatError {
        refs: vec![reference.to_vec()],
    });
    detailed(Code::InvalidArgument, text, error)
}

fn detailed(code: Code, text: &str, error: update_references_error::Error) -> Status {
    with_detail(code, text, "UpdateReferencesError", &UpdateReferencesError { error: Some(error) })
}

fn update_failed(error: UpdateRefError) -> Status {
    use update_references_error::Error;
    let text = error.to_string();
    match error {
        UpdateRefError::Locked { reference } => {
            let detail = ReferencesLockedError { refs: vec![reference.into_bytes()] };
            detailed(Code::Aborted, &text, Error::ReferencesLocked(detail))
        }
        UpdateRefError::Mismatch { reference, expected, actual } => {
            let detail = ReferenceStateMismatchError {
                reference_name: reference.into_bytes(),
                expected_object_id: expected.into_bytes(),
                actual_object_id: actual.into_bytes(),
            };
            detailed(Code::Aborted, &text, Error::ReferenceStateMismatch(detail))
        }
        UpdateRefError::MissingObject { .. } => Status::not_found(text),
        UpdateRefError::Invalid { reference } => invalid_format(&text, reference.as_bytes()),
        UpdateRefError::NotACommit { .. }
        | UpdateRefError::Conflict { .. }
        | UpdateRefError::Repeated { .. } => Status::internal(format!("committing update: {text}")),
        UpdateRefError::Git(error) => error.into(),
        UpdateRefError::Vote(error) => error.into(),
    }
}
