//! ReplicateRepository and CreateFork: copies from another storage (wire reference, section j).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tabularium_proto::gitaly::{
    CreateForkRequest, CreateForkResponse, FindDefaultBranchNameRequest, GetConfigRequest,
    GetCustomHooksRequest, ObjectFormat, ObjectFormatRequest, ReplicateRepositoryRequest,
    ReplicateRepositoryResponse, Repository, RepositoryExistsRequest, ref_service_client::RefServiceClient,
    repository_service_client::RepositoryServiceClient,
};
use tokio::time::timeout;
use tonic::{Code, Request, Status};

use super::{custom_hooks, files, write_ref};
use crate::{
    copy_attempts::{CopyAttempt, Turn},
    corruption::{self, Corruption},
    error::{GitError, RepositoryError, internal_io},
    git::{Git, revision::check_reference},
    hooks::CUSTOM_HOOKS,
    kept,
    node::Node,
    peer::{Peer, QUESTION_TIMEOUT, question},
    place::{self, Building, Temporary, blocking},
    records,
    storage::{RepositoryPath, check_repository},
    votes::Voter,
};

/// Largest `config` file taken from another node.
const MAX_CONFIG_BYTES: usize = 1024 * 1024;

/// How long a copy waits for changes under way at its target. A router that is lost is noticed much sooner.
const STILLNESS_DEADLINE: Duration = Duration::from_secs(10);

pub(super) async fn replicate(
    node: &Arc<Node>,
    request: Request<ReplicateRepositoryRequest>,
) -> Result<ReplicateRepositoryResponse, Status> {
    let (metadata, extensions, message) = request.into_parts();
    let target = node.storages.locate(message.repository.as_ref())?;
    let source =
        message.source.ok_or_else(|| Status::invalid_argument("source repository cannot be empty"))?;
    if source.storage_name == target.storage.name {
        return Err(Status::invalid_argument("repository and source have the same storage"));
    }
    let peer = Peer::find(&metadata, &extensions, &source.storage_name)?;
    let attempt = CopyAttempt::of(&metadata)?;
    let copy = copy_alone(node, &peer, &source, &target, attempt);
    match attempt {
        None => copy.await,
        Some(attempt) => node.copy_attempts.arrive(&target, attempt)?.unless_overtaken(copy).await,
    }?;
    Ok(ReplicateRepositoryResponse {})
}

/// Copies when no other copy to the same replica runs any more.
async fn copy_alone(
    node: &Arc<Node>,
    peer: &Peer,
    source: &Repository,
    target: &RepositoryPath,
    attempt: Option<CopyAttempt>,
) -> Result<(), Status> {
    let turn = Turn::wait(&node.copying, &node.tasks, &target.path).await;
    if let Some(attempt) = attempt {
        attempt.check(target).await?;
    }
    // The word to go ahead with a write that was settled long ago may still be on its way here. A copy that finds nothing
    // to do locks nothing, so the reference would move after it.
    let still = timeout(STILLNESS_DEADLINE, node.sections.still(&target.path)).await;
    drop(still.map_err(|_| Status::unavailable("a change of the replica is still under way"))?);
    require_source(peer, source).await?;
    match check_repository(&target.path) {
        Ok(()) => {
            let format = source_format(peer, source).await?;
            match corruption_of(target).await? {
                Some(corruption) if corruption.rebuild => {
                    return rebuild(node, &turn, peer, source, target, attempt, corruption).await;
                }
                Some(corruption) => {
                    let (node, target) = (Arc::clone(node), target.clone());
                    let keeping = async move {
                        kept::copy_aside(&node, &target, corruption).await;
                        corruption::clear(&target).await
                    };
                    turn.to_its_end(keeping).await?;
                }
                None => {}
            }
            let own = super::facts::format_name(&node.git, target).await?;
            if own != format {
                let text = format!("object format is {own}, the source's is {format}");
                return Err(Status::failed_precondition(text));
            }
            remember(&turn, attempt, target).await?;
            turn.to_its_end(suspend_record(target.clone())).await?;
            synchronise(node, &turn, peer, source, target).await
        }
        Err(error @ RepositoryError::Invalid(_)) => {
            let found = corruption_of(target).await?;
            let corruption = found.unwrap_or_else(|| Corruption::now(&error.to_string(), true));
            rebuild(node, &turn, peer, source, target, attempt, corruption).await
        }
        Err(RepositoryError::NotFound) => {
            let format = source_format(peer, source).await?;
            let building = Building::begin(node, target, "main", &format).await?;
            remember(&turn, attempt, building.repository()).await?;
            synchronise(node, &turn, peer, source, building.repository()).await?;
            turn.to_its_end(async { Ok(building.publish().await?) }).await
        }
        Err(error) => Err(error.into()),
    }
}

async fn corruption_of(target: &RepositoryPath) -> Result<Option<Corruption>, Status> {
    let replica = target.path.clone();
    let reading = internal_io("reading what was found of the replica");
    blocking(move || corruption::read(&replica).map_err(reading)).await
}

