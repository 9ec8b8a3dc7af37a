//! UserCreateTag, UserDeleteTag.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    ReferenceExistsError, Tag, UserCreateTagError, UserCreateTagRequest, UserCreateTagResponse,
    UserDeleteTagRequest, UserDeleteTagResponse, user_create_tag_error::Error,
};
use tonic::{Code, Response, Status};

use super::{
    signature::Signature,
    update::{Change, Requester, UpdateError, expected_old, update},
};
use crate::{
    error::with_detail,
    git::{
        catfile::{CatFile, ObjectInfo, ObjectKind},
        objects,
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash},
    },
    node::Node,
    storage::RepositoryPath,
    votes::Voter,
};

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "UserCreateTagError", &UserCreateTagError { error: Some(error) })
}

fn check(request: &UserCreateTagRequest) -> Result<(), Status> {
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    if request.tag_name.is_empty() {
        return refuse("empty tag name");
    }
    revision::check(&request.tag_name)
        .map_err(|error| Status::invalid_argument(format!("invalid tag name: {error}")))?;
    if request.user.is_none() {
        return refuse("empty user");
    }
    if request.target_revision.is_empty() {
        return refuse("empty target revision");
    }
    if request.message.contains(&0) {
        return refuse("tag message contains NUL byte");
    }
    Ok(())
}

pub(super) async fn create(
    node: &Arc<Node>,
    request: UserCreateTagRequest,
    voter: &Voter,
) -> Result<Response<UserCreateTagResponse>, Status> {
    check(&request)?;
    let repository = node.storages.open(request.repository.as_ref())?;
    let user = request.user.clone().unwrap_or_default();
    let tagger = Signature::of_request(&user, request.timestamp.as_ref())?;
    let quarantine = Quarantine::create(node, &repository)?;
    let (tag, id) = make_tag(node, quarantine.repository(), &request, &tagger).await?;
    let reference = revision::tag_reference(&request.tag_name);
    if let Some(oid) = references::read(&node.git, &repository, &reference).await? {
        let error = Error::ReferenceExists(ReferenceExistsError { reference_name: reference, oid });
        return Err(detailed(Code::AlreadyExists, "tag reference exists already", error));
    }
    let change = Change { reference, old: ObjectHash::of(&repository).await?.zero(), new: id };
    let sent = request.repository.clone().unwrap_or_default();
    let requester = Requester { repository: &sent, user: &user, voter };
    match update(node, &repository, requester, Some(quarantine), &change).await {
        Ok(()) => Ok(Response::new(UserCreateTagResponse { tag: Some(tag) })),
        Err(UpdateError::Hook(refusal)) => {
            let denied = "reference update denied by";
            let (text, error) = match refusal.denied() {
                Some(check) => {
                    (format!("{denied} access checks: {}", refusal.full_message()), Error::AccessCheck(check))
                }
                None => (format!("{denied} custom hooks"), Error::CustomHook(refusal.detail())),
            };
            Err(detailed(Code::PermissionDenied, &text, error))
        }
        Err(UpdateError::Reference) => {
            let text = format!("reference update failed: {}", change.refusal());
            Err(detailed(Code::FailedPrecondition, &text, Error::ReferenceUpdate(change.detail())))
        }
        Err(UpdateError::Failed(status)) => Err(status),
    }
}

