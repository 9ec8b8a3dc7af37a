//! UserCommitFiles: a commit made of single changes to files.

use std::sync::Arc;

use tabularium_proto::gitaly::{
    OperationBranchUpdate, UserCommitFilesActionHeader, UserCommitFilesError, UserCommitFilesRequest,
    UserCommitFilesRequestHeader, UserCommitFilesResponse,
    user_commit_files_action::UserCommitFilesActionPayload as ActionPayload,
    user_commit_files_action_header::ActionType, user_commit_files_error::Error,
    user_commit_files_request::UserCommitFilesRequestPayload as Payload,
};
use tonic::{Code, Response, Status, Streaming};

use super::{
    commit_object::{NAMELESS, NewCommit, write_signed_commit},
    content::Content,
    edited_tree::{EditError, edited_tree},
    signature::Signature,
    start::{Start, has_branches},
    tree_edit::{Action, IndexError, Path, parse_path},
    update::{Change, Requester, UpdateError, expected_old, update},
};
use crate::{
    error::with_detail,
    git::{
        quarantine::Quarantine,
        references,
        revision::{self, ObjectHash, is_zero},
    },
    node::Node,
    peer::Peers,
    storage::RepositoryPath,
    votes::Voter,
};

/// Most changes in one commit.
const MAX_ACTIONS: usize = 100_000;

fn detailed(code: Code, text: &str, error: Error) -> Status {
    with_detail(code, text, "UserCommitFilesError", &UserCommitFilesError { error: Some(error) })
}

fn misfit(error: &IndexError) -> Status {
    detailed(error.code(), &error.text(), Error::IndexUpdate(error.detail()))
}

/// Everything about the request that does not change while its actions arrive.
struct Job {
    node: Arc<Node>,
    repository: RepositoryPath,
    quarantine: Quarantine,
    header: UserCommitFilesRequestHeader,
    hash: ObjectHash,
    /// What the branch points to now.
    target: Option<String>,
    /// What the commit is made on.
    parent: Option<String>,
    voter: Voter,
}

pub(super) async fn commit_files(
    node: &Arc<Node>,
    mut requests: Streaming<UserCommitFilesRequest>,
    peers: &Peers,
    voter: &Voter,
) -> Result<Response<UserCommitFilesResponse>, Status> {
    let first = requests.message().await?.and_then(|request| request.user_commit_files_request_payload);
    let Some(Payload::Header(header)) = first else {
        return Err(Status::invalid_argument("empty UserCommitFilesRequestHeader"));
    };
    let repository = node.storages.open(header.repository.as_ref())?;
    let hash = ObjectHash::of(&repository).await?;
    check(&header, hash)?;
    let reference = revision::branch_reference(&header.branch_name);
    let target = references::read(&node.git, &repository, &reference).await?;
    let quarantine = Quarantine::create(node, &repository)?;
    let parent = parent_commit(node, &quarantine, &header, target.clone(), peers).await?;
    let voter = voter.clone();
    let job = Job { node: Arc::clone(node), repository, quarantine, header, hash, target, parent, voter };

    let actions = job.receive(&mut requests).await?;
    let tree = job.write_tree(&actions).await?;
    let commit_id = job.write_commit(&tree).await?;
    job.move_branch(reference, commit_id).await
}

fn check(header: &UserCommitFilesRequestHeader, hash: ObjectHash) -> Result<(), Status> {
    let refuse = |text: &str| Err(Status::invalid_argument(text));
    if header.user.is_none() {
        return refuse("empty User");
    }
    if header.commit_message.is_empty() {
        return refuse("empty CommitMessage");
    }
    if header.branch_name.is_empty() {
        return refuse("empty BranchName");
    }
    if !header.start_sha.is_empty() {
        hash.parse(header.start_sha.as_bytes())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
    }
    Ok(())
}