/// Makes a replica from nothing that is found corrupt, and keeps the old one aside. That one stays until the new one is
/// there: nobody knows how long it takes until there is a source that is well.
async fn rebuild(
    node: &Node,
    turn: &Turn,
    peer: &Peer,
    source: &Repository,
    target: &RepositoryPath,
    attempt: Option<CopyAttempt>,
    corruption: Corruption,
) -> Result<(), Status> {
    let format = source_format(peer, source).await?;
    let building = Building::begin_instead(node, target, "main", &format).await?;
    remember(turn, attempt, building.repository()).await?;
    synchronise(node, turn, peer, source, building.repository()).await?;
    let still = timeout(STILLNESS_DEADLINE, node.sections.still(&target.path)).await;
    let still = still.map_err(|_| Status::unavailable("a change of the replica is still under way"))?;
    let grave = Temporary::new(node, &target.storage, "corrupt-")?;
    let bounds = node.kept.clone();
    let publishing = building.publish_instead(move |target| {
        let _still = still;
        kept::move_aside(target, &corruption, &bounds, grave.path())
    });
    turn.to_its_end(publishing).await?;
    kept::prune(node, &target.storage).await;
    Ok(())
}

/// Before anything of the replica changes: from then on a copy with a lower number is refused.
async fn remember(turn: &Turn, attempt: Option<CopyAttempt>, replica: &RepositoryPath) -> Result<(), Status> {
    let Some(attempt) = attempt else { return Ok(()) };
    let replica = replica.clone();
    turn.to_its_end(async move { attempt.remember(&replica).await }).await
}

/// Cuts off the copies that have lower numbers, and has the replica refuse them from then on. When this answers, none of them
/// replaces anything any more.
pub(crate) async fn fence(node: &Node, target: &RepositoryPath, attempt: CopyAttempt) -> Result<(), Status> {
    let fencing = async {
        let turn = Turn::wait(&node.copying, &node.tasks, &target.path).await;
        attempt.check(target).await?;
        remember(&turn, Some(attempt), target).await
    };
    let arrived = node.copy_attempts.arrive(target, attempt);
    let fenced = match arrived {
        Ok(arrived) => arrived.unless_overtaken(fencing).await,
        Err(refused) => Err(refused),
    };
    fenced.map_err(|status| match status.code() {
        // Not to be mistaken for a repository that is not valid.
        Code::FailedPrecondition => Status::aborted(status.message()),
        _ => status,
    })
}

/// From here until the copy is found to be good, what the replica holds is no generation's.
async fn suspend_record(target: RepositoryPath) -> Result<(), Status> {
    let suspending = internal_io("suspending the replica's record");
    blocking(move || records::suspend(&target.path).map_err(suspending)).await
}

fn invalid_source(error: Status) -> Status {
    match error.code() {
        Code::NotFound => Status::not_found("invalid source repository"),
        _ => error,
    }
}

async fn require_source(peer: &Peer, source: &Repository) -> Result<(), Status> {
    let mut client = RepositoryServiceClient::new(peer.channel());
    let request = question(RepositoryExistsRequest { repository: Some(source.clone()) });
    let exists = client.repository_exists(request).await.map_err(invalid_source)?.into_inner().exists;
    if exists { Ok(()) } else { Err(Status::not_found("invalid source repository")) }
}

async fn source_format(peer: &Peer, source: &Repository) -> Result<String, Status> {
    let mut client = RepositoryServiceClient::new(peer.channel());
    let request = question(ObjectFormatRequest { repository: Some(source.clone()) });
    let response = client.object_format(request).await.map_err(invalid_source)?.into_inner();
    match ObjectFormat::try_from(response.format) {
        Ok(ObjectFormat::Sha1) => Ok("sha1".to_owned()),
        Ok(ObjectFormat::Sha256) => Ok("sha256".to_owned()),
        Ok(ObjectFormat::Unspecified) | Err(_) => {
            Err(Status::internal(format!("the source has the unknown object format {}", response.format)))
        }
    }
}

/// Makes `target` what `source` is: config, refs and objects, HEAD, custom hooks.
async fn synchronise(
    node: &Node,
    turn: &Turn,
    peer: &Peer,
    source: &Repository,
    target: &RepositoryPath,
) -> Result<(), Status> {
    copy_config(node, turn, peer, source, target).await?;
    let git = turn.git(&node.git);
    fetch(node, &git, peer, target, source, &["+refs/*:refs/*"], true).await?;
    copy_head(&git, peer, source, target).await?;
    copy_custom_hooks(node, turn, peer, source, target).await
}