/// The tag, and the object its reference is to point to.
async fn make_tag(
    node: &Node,
    repository: &RepositoryPath,
    request: &UserCreateTagRequest,
    tagger: &Signature,
) -> Result<(Tag, String), Status> {
    let absent = || {
        let revision = String::from_utf8_lossy(&request.target_revision).into_owned();
        Status::failed_precondition(format!("revspec '{revision}' not found"))
    };
    revision::check_path_scoped(&request.target_revision).map_err(|_| absent())?;
    let mut objects = CatFile::start(&node.git, repository).await?;
    let target = objects.info(&request.target_revision).await?.ok_or_else(absent)?;
    let peeled = if target.kind == ObjectKind::Tag {
        objects.info(format!("{}^{{}}", target.id).as_bytes()).await?.ok_or_else(absent)?
    } else {
        target.clone()
    };
    let target_commit = match peeled.kind {
        ObjectKind::Commit => objects.commit(peeled.id.as_bytes()).await?,
        ObjectKind::Blob | ObjectKind::Tree | ObjectKind::Tag => None,
    };
    objects.close().await?;
    if request.message.trim_ascii().is_empty() {
        // A lightweight tag of a tag means what that one stands for.
        let tag =
            Tag { name: request.tag_name.clone(), id: peeled.id.clone(), target_commit, ..Tag::default() };
        return Ok((tag, peeled.id));
    }
    let (id, raw) = write_tag(node, repository, request, &target, tagger).await?;
    let size = u64::try_from(raw.len()).unwrap_or(u64::MAX);
    let parsed = objects::parse_tag(&id, &request.tag_name, &raw, size);
    let tag = Tag {
        name: request.tag_name.clone(),
        id: id.clone(),
        message: parsed.message,
        message_size: parsed.message_size,
        target_commit,
        ..Tag::default()
    };
    Ok((tag, id))
}

async fn write_tag(
    node: &Node,
    repository: &RepositoryPath,
    request: &UserCreateTagRequest,
    target: &ObjectInfo,
    tagger: &Signature,
) -> Result<(String, Vec<u8>), Status> {
    let head = format!("object {}\ntype {}\ntag ", target.id, target.kind.name());
    let raw = [head.as_bytes(), &request.tag_name, b"\ntagger ", &tagger.line(), b"\n\n", &request.message]
        .concat();
    let output = node.git.command(repository, "mktag").output_with(raw.clone()).await?;
    if !output.exit.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        tracing::info!(%stderr, "git refused to make a tag");
        let name = String::from_utf8_lossy(&request.tag_name);
        let text = format!(
            "Gitlab::Git::CommitError: Could not update refs/tags/{name}. Please refresh and try again."
        );
        return Err(Status::not_found(text));
    }
    Ok((String::from_utf8_lossy(output.stdout.trim_ascii()).into_owned(), raw))
}

pub(super) async fn delete(
    node: &Arc<Node>,
    request: UserDeleteTagRequest,
    voter: &Voter,
) -> Result<Response<UserDeleteTagResponse>, Status> {
    let repository = node.storages.open(request.repository.as_ref())?;
    if request.tag_name.is_empty() {
        return Err(Status::invalid_argument("empty tag name"));
    }
    let Some(user) = &request.user else { return Err(Status::invalid_argument("empty user")) };
    let hash = ObjectHash::of(&repository).await?;
    let reference = revision::tag_reference(&request.tag_name);
    let old = match expected_old(node, &repository, hash, &request.expected_old_oid).await? {
        Some(expected) => expected,
        None => references::read(&node.git, &repository, &reference).await?.ok_or_else(|| {
            let name = String::from_utf8_lossy(&request.tag_name);
            Status::failed_precondition(format!("tag not found: {name}"))
        })?,
    };
    let change = Change { reference, old, new: hash.zero() };
    let sent = request.repository.clone().unwrap_or_default();
    let requester = Requester { repository: &sent, user, voter };
    match update(node, &repository, requester, None, &change).await {
        Ok(()) => Ok(Response::new(UserDeleteTagResponse { pre_receive_error: String::new() })),
        // As GitLab's clients know it.
        Err(UpdateError::Hook(refusal)) if refusal.denied().is_some() => {
            Err(Status::internal(refusal.full_message()))
        }
        Err(UpdateError::Hook(refusal)) => {
            Ok(Response::new(UserDeleteTagResponse { pre_receive_error: refusal.message() }))
        }
        Err(UpdateError::Reference) => Err(Status::failed_precondition(change.refusal())),
        Err(UpdateError::Failed(status)) => Err(status),
    }
}