/// What the commit is made on, with all of its history at hand. `target` is where the branch is now.
async fn parent_commit(
    node: &Node,
    quarantine: &Quarantine,
    header: &UserCommitFilesRequestHeader,
    target: Option<String>,
    peers: &Peers,
) -> Result<Option<String>, Status> {
    let repository = quarantine.repository();
    let unresolved = |name: &str| {
        Status::invalid_argument(format!("cannot resolve parent commit: reference not found: {name:?}"))
    };
    let branch =
        if header.start_branch_name.is_empty() { &header.branch_name } else { &header.start_branch_name };
    let name = revision::branch_reference(branch);
    let start = Start {
        target: header.repository.as_ref(),
        repository: header.start_repository.as_ref(),
        branch: &name,
    };
    if !header.start_sha.is_empty() {
        start.bring(node, quarantine, peers, &header.start_sha).await?;
        let commit = format!("{}^{{commit}}", header.start_sha);
        let found = references::resolve(&node.git, repository, commit.as_bytes()).await?;
        return found.map(Some).ok_or_else(|| unresolved(&header.start_sha));
    }
    let empty = match start.elsewhere() {
        Some(other) => !has_branches(peers, other).await?,
        None if header.start_branch_name.is_empty() => true,
        None => !references::has_branches(&node.git, repository).await?,
    };
    if empty {
        return Ok(target);
    }
    let found = start.commit(node, quarantine, peers).await?;
    found.map(Some).ok_or_else(|| unresolved(&String::from_utf8_lossy(&name)))
}

/// An action whose content is still arriving.
struct Open {
    header: UserCommitFilesActionHeader,
    kind: ActionType,
    path: Path,
    content: Option<Content>,
}

impl Job {
    /// Reads all actions; contents are blobs in the quarantine when this returns.
    async fn receive(&self, requests: &mut Streaming<UserCommitFilesRequest>) -> Result<Vec<Action>, Status> {
        let mut actions = Vec::new();
        let mut open: Option<Open> = None;
        while let Some(request) = requests.message().await? {
            let payload = match request.user_commit_files_request_payload {
                Some(Payload::Action(action)) => action.user_commit_files_action_payload,
                Some(Payload::Header(_)) | None => None,
            };
            match payload {
                Some(ActionPayload::Header(header)) => {
                    if let Some(open) = open.take() {
                        actions.push(self.complete(open).await?);
                    }
                    if actions.len() >= MAX_ACTIONS {
                        let text = format!("more than {MAX_ACTIONS} actions in one commit");
                        return Err(Status::resource_exhausted(text));
                    }
                    open = Some(self.begin(header).await?);
                }
                Some(ActionPayload::Content(piece)) => match &mut open {
                    Some(Open { content: Some(content), .. }) => content.push(&piece).await?,
                    // Content of an action that has no use for it.
                    Some(Open { content: None, .. }) => {}
                    None => return Err(Status::internal("content sent before action")),
                },
                None => return Err(Status::internal("unhandled action payload type")),
            }
        }
        if let Some(open) = open {
            actions.push(self.complete(open).await?);
        }
        Ok(actions)
    }

    async fn begin(&self, header: UserCommitFilesActionHeader) -> Result<Open, Status> {
        let kind = ActionType::try_from(header.action).map_err(|_| {
            let text = format!("NoMethodError: undefined method `downcase' for {}:Integer", header.action);
            Status::invalid_argument(text)
        })?;
        let path = parse_path(&header.file_path).map_err(|error| misfit(&error))?;
        if kind == ActionType::Move {
            parse_path(&header.previous_path).map_err(|error| misfit(&error))?;
        }
        let takes_content = match kind {
            ActionType::Create | ActionType::Update | ActionType::CreateDir => true,
            ActionType::Move => !header.infer_content,
            ActionType::Delete | ActionType::Chmod => false,
        };
        let content = if takes_content {
            Some(Content::start(&self.quarantine, header.base64_content).await?)
        } else {
            None
        };
        Ok(Open { header, kind, path, content })
    }