async fn fetch(
    node: &Node,
    git: &Git,
    peer: &Peer,
    target: &RepositoryPath,
    source: &Repository,
    refspecs: &[&str],
    hidden_refs: bool,
) -> Result<(), Status> {
    match peer.fetch(node, git, target, source, refspecs, hidden_refs).await {
        Ok(()) => Ok(()),
        Err(GitError::Failed { exit, stderr, .. }) => {
            Err(Status::internal(format!("fetch internal remote: {exit}, stderr: {stderr:?}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Collects a stream of byte pieces, up to `limit`.
async fn collect<T>(
    mut stream: tonic::Streaming<T>,
    limit: usize,
    data: impl Fn(T) -> Bytes,
) -> Result<Vec<u8>, Status> {
    let mut collected = Vec::new();
    // The deadline of the question ends with the answer's headers.
    let silent = |_| Status::deadline_exceeded("the source says nothing");
    while let Some(message) = timeout(QUESTION_TIMEOUT, stream.message()).await.map_err(silent)?? {
        collected.extend_from_slice(&data(message));
        if collected.len() > limit {
            return Err(Status::internal(format!("the source sent more than {limit} bytes")));
        }
    }
    Ok(collected)
}

async fn copy_config(
    node: &Node,
    turn: &Turn,
    peer: &Peer,
    source: &Repository,
    target: &RepositoryPath,
) -> Result<(), Status> {
    let mut client = RepositoryServiceClient::new(peer.channel());
    let request = question(GetConfigRequest { repository: Some(source.clone()) });
    let stream = client.get_config(request).await?.into_inner();
    let config = collect(stream, MAX_CONFIG_BYTES, |message| message.data.into()).await?;
    let config = files::harmless_config(node, &target.storage, config).await?;
    turn.to_its_end(files::replace_config(target.clone(), config)).await
}

async fn source_head(peer: &Peer, source: &Repository) -> Result<Vec<u8>, Status> {
    let mut client = RefServiceClient::new(peer.channel());
    let message = FindDefaultBranchNameRequest { repository: Some(source.clone()), head_only: true };
    Ok(client.find_default_branch_name(question(message)).await?.into_inner().name)
}

async fn copy_head(
    git: &Git,
    peer: &Peer,
    source: &Repository,
    target: &RepositoryPath,
) -> Result<(), Status> {
    let wanted = source_head(peer, source).await?;
    let command = git.command(target, "symbolic-ref").reads().args(["--quiet", "HEAD"]);
    let current = command.output().await?.stdout;
    if wanted.is_empty() || current.trim_ascii() == wanted {
        return Ok(());
    }
    write_ref::set_head(git, target, &wanted).await
}

async fn copy_custom_hooks(
    node: &Node,
    turn: &Turn,
    peer: &Peer,
    source: &Repository,
    target: &RepositoryPath,
) -> Result<(), Status> {
    let mut client = RepositoryServiceClient::new(peer.channel());
    let request = question(GetCustomHooksRequest { repository: Some(source.clone()) });
    let stream = client.get_custom_hooks(request).await?.into_inner();
    let archive = collect(stream, custom_hooks::MAX_ARCHIVE_BYTES, |message| message.data.into()).await?;
    let present = target.path.join(CUSTOM_HOOKS);
    if archive.is_empty() && !present.exists() {
        return Ok(());
    }
    let scratch = Temporary::new(node, &target.storage, "hooks-")?;
    let replica = target.path.clone();
    let replacing = blocking(move || {
        let (replacement, aside) = (scratch.path().join(CUSTOM_HOOKS), scratch.path().join("previous"));
        if archive.is_empty() {
            return custom_hooks::remove(&replica, &aside).map_err(internal_io("removing custom hooks"));
        }
        custom_hooks::unpack(archive.as_slice(), scratch.path())
            .and_then(|()| place::sync_tree(&replacement))
            .map_err(internal_io("unpacking custom hooks"))?;
        custom_hooks::replace(&replica, &replacement, &aside).map_err(internal_io("replacing custom hooks"))
    });
    turn.to_its_end(replacing).await
}

pub(super) async fn fork(
    node: &Node,
    request: Request<CreateForkRequest>,
) -> Result<CreateForkResponse, Status> {
    let (metadata, extensions, message) = request.into_parts();
    let voter = Voter::of(&metadata, &extensions)?;
    let target = node.storages.locate(message.repository.as_ref())?;
    let source = message
        .source_repository
        .ok_or_else(|| Status::invalid_argument("validating source repository: repository not set"))?;
    let only = match message.revision.as_slice() {
        [] => None,
        revision => Some(branch_reference(revision)?),
    };
    let peer = Peer::find(&metadata, &extensions, &source.storage_name)?;
    let format = source_format(&peer, &source).await?;
    let building = Building::begin(node, &target, "main", &format).await;
    let building = building.map_err(|error| error.while_doing("creating fork"))?;
    let head = if let Some(branch) = only {
        let refspec = format!("+{branch}:{branch}");
        fetch(node, &node.git, &peer, building.repository(), &source, &[&refspec], false).await?;
        branch.as_bytes().to_vec()
    } else {
        let refspecs = ["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"];
        fetch(node, &node.git, &peer, building.repository(), &source, &refspecs, false).await?;
        source_head(&peer, &source).await?
    };
    if !head.is_empty() {
        write_ref::set_head(&node.git, building.repository(), &head).await?;
    }
    building.publish_agreed(node, &voter).await?;
    Ok(CreateForkResponse {})
}

fn branch_reference(revision: &[u8]) -> Result<&str, Status> {
    let text = std::str::from_utf8(revision).ok();
    text.filter(|text| text.starts_with("refs/heads/") && check_reference(revision).is_ok())
        .ok_or_else(|| Status::invalid_argument("creating fork: reference is not a branch"))
}