    async fn complete(&self, open: Open) -> Result<Action, Status> {
        let Open { header, kind, path, content } = open;
        // A new directory is an empty file in it, whatever content came along.
        let content = if kind == ActionType::CreateDir {
            drop(content);
            Some(Content::start(&self.quarantine, false).await?)
        } else {
            content
        };
        let id = match content {
            Some(content) => Some(content.into_blob(&self.node, &self.quarantine, &path).await?),
            None => None,
        };
        let executable = header.execute_filemode;
        Ok(match kind {
            ActionType::Create => Action::Create { path, id: id.unwrap_or_default(), executable },
            ActionType::CreateDir => Action::CreateDirectory { path, keep: id.unwrap_or_default() },
            ActionType::Update => Action::Update { path, id: id.unwrap_or_default() },
            ActionType::Move => {
                let from = parse_path(&header.previous_path).map_err(|error| misfit(&error))?;
                Action::Move { from, to: path, id }
            }
            ActionType::Delete => Action::Delete { path },
            ActionType::Chmod => Action::ChangeMode { path, executable },
        })
    }

    async fn write_tree(&self, actions: &[Action]) -> Result<String, Status> {
        let edited =
            edited_tree(&self.node, self.quarantine.repository(), self.parent.as_deref(), actions).await;
        edited.map_err(|error| match error {
            EditError::Misfit(error) => misfit(&error),
            EditError::Failed(status) => status,
        })
    }

    async fn write_commit(&self, tree: &str) -> Result<String, Status> {
        let user = self.header.user.clone().unwrap_or_default();
        let committer = Signature::of_request(&user, self.header.timestamp.as_ref())?;
        let or = |given: &[u8], fallback: &[u8]| {
            if given.trim_ascii().is_empty() { fallback.to_vec() } else { given.trim_ascii().to_vec() }
        };
        let author = committer.with_person(
            &or(&self.header.commit_author_name, &committer.name),
            &or(&self.header.commit_author_email, &committer.email),
        );
        for person in [&author, &committer] {
            if person.name.trim_ascii().is_empty() || person.email.trim_ascii().is_empty() {
                return Err(Status::invalid_argument(NAMELESS));
            }
        }
        let parents: Vec<&str> = self.parent.iter().map(String::as_str).collect();
        let commit = NewCommit {
            tree,
            parents: &parents,
            author: &author,
            committer: &committer,
            message: self.header.commit_message.clone().into(),
        };
        write_signed_commit(&self.node, &self.quarantine, commit, self.header.sign).await
    }

    async fn move_branch(
        self,
        reference: Vec<u8>,
        commit_id: String,
    ) -> Result<Response<UserCommitFilesResponse>, Status> {
        let Self { node, repository, quarantine, header, hash, target, parent, voter } = self;
        let repo_created = !references::has_branches(&node.git, &repository).await?;
        let old = match expected_old(&node, &repository, hash, &header.expected_old_oid).await? {
            Some(expected) => expected,
            None => match (target, header.force) {
                (None, _) => hash.zero(),
                (Some(target), true) => target,
                (Some(target), false) => parent.unwrap_or(target),
            },
        };
        let branch_created = is_zero(&old);
        let change = Change { reference, old, new: commit_id.clone() };
        let (sent, user) = (header.repository.unwrap_or_default(), header.user.unwrap_or_default());
        let requester = Requester { repository: &sent, user: &user, voter: &voter };
        match update(&node, &repository, requester, Some(quarantine), &change).await {
            Ok(()) => Ok(Response::new(UserCommitFilesResponse {
                branch_update: Some(OperationBranchUpdate { commit_id, repo_created, branch_created }),
                ..UserCommitFilesResponse::default()
            })),
            Err(UpdateError::Hook(refusal)) => {
                let (text, error) = match refusal.denied() {
                    Some(check) => (
                        format!("denied by access checks: {}", refusal.full_message()),
                        Error::AccessCheck(check),
                    ),
                    None => ("denied by custom hooks".to_owned(), Error::CustomHook(refusal.detail())),
                };
                Err(detailed(Code::PermissionDenied, &text, error))
            }
            Err(UpdateError::Reference) => Err(Status::failed_precondition(change.refusal())),
            Err(UpdateError::Failed(status)) => Err(status),
        }
    }
}
